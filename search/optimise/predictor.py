"""The predictor of log-divergence: a surrogate fitted to measured plans, and Taylor models around some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import moocore
import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import Option
from rankfront.search import attributes as keys
from rankfront.search.optimise.accuracy import MIN_PREDICTIONS, POOR_ERROR, RECENT
from rankfront.search.optimise.corrections import Corrections, corrections_of
from rankfront.search.optimise.goal import SPREAD_TOKENS, Goal
from rankfront.search.optimise.neighbours import Neighbours
from rankfront.search.optimise.surrogate import Coefficients, Surrogate
from rankfront.search.optimise.taylor import EARLIER_TOKENS, Scaling, TaylorModel, learn_scalings, surest
from rankfront.search.optimise.tuning import DEFAULT, Tuning
from rankfront.search.plans.knapsack import sweep
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu

DEVIATION = 1.48  # of a Gaussian, in median absolute errors
Places = tuple[int, ...]  # a plan as places in the menu, to look up by


@dataclass(frozen=True)
class Measured:
    """A plan that is known: its trial, log-divergence, and values as they would be at the first rung.

    ``spread`` is the standard deviation of the divergence, in nats.
    """

    trial: int
    level: float
    values: list[float]
    spread: float = 0.0


class Solver(Protocol):
    """The corrected menu, solved for any budget."""

    def solve(self, budget: float) -> list[int]:
        """The plan of least predicted divergence within ``budget`` stored values; `InputError` where nothing fits."""


def rung_of(trial: FrozenTrial) -> int:
    """The fidelity that a trial was measured at, 0 the cheapest."""
    return int(trial.user_attrs.get(keys.RUNG, 0))


class _Banded:
    """The corrected menu where what options hurt depends on the size of the plan: solved for bands of it."""

    def __init__(self, surrogate: Surrogate, used: Coefficients, priced: Menu) -> None:
        self.surrogate, self.used, self.priced = surrogate, used, priced
        self._solved: dict[int, Lagrangian] = {}

    def solve(self, budget: float) -> list[int]:
        """By the losses of the nearest of `bands` shares of the dense size; where costs are weighed otherwise, the
        size of a plan is known once it is solved for, so that it is solved for again."""
        bands = self.surrogate.tuning.bands
        share, places = budget / self.priced.dense, list(self.priced.cheapest)
        for _ in range(self.surrogate.tuning.band_rounds):
            places = self._band(round(share * bands)).solve(budget)
            before, share = share, self.surrogate.menu.size(places) / self.surrogate.menu.dense
            if round(before * bands) == round(share * bands):
                break
        return places

    def _band(self, band: int) -> Lagrangian:
        if band not in self._solved:
            losses = self.surrogate.losses(self.used, band / self.surrogate.tuning.bands)
            self._solved[band] = Lagrangian(self.priced, losses)
        return self._solved[band]


class Predictor:
    """Predicts the log-divergence of any plan on the menu, from everything that the trials of a study measured.

    Args:
        menu: what each option costs and is predicted to hurt.
        options: site -> its options in the order of the study's integer variables.
        kinds, blocks: the kind of projection and the block of each line of the menu.
        goal: the objectives.
        seed: of posterior samples.
        disjoint: options by site as a trial drew them -> those of the plan, which treats no weight twice.
        tuning: constants of all of this.
    """

    def __init__(
        self,
        menu: Menu,
        options: Mapping[str, Sequence[Option]],
        kinds: Sequence[str],
        blocks: Sequence[int],
        goal: Goal,
        seed: int,
        disjoint: Callable[[Mapping[str, Option]], Mapping[str, Option]] = dict,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self.tuning = tuning
        self.disjoint = disjoint
        self.menu = menu
        self.options = options
        self.goal = goal
        self.surrogate = Surrogate(menu, kinds, blocks, seed, tuning)
        self.measured: dict[Places, Measured] = {}
        self.taylor_models: list[TaylorModel] = []
        self.scalings: list[Scaling] = []  # of each of them
        self.neighbours: Neighbours | None = None  # None before anything is measured, or where they are off
        self.error = tuning.prior_error  # of the surrogate's predictions, as recent trials showed it
        self.poor = False  # whether that is too much to lean on them
        self._fitted = 0
        self._plans: dict[int, list[int] | None] = {}  # by trial; a finished one never changes
        self._slopes: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}  # a and b by trial
        self._corrections: dict[int, Corrections | None] = {}  # what they say of the menu

    # -- learning

    def plan_of(self, params: Mapping[str, Any]) -> list[int] | None:
        """A trial's parameters as places in the menu; None where it took an option that is not on it."""
        drawn = {site: self.options[site][int(place)] for site, place in params.items() if site in self.options}
        return self.menu.places(self.disjoint(drawn))

    def _plan(self, trial: FrozenTrial) -> list[int] | None:
        """`plan_of` of a finished trial, worked out once."""
        if trial.number not in self._plans:
            self._plans[trial.number] = self.plan_of(trial.params)
        return self._plans[trial.number]

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Fit the surrogate to what ``trials`` of a study measured, each plan at the highest rung that it has reached.

        Quality is read relative to the dense model of the same rung, whose windows are others; `measured` holds the
        values as they would be at the first.
        """
        finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if len(finished) == self._fitted:
            return
        complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        at_dense = {rung_of(t): t.values[self.goal.quality] for t in complete if not any(self._plan(t) or [1])}
        dense = {0: self.goal.dense} | at_dense
        self.measured = {}
        for trial in sorted(complete, key=rung_of):
            plan, rung = self._plan(trial), rung_of(trial)
            if plan is not None and rung in dense:
                level = self.goal.log_divergence(trial.values[self.goal.quality], dense[rung])
                values = list(trial.values)
                if rung:
                    values[self.goal.quality] = self.goal.loss(level) if any(plan) else self.goal.dense
                tokens = trial.user_attrs.get(keys.FIDELITY, SPREAD_TOKENS)
                spread = self.goal.spread * math.sqrt(SPREAD_TOKENS / tokens)
                self.measured[tuple(plan)] = Measured(trial.number, level, values, spread)
        in_turn = sorted(self.measured.items(), key=lambda item: item[1].trial)
        learned = {plan: (found.level, found.spread) for plan, found in in_turn if any(plan)}
        if learned:
            plans, (levels, spreads) = np.array(list(learned)), np.array(list(learned.values())).T
            known = [trial for trial in finished if tuple(self._plan(trial) or ()) in self.measured]
            found = {trial.number: taylor for trial in known if (taylor := self._taylor_model(trial)) is not None}
            self.taylor_models = list(found.values())
            corrections = [self._correction(number, taylor) for number, taylor in found.items()]
            self.surrogate.corrections = [context for context in corrections if context is not None]
            self.surrogate.fit(plans, levels, spreads)
            self._assess()
            self.scalings = learn_scalings(self.taylor_models, plans, np.exp(levels))
            if self.tuning.neighbours:
                predicted, errors = self._uncorrected(plans)
                # What noise made large is no surer for it.
                self.neighbours = Neighbours(plans, levels, errors, spreads / np.exp(np.minimum(levels, predicted)))
        self._fitted = len(finished)

    def _assess(self) -> None:
        """Estimate the surrogate's error from what it would have predicted of recent trials.

        By the rule of `Calibration.poor`, though of the surrogate alone: slopes do not make it better.
        """
        missed = np.abs(self.surrogate.ahead()[self.surrogate.noise < self.tuning.prior_error])[-RECENT:]
        median = float(np.median(missed)) if len(missed) else 0.0
        self.poor = len(missed) >= MIN_PREDICTIONS and median > POOR_ERROR
        variances = [self.tuning.prior_error**2] * self.tuning.prior_trials + [(DEVIATION * median) ** 2] * len(missed)
        self.error = math.sqrt(sum(variances) / len(variances))

    def _taylor_model(self, trial: FrozenTrial) -> TaylorModel | None:
        """The slopes that a trial measured, or None; the divergence is NaN where the reference's is not known."""
        packed = trial.user_attrs.get(keys.SLOPES)
        plan = self._plan(trial)
        if packed is None or plan is None:
            return None
        if trial.number not in self._slopes:
            self._slopes[trial.number] = self._unpacked(packed, plan)
        reference, tokens = self.measured.get(tuple(plan)), trial.user_attrs.get(keys.SLOPE_TOKENS, EARLIER_TOKENS)
        number, divergence = (
            (trial.number, math.nan) if reference is None else (reference.trial, math.exp(reference.level))
        )
        return TaylorModel(number, np.array(plan), divergence, *self._slopes[trial.number], tokens)

    def along(self, trials: Sequence[FrozenTrial]) -> list[TaylorModel]:
        """The slopes that ``trials`` measured, of those that did, in order; what was measured around need not be."""
        return [taylor for trial in trials if (taylor := self._taylor_model(trial)) is not None]

    def _unpacked(
        self, packed: Mapping[str, Sequence[Any]], plan: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """a and b of every option, line by line, around ``plan``."""
        first, second = [], []
        for line, drawn, place in zip(self.menu.lines, self._drawn, plan, strict=True):
            known = np.array(packed.get(line.site, [[], []]), dtype=float)  # (2, options), nan where there is none
            a, b = np.append(known, [[np.nan], [np.nan]], axis=1)[:, drawn if known.size else -np.ones_like(drawn)]
            a[place] = b[place] = 0.0
            first.append(np.where(np.isnan(a), 0.0, a))
            second.append(np.where(np.isnan(b), np.inf, b))
        return first, second

    @cached_property
    def _drawn(self) -> list[np.ndarray]:
        """Of every line, where the study's variable has each option; -1 where it has not, as it is for all options of a
        weight that only joint sites treat."""
        places = [{o: i for i, o in enumerate(self.options.get(line.site, ()))} for line in self.menu.lines]
        return [
            np.array([own.get(option, -1) for option in line.options])
            for own, line in zip(places, self.menu.lines, strict=True)
        ]

    def _correction(self, number: int, taylor: TaylorModel) -> Corrections | None:
        """What the slopes of trial ``number`` say of the menu: worked out once, for it does not depend on the level."""
        if number not in self._corrections:
            self._corrections[number] = corrections_of(taylor, self.menu, self.surrogate.features)
        return self._corrections[number]

    # -- predicting

    def predict(self, option_of: Mapping[str, Option]) -> float | None:
        """The quality objective's predicted value for a plan; None where an option is not on the menu."""
        places = self.menu.places(option_of)
        if places is None:
            return None
        if not any(places):
            return self.goal.dense
        return self.goal.loss(float(self.levels([places])[0][0]))

    def levels(
        self, plans: Sequence[Sequence[int]], coefficients: Coefficients | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted log-divergence of plans, (T,), and its standard deviation: the surrogate's and that of slopes
        nearby, weighted by their precision, corrected by what both missed of measured neighbours.

        A poor surrogate has less weight, but no plan's deviation exceeds the one a priori: held against all plans
        alike it would only hide which of them is the best.
        """
        places = np.array(plans)
        logs, errors = self._uncorrected(places, coefficients)
        if self.neighbours is None:
            return logs, errors
        of_measured, _ = self._uncorrected(self.neighbours.plans, coefficients)
        correction, errors = self.neighbours.correct(places, errors, of_measured)
        return logs + correction, errors

    def _uncorrected(
        self, places: np.ndarray, coefficients: Coefficients | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """By surrogate and slopes alone."""
        logs = self.surrogate.predict(places, coefficients)
        near, errors = surest(self.taylor_models, places, self.scalings)
        weight = self.error**2 / (self.error**2 + errors**2)
        mixed: np.ndarray = (1 - weight) * logs + weight * np.where(weight > 0, near, 0.0)
        return mixed, np.minimum(self.error * np.sqrt(1 - weight), self.tuning.prior_error)

    def excess_rate(self, column: int, dense: float) -> float:
        """Nats by which the loss rises for each nat of divergence, with the perplexity of objective ``column``: the
        median over measured plans; 1 where there is none."""
        pairs = [(known.values[column], known.level) for plan, known in self.measured.items() if any(plan)]
        rates = [math.log(value / dense) / math.exp(level) for value, level in pairs if value > dense]
        return float(np.median(rates)) if rates else 1.0

    def may_meet(self, option_of: Mapping[str, Option]) -> bool:
        """Whether a plan meets the study's limits on what the plan alone decides."""
        values = np.array([[-math.inf] * self.goal.count, [math.inf] * self.goal.count])  # what is not known may be any
        for column, value in self.goal.costs(option_of).items():
            values[:, column] = value
        return bool(self.goal.excess(values).min() == 0)

    def front(self) -> list[list[int]]:
        """The non-dominated plans that meet the study's limits."""
        met = self.met()
        if not len(met):
            return []
        plans = [plan for plan, found in self.measured.items() if not self.goal.excess(np.array([found.values]))[0]]
        keep = moocore.is_nondominated(met)
        return [list(plan) for plan, kept in zip(plans, keep, strict=True) if kept and any(plan)]

    def met(self) -> np.ndarray:
        """The values of the measured plans that meet the study's limits, (N, d)."""
        values = np.array([found.values for found in self.measured.values()], dtype=float)
        values = values.reshape(-1, self.goal.count)
        met: np.ndarray = values[self.goal.excess(values) == 0]
        return met

    # -- solving

    def solver(self, coefficients: Coefficients | None = None, menu: Menu | None = None) -> Solver:
        """What finds the plan of least predicted divergence at any budget, as far as the trials have taught.

        ``menu`` is ours with its costs weighed otherwise; budgets are in its size.
        """
        used, priced = coefficients or self.surrogate.mean, menu or self.menu
        if self.surrogate.corrections:
            return _Banded(self.surrogate, used, priced)
        return sweep(priced, self.surrogate.losses(used))

    def downhill(self, taylor: TaylorModel, budgets: Sequence[float], menu: Menu | None = None) -> list[list[int]]:
        """The slopes of ``taylor``, solved at ``budgets`` in the size of ``menu`` (ours), by steps of `lengths`."""
        priced = menu or self.menu
        solved, _, promised = damped(
            taylor, self.scalings[self.taylor_models.index(taylor)], priced, np.geomspace(*self.tuning.dampings)
        )
        reached = [np.flatnonzero(promised >= length) for length in self.tuning.lengths]  # the last: the shortest step
        chosen = dict.fromkeys(int(places[-1]) for places in reached if len(places)) or {0: None}
        within = [min(max(budget, priced.least), priced.dense) for budget in budgets]
        return [solved[place].solve(budget) for place in chosen for budget in within]

    def nearby(self, budgets: Sequence[float]) -> list[list[int]]:
        """Steps downhill to ``budgets`` of stored values from the references nearest to the first of them."""
        by_distance = sorted(self.taylor_models, key=lambda one: abs(self.menu.size(one.plan) - budgets[0]))
        return [plan for taylor in by_distance[: self.tuning.nearest] for plan in self.downhill(taylor, budgets)]


def damped(
    taylor: TaylorModel, scaling: Scaling, menu: Menu, dampings: np.ndarray
) -> tuple[list[Lagrangian], list[list[int]], np.ndarray]:
    """The slopes of ``taylor`` under each of ``dampings``: what solves them, the step at the reference's own size, and
    the share of the reference's divergence that it promises by that damping."""
    solved = [Lagrangian(menu, taylor.losses(scaling, damping)) for damping in dampings]
    own = max(menu.size(taylor.plan), menu.least)
    steps = [one.solve(own) for one in solved]
    a, b = taylor.sums(np.array(steps))
    return solved, steps, -(scaling.first * a + dampings * scaling.second * b) / taylor.divergence
