"""A budget that was never searched, answered from what a run has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
import pandas as pd

from rankfront.methods import DENSE_OPTION, InputError, get_method
from rankfront.search.config import StudyConfig
from rankfront.search.device import DTYPES
from rankfront.search.front import Constraint, Row, dense_row
from rankfront.search.goal import Timings, menu_of, timings_of
from rankfront.search.menu import Menu
from rankfront.search.model import Source, find_sites, skeleton
from rankfront.search.plan import Plan, cost_of
from rankfront.search.predictions import menu_record
from rankfront.search.sampler import ours
from rankfront.search.samplers import OURS
from rankfront.search.space import Space

COSTS = ("parameters", "block_parameters", "parameter_count", "bytes")  # figures that a plan alone decides
TRIES = 12  # budgets tried until the plan meets every limit


@dataclass(frozen=True)
class Answer:
    """The plan expected to be best within some limits.

    Attributes:
        plan: it.
        draws: the same as values of the study's variables.
        predicted: the modelled objective's value there; measured where ``trial`` says so.
        figures: `COSTS` of the plan.
        trial: the trial that measured the plan already, or None.
    """

    plan: Plan
    draws: dict[str, int]
    predicted: float
    figures: dict[str, float]
    trial: int | None


def answer(
    study: optuna.Study, config: StudyConfig, rows: Sequence[Row], source: Source, limits: Sequence[Constraint]
) -> Answer:
    """Solve the corrected menu of a run within ``limits``; nothing is measured.

    Raises `InputError` where the run has no menu yet, a limit is not on a figure that plans decide, or none is met.
    """
    for limit in limits:
        if limit.figure not in COSTS or not limit.operator.startswith("<"):
            raise InputError(f"limit {limit} is not on what a plan decides: use FIGURE<=NUMBER with {', '.join(COSTS)}")
    space = Space(find_sites(skeleton(source)), config.space, 0)
    menu, dense, timings = _known(study, config, rows, space)
    origin = dict(dense.plan.origin)
    beliefs = ours(menu, space, config, dense, origin, timings).beliefs
    beliefs.learn(study)
    inside = {site: place.block is not None for site, place in space.sites.items()}

    def figures(places: Sequence[int]) -> dict[str, float]:
        plan = Plan.of(menu.choices(places))
        cost = cost_of(plan, inside, int(dense.attributes["parameter_count"]), DTYPES[origin["dtype"]].itemsize)
        found = (cost.parameters, cost.block_parameters, cost.values, cost.bytes)
        return dict(zip(COSTS, map(float, found), strict=True))

    budget = _budget(figures(menu.cheapest), figures([0] * len(menu.lines)), limits, menu.least, menu.dense)
    for _ in range(TRIES):
        places, value = beliefs.best_within(budget)
        found = figures(places)
        over = max(
            (found[limit.figure] / limit.bound for limit in limits if limit.missed(found[limit.figure])), default=None
        )
        if over is None:
            options = menu.choices(places)
            known = beliefs.measured.get(tuple(places))
            return Answer(Plan.of(options, origin), space.draws(options), value, found, known.trial if known else None)
        budget = max(menu.least, min(budget - 1, int(budget / over)))
    cheapest = ", ".join(f"{name}={value:.6g}" for name, value in figures(menu.cheapest).items())
    raise InputError(f"no plan meets {' and '.join(map(str, limits))}; the cheapest has {cheapest}: raise the limit")


def menu_frame(study: optuna.Study, config: StudyConfig, rows: Sequence[Row], source: Source) -> pd.DataFrame:
    """The run's menu, a row for each (site, option), dense first: ``site``, ``option``, ``method``, the stored
    ``parameters`` and ``bytes`` of the site, the ``divergence`` predicted before any plan was measured, in nats a
    token, and under the name of each latency among the objectives what its table predicts of the model with that option
    alone, as a ratio to dense. Raises `InputError` where the run has no menu yet."""
    space = Space(find_sites(skeleton(source)), config.space, 0)
    menu, dense, timings = _known(study, config, rows, space)
    value_bytes = DTYPES[dict(dense.plan.origin)["dtype"]].itemsize
    sites = {site.name: site for site in space.sites}
    found = []
    for line in menu.lines:
        for option, divergence in zip(line.options, line.divergence, strict=True):
            site = sites[line.site]
            treated = option != DENSE_OPTION
            stored = get_method(option.method).storage(site, option) if treated else site.storage
            figures = {"parameters": stored.parameters, "bytes": stored.bytes(value_bytes), "divergence": divergence}
            figures |= {
                name: timing.ratio(objective, {line.site: option}) for name, (objective, timing) in timings.items()
            }
            found.append({"site": line.site, "option": option.label, "method": option.method, **figures})
    return pd.DataFrame(found)


def _known(study: optuna.Study, config: StudyConfig, rows: Sequence[Row], space: Space) -> tuple[Menu, Row, Timings]:
    """The run's menu, its dense trial and its latency tables; `InputError` where there is none."""
    record, dense = menu_record(study.user_attrs), dense_row(rows, rung=0)
    if config.search.sampler != OURS:
        raise InputError(f"only runs of sampler {OURS!r} predict, this one used {config.search.sampler!r}: use `front`")
    if record is None or dense is None:
        raise InputError("the run has no menu or dense trial yet: launch it first")
    timings = timings_of(config, study.user_attrs)
    return menu_of(config, space, record, dict(dense.plan.origin)["dtype"], timings), dense, timings


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
