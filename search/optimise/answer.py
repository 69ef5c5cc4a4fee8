"""A budget that was never searched, answered from what a run has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from rankfront.methods import InputError, Site, Storage
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.optimise.candidates import nearby
from rankfront.search.optimise.goal import make_goal, menu_of, prices_of
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.knapsack import knapsack_several
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.latency_table import Timings, timings_of
from rankfront.search.plans.limits import COSTS, Figures, met
from rankfront.search.plans.menu import Menu, Places, stored
from rankfront.search.plans.menu_jobs import menu_record
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.plans.variables import Parameters
from rankfront.search.storage.front import Row, StudyState, check_dense, dense_row
from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Answer:
    """The plan expected to be best within some limits.

    Attributes:
        plan: it.
        draws: the same as values of the study's variables.
        predicted: the modelled objective's value there; measured where ``trial`` says so.
        figures: `COSTS` of the plan; under its name and ``_predicted`` each latency that has a table, as the table
            predicts it; where ``trial`` says so each latency as it was measured, under its own name.
        trial: the trial that measured the plan already, or None.
    """

    plan: Plan
    draws: Parameters
    predicted: float
    figures: dict[str, float]
    trial: int | None


def answer(
    state: StudyState,
    config: StudyConfig,
    space: Space,
    limits: Sequence[Constraint],
) -> Answer:
    """The plan of least divergence, measured or else predicted, within ``limits`` and the study's own.

    It is the best of what solves the corrected menu under all limits at once, of what slopes
    recommend nearby, and of what was measured. A latency counts as measured where the plan was, else as predicted; what
    nothing predicts limits measured plans alone. Nothing is measured.

    Raises `InputError` where the run has no menu yet, a limit is not on a figure that plans decide or a table
    predicts, or no plan meets them all.
    """
    predictor, dense, timings = prior_predictor(state, config, space)
    menu, origin = predictor.menu, dict(dense.plan.origin)
    predictor.learn(state.trials)
    learned = _Learned(predictor, _figures(predictor, space, dense, timings), list(config.objectives))
    names = learned.figures.names
    for limit in limits:
        if limit.figure not in names or not limit.operator.startswith("<"):
            raise InputError(f"limit {limit} is not on what a plan decides: use FIGURE<=NUMBER with {', '.join(names)}")
    together = [*(Constraint.parse(text) for text in config.search.where), *limits]
    plans = {menu.untreated: 0.0}
    if not met(together, learned.of(menu.untreated)):  # nothing is better than dense
        pessimism = dict.fromkeys(predictor.history.measured, 0.0) | learned.solved(together)
        plans = {plan: worse for plan, worse in pessimism.items() if met(together, learned.of(plan))}
    if not plans:
        cheapest = ", ".join(f"{name}={value:.6g}" for name, value in learned.predicted(menu.cheapest).items())
        wanted = " and ".join(map(str, together))
        raise InputError(f"no plan meets {wanted}; the cheapest has {cheapest}: raise the limit")
    best, value = learned.best(plans)
    measured, figures = predictor.history.measured.get(best), learned.predicted(best)
    shown = {name: figures[name] for name in COSTS} | {f"{name}_predicted": figures[name] for name in timings}
    if measured is not None:
        shown |= {name: learned.of(best)[name] for name in timings}
    draws = space.encode(menu.decode(best))
    return Answer(space.decode(draws, origin), draws, value, shown, measured.trial if measured else None)


@dataclass(frozen=True)
class _Learned:
    """What a run knows of plans: figures that their options decide, and what was measured of them."""

    predictor: Predictor
    figures: Figures
    objectives: list[str]
    _seen: dict[Places, dict[str, float]] = field(default_factory=dict)

    def of(self, places: Places) -> dict[str, float]:
        """Every figure that is known of a plan: those of its options; as measured, where it was."""
        if places not in self._seen:
            measured = self.predictor.history.measured.get(places)
            values = {} if measured is None else dict(zip(self.objectives, measured.values, strict=True))
            self._seen[places] = self.predicted(places) | values
        return self._seen[places]

    def predicted(self, places: Places) -> dict[str, float]:
        """Every figure that a plan's options decide."""
        return self.figures.of(self.predictor.menu.decode(places))

    def best(self, pessimism: Mapping[Places, float]) -> tuple[Places, float]:
        """Of plans the one of least divergence, and the modelled objective's value there: measured where the plan was,
        else predicted. To be chosen, a prediction must be better by so many of its standard deviations."""
        goal, measured, plans = self.predictor.goal, self.predictor.history.measured, list(pessimism)
        levels, errors = self.predictor.levels(plans)
        pessimistic = levels + np.array(list(pessimism.values())) * errors
        known = {plan: measured[plan].values[goal.quality] for plan in plans if plan in measured}
        values = [known.get(plan, goal.loss(float(level))) for plan, level in zip(plans, pessimistic, strict=True)]
        least = int(np.argmin(values))
        return plans[least], known.get(plans[least], goal.loss(float(levels[least])))

    def solved(self, limits: Sequence[Constraint]) -> dict[Places, float]:
        """Plans that are not measured yet, or not all of them, and are expected to meet ``limits``; by how many
        standard deviations each kind turns out worse than predicted."""
        menu = self.predictor.menu
        cheapest, dense = self.predicted(menu.cheapest), self.predicted(menu.untreated)
        upper = [limit for limit in limits if limit.figure in self.figures.names and limit.operator.startswith("<")]
        size = self.figures.size(limits)
        budget = _budget(cheapest, dense, upper, menu.least, menu.dense) if size is None else size
        found, bounds = self._knapsack(limits, budget / menu.dense, size)
        if found is None:
            return {}
        stored = [share * menu.size(found) for share in TUNING.answer_shares] if size is None else []
        steps = dict.fromkeys(nearby(self.predictor, [budget, *stored]), TUNING.steps_worse)
        return {found: TUNING.solutions_worse} | {plan: d for plan, d in steps.items() if met(bounds, self.of(plan))}

    def _knapsack(
        self, limits: Sequence[Constraint], share: float, size: float | None
    ) -> tuple[Places | None, list[Constraint]]:
        """The menu as corrected for plans of ``share`` of the dense size, solved under all ``limits`` that options
        decide, None where no plan meets them; and the limits that it was solved under in the end. ``size`` is what
        they come to, where they all limit the size.

        Where a latency of the solution was measured and missed its limit, the bound moves by what the table was wrong.
        """
        predictor, bounds = self.predictor, [self._tightened(limit) for limit in limits]
        losses = predictor.surrogate.losses(share)
        places = None
        for _ in range(TUNING.answer_tries):
            try:
                places = self._least(losses, bounds, size)
            except InputError:  # where this is the first, what was measured may still meet them
                return places, bounds
            predicted, known = self.predicted(places), self.of(places)
            if all(not limit.missed(known[limit.figure]) for limit in limits if limit.figure in predicted):
                return places, bounds
            bounds = [
                replace(bound, bound=bound.bound * predicted[limit.figure] / known[limit.figure])
                if limit.figure in self.figures.tables and limit.missed(known[limit.figure])
                else bound
                for limit, bound in zip(limits, bounds, strict=True)
            ]
        return places, bounds

    def _least(self, losses: Sequence[np.ndarray], bounds: Sequence[Constraint], size: float | None) -> Places:
        """The plan of nearly least ``losses`` within ``bounds``: along multipliers where they come to ``size``, in
        milliseconds, else by an integer program. Raises `InputError` where no plan meets them."""
        menu = self.predictor.menu
        if size is None:
            gap = TUNING.answer_gap
            return knapsack_several(menu, np.inf, self.figures.budgets(bounds), losses, gap)
        return Lagrangian(menu, losses).solve(size)

    def _tightened(self, limit: Constraint) -> Constraint:
        """``limit``; where the measured plan nearest below it by the table missed it, by as much lower as the table was
        wrong about that plan."""
        if limit.figure not in self.figures.tables:
            return limit
        figure, measured = limit.figure, self.predictor.history.measured
        pairs = [(self.predicted(plan)[figure], self.of(plan)[figure]) for plan in measured]
        predicted, value = max((pair for pair in pairs if not limit.missed(pair[0])), default=(1.0, limit.bound))
        return replace(limit, bound=limit.bound * predicted / value) if limit.missed(value) else limit


def _figures(predictor: Predictor, space: Space, dense: Row, timings: Timings) -> Figures:
    """Those of the run's menu, its latency tables corrected by the trials."""
    plans = [(predictor.menu.decode(plan), found.values) for plan, found in predictor.history.measured.items()]
    tables = {
        name: (objective, timing.calibrated(objective, [(plan, v[column]) for plan, v in plans]).timing)
        for (name, (objective, timing)), column in zip(timings.items(), predictor.goal.timed, strict=True)
    }
    return Figures(predictor.menu, prices_of(space, dense), tables)


def menu_frame(state: StudyState, config: StudyConfig, space: Space) -> pd.DataFrame:
    """The run's menu, a row for each (site, option), dense first: ``site``, ``option``, ``method``, the stored
    ``parameters`` and ``bytes`` of the site, the ``divergence`` predicted before any plan was measured, in nats a
    token, and under the name of each latency among the objectives what its table predicts of the model with that option
    alone, as a ratio to dense. Raises `InputError` where the run has no menu yet."""
    menu, dense, timings = _known(state, config, space)
    sites = {weight.path: Site(weight.path, (weight,)) for site in space.sites for weight in site.weights}
    sites |= {site.name: site for site in space.sites}
    found = []
    for line in menu.lines:
        for option, divergence in zip(line.options, line.divergence, strict=True):
            own = sum((stored(sites[site], option) for site in line.members), Storage(0))
            figures = {"parameters": own.parameters, "bytes": own.bytes(dense.value_bytes), "divergence": divergence}
            alone = Plan.of(line.treated(option))
            figures |= {name: timing.ratio(objective, alone) for name, (objective, timing) in timings.items()}
            found.append({"site": line.site, "option": option.label, "method": option.method, **figures})
    return pd.DataFrame(found)


def prior_predictor(state: StudyState, config: StudyConfig, space: Space) -> tuple[Predictor, Row, Timings]:
    """The predictor as it was before any trial but the dense one; the dense trial, and the latency tables.

    Raises `InputError` where the run has no menu yet."""
    menu, dense, timings = _known(state, config, space)
    return Predictor(menu, space, make_goal(config, space, dense, timings)), dense, timings


def _known(state: StudyState, config: StudyConfig, space: Space) -> tuple[Menu, Row, Timings]:
    """The run's menu, its dense trial and its latency tables; `InputError` where there is none."""
    record, dense = menu_record(state.known), dense_row(state.rows, rung=0)
    if config.search.sampler != OURS:
        raise InputError(f"only runs of sampler {OURS!r} predict, this one used {config.search.sampler!r}: use `front`")
    if record is None or dense is None:
        check_dense(state.rows)
        raise InputError("the run has no menu or dense trial yet: launch it first")
    timings = timings_of(config.objectives, state.known)
    return menu_of(config, space, record, dense.value_bytes, timings), dense, timings


def _budget(
    cheapest: Mapping[str, float], dense: Mapping[str, float], limits: Sequence[Constraint], least: int, most: int
) -> float:
    """Stored values at which the tightest limit is met, figures taken as straight lines in stored values."""
    budget = float(most)
    for limit in limits:
        low, high = cheapest[limit.figure], dense[limit.figure]
        share = (limit.bound - low) / (high - low) if high > low else 1.0
        budget = min(budget, least + min(max(share, 0.0), 1.0) * (most - least))
    return budget
