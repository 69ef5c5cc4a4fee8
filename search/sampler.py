"""Samplers by name, and our own: correct the menu by what was measured, solve again where it pays most."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import Option
from rankfront.search.allocate import sweep
from rankfront.search.descent import Descent
from rankfront.search.local import Local, Trust, learn_trust, surest
from rankfront.search.menu import Menu
from rankfront.search.surrogate import Coefficients, Surrogate

OURS = "rankfront"
INTERRUPTED = "interrupted: the launcher or its worker stopped before the trial was done"
POPULATION = 16  # a study is tens to hundreds of trials; Optuna's default of 50 would see few generations
OPTUNA_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}
SAMPLERS = (OURS, *OPTUNA_SAMPLERS)


def make_sampler(name: str, seed: int, finished: int) -> BaseSampler:
    """The Optuna sampler called ``name``.

    A resumed study continues a seed's sequence from the ``finished`` trials on, instead of drawing again what it
    drew at the first launch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OPTUNA_SAMPLERS[name](seed + finished)


BUDGETS = 48  # budgets at which the corrected menu is solved for each proposal
STEPS = 100  # random steps before the space is taken to be exhausted
PARTNERS = 24  # sites looked at to make up for a switched one
SWITCHES = 64  # budget-preserving level switches tried for each proposal
MODES = ("solve", "sample", "solve", "switch")  # what proposals are drawn from, in turn
STEPS_PER_SLOPES = 4  # proposals measured between two passes, all but the last of them from the newest
GLOBAL_EVERY = 5  # trials of which one solves the corrected menu, though there are slopes
CAUTIONS = (1.0, 2.0)  # multiples of κ that steps downhill are solved with
STRETCH, FAR_STRETCH, NEIGHBOURS = 0.04, 0.12, 4  # budgets around a centre's: how far, relative to it, and how many
CENTRES = 8  # newest slopes that steps are taken from
NEARBY = 0.04  # kept fraction within which slopes count as measured nearby
SLACK = 0.01  # kept fraction that a much better plan may store more for a front member not to be worth refining
SURROGATE_ERROR = 0.15  # of a predicted log-divergence, standard deviation
PESSIMISM = 0.5  # standard deviations that a candidate is taken to be worse than predicted: the best of many flatter


@dataclass(frozen=True)
class Measured:
    """A plan that is known: its trial, log-divergence, and values as they would be at the first rung."""

    trial: int
    level: float
    values: list[float]


class Solver(Protocol):
    """The corrected menu, solved for any budget."""

    def solve(self, budget: float) -> list[int]:
        """The plan of least predicted divergence within ``budget`` stored values; `InputError` where nothing fits."""


@dataclass(frozen=True)
class Goal:
    """What the search wants, as numbers for each plan.

    Attributes:
        loss: log-divergence of a plan -> value of the quality objective.
        log_divergence: values of the quality objective, a plan's and the dense model's -> log-divergence.
        costs: options by site -> values of the objectives that the plan alone decides, by position.
        dense: value of the quality objective for the dense model, at the first rung.
        quality: position of the quality objective.
        count: of objectives, d.
        unit: values (N, d) -> the same in units of the box that hypervolume is measured in.
        excess: values (N, d) -> how far they miss the study's limits, (N,); 0 where they meet them.
    """

    loss: Callable[[float], float]
    log_divergence: Callable[[float, float], float]
    costs: Callable[[Mapping[str, Option]], Mapping[int, float]]
    dense: float
    quality: int
    count: int
    unit: Callable[[np.ndarray], np.ndarray]
    excess: Callable[[np.ndarray], np.ndarray] = lambda values: np.zeros(len(values))


def rung_of(trial: FrozenTrial) -> int:
    """The fidelity that a trial was measured at, 0 the cheapest."""
    return int(trial.user_attrs.get("rung", 0))


class RankfrontSampler(BaseSampler):
    """Proposes plans by re-solving the knapsack on a menu that every measured trial corrects.

    Each proposal is the candidate with the largest predicted gain in hypervolume, among the solutions of the
    corrected menu at many budgets, those of a posterior sample of its coefficients, and switches of levels within
    front members that keep their budget. Plans that were measured or are running are never proposed again.

    Args:
        menu: what each option costs and is predicted to hurt.
        options: site -> its options in the order of the study's integer variables.
        kinds, blocks: the kind of projection and the block of each line of the menu.
        goal: the objectives.
        seed: of everything random here.
    """

    def __init__(
        self,
        menu: Menu,
        options: Mapping[str, Sequence[Option]],
        kinds: Sequence[str],
        blocks: Sequence[int],
        goal: Goal,
        seed: int,
    ) -> None:
        self.menu = menu
        self.options = options
        self.goal = goal
        self.surrogate = Surrogate(menu, kinds, blocks, seed)
        self.random = np.random.default_rng(seed)
        self._fitted = 0
        self.measured: dict[tuple[int, ...], Measured] = {}
        self.locals: list[Local] = []
        self.trust = Trust()

    # -- Optuna's interface

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {site: IntDistribution(0, len(found) - 1) for site, found in self.options.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self.learn(study)
        everything = study.get_trials(deepcopy=False)
        others = [t for t in everything if t.number != trial.number and t.user_attrs.get("failure") != INTERRUPTED]
        tried = {self._key(t.params) for t in others if t.params}
        by_site = self.menu.choices(self._propose(tried, self._mode(trial.number, everything)))
        return {
            site: list(found).index(by_site[site]) if site in by_site else 0 for site, found in self.options.items()
        }

    def _mode(self, number: int, trials: Sequence[FrozenTrial]) -> str:
        """Without slopes the global modes in turn; with them, steps downhill from the newest, then from any of them,
        and now and then a global one."""
        last = max((t.number for t in trials if "slopes" in t.user_attrs), default=None)
        if last is None or not self.locals:
            return MODES[number % len(MODES)]
        steps = sum(last < t.number < number and "slopes_of" not in t.user_attrs for t in trials)
        if steps < STEPS_PER_SLOPES - 1:
            return "newest"
        return MODES[number // GLOBAL_EVERY % len(MODES)] if number % GLOBAL_EVERY == 0 else "any"

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return 0  # a variable that the menu does not know stays dense

    # -- learning

    def _plan(self, params: Mapping[str, Any]) -> list[int] | None:
        """A trial's parameters as places in the menu; None where it took an option that is not on it."""
        return self.menu.places(
            {site: self.options[site][int(place)] for site, place in params.items() if site in self.options}
        )

    def _key(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self._plan(params) or ())

    def learn(self, study: optuna.Study) -> None:
        """Fit the surrogate to what is measured, each plan at the highest rung that it has reached.

        Quality is read relative to the dense model of the same rung, whose windows are others; `measured` holds the
        values as they would be at the first.
        """
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(finished) == self._fitted:
            return
        complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        at_dense = {rung_of(t): t.values[self.goal.quality] for t in complete if not any(self._plan(t.params) or [1])}
        dense = {0: self.goal.dense} | at_dense
        self.measured = {}
        for trial in sorted(complete, key=rung_of):
            plan, rung = self._plan(trial.params), rung_of(trial)
            if plan is not None and rung in dense:
                level = self.goal.log_divergence(trial.values[self.goal.quality], dense[rung])
                values = list(trial.values)
                if rung:
                    values[self.goal.quality] = self.goal.loss(level) if any(plan) else self.goal.dense
                self.measured[tuple(plan)] = Measured(trial.number, level, values)
        learned = {plan: found.level for plan, found in self.measured.items() if any(plan)}
        if learned:
            plans, levels = np.array(list(learned)), np.array(list(learned.values()))
            self.surrogate.fit(plans, levels)
            self.locals = [local for trial in finished if (local := self._local(trial)) is not None]
            self.trust = learn_trust(self.locals, plans, np.exp(levels))
        self._fitted = len(finished)

    def _local(self, trial: FrozenTrial) -> Local | None:
        """The slopes that a trial measured; None where it measured none, or their centre's level is unknown."""
        packed = trial.user_attrs.get("slopes")
        plan = self._plan(trial.params)
        if packed is None or plan is None or tuple(plan) not in self.measured:
            return None
        first, second = [], []
        for i, line in enumerate(self.menu.lines):
            known = dict(zip(self.options[line.site], zip(*packed.get(line.site, [[], []]), strict=True), strict=False))
            pairs = [known.get(option) or (None, None) for option in line.options]
            pairs[plan[i]] = (0.0, 0.0)
            first.append(np.array([0.0 if a is None else a for a, _ in pairs]))
            second.append(np.array([np.inf if b is None else b for _, b in pairs]))
        centre = self.measured[tuple(plan)]
        return Local(centre.trial, np.array(plan), math.exp(centre.level), first, second)

    def slopes_due(self, study: optuna.Study) -> int | None:
        """The trial whose plan slopes should be measured around next; None where proposals should be measured first.

        After every `STEPS_PER_SLOPES` proposals: of the front members without slopes, the one where most is to gain,
        by its divergence and the gap between its neighbours, and where slopes were measured least nearby.
        """
        self.learn(study)
        trials = study.get_trials(deepcopy=False)
        asked = [t for t in trials if "slopes_of" in t.user_attrs and t.user_attrs.get("failure") != INTERRUPTED]
        last = max((t.number for t in asked), default=-1)
        if any(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in asked):
            return None
        since = sum(t.number > last and t.state == TrialState.COMPLETE and rung_of(t) == 0 for t in trials)
        if since < STEPS_PER_SLOPES:
            return None
        front = sorted(self._front(), key=self.menu.parameters)
        done = {t.user_attrs["slopes_of"] for t in asked}
        stored = np.array([self.menu.least, *map(self.menu.parameters, front), self.menu.dense]) / self.menu.dense
        centres = np.array([self.menu.parameters(local.plan) for local in self.locals])
        best: tuple[float, int] | None = None
        levels = np.array([self.measured[tuple(plan)].level for plan in front])
        for i, plan in enumerate(front, start=1):
            found = self.measured[tuple(plan)]
            if (levels[stored[1:-1] <= stored[i] + SLACK] < found.level - SURROGATE_ERROR).any():
                continue  # for hardly more storage there is something much better
            inside = float(self.goal.unit(np.array([found.values]))[0, self.goal.quality])
            nearby = int((np.abs(centres / self.menu.dense - stored[i]) < NEARBY).sum())
            gain = min(inside, 1.0) * (stored[i + 1] - stored[i - 1]) / (1 + nearby) ** 2
            if found.trial not in done and inside < 1 and (best is None or gain > best[0]):
                best = gain, found.trial
        return None if best is None else best[1]

    def predict(self, option_of: Mapping[str, Option]) -> float | None:
        """The quality objective's predicted value for a plan; None where an option is not on the menu."""
        places = self.menu.places(option_of)
        if places is None:
            return None
        if not any(places):
            return self.goal.dense
        return self.goal.loss(float(self._levels([places])[0][0]))

    def _levels(
        self, plans: Sequence[list[int]], coefficients: Coefficients | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted log-divergence of plans, (T,), and its standard deviation: the surrogate's and that of slopes
        nearby, weighted by their precision."""
        places = np.array(plans)
        logs = self.surrogate.predict(places, coefficients)
        near, errors = surest(self.locals, places, self.trust)
        weight = SURROGATE_ERROR**2 / (SURROGATE_ERROR**2 + errors**2)
        mixed: np.ndarray = (1 - weight) * logs + weight * np.where(weight > 0, near, 0.0)
        return mixed, SURROGATE_ERROR * np.sqrt(1 - weight)

    def may_meet(self, option_of: Mapping[str, Option]) -> bool:
        """Whether a plan meets the study's limits on what the plan alone decides."""
        values = np.array([[-math.inf] * self.goal.count, [math.inf] * self.goal.count])  # what is not known may be any
        for column, value in self.goal.costs(option_of).items():
            values[:, column] = value
        return bool(self.goal.excess(values).min() == 0)

    # -- proposing

    def _propose(self, tried: set[tuple[int, ...]], mode: str) -> list[int]:
        coefficients = self.surrogate.sample() if mode == "sample" else self.surrogate.mean
        front = self._front()
        if mode == "newest":
            candidates = self._downhill(self.locals[-1:], STRETCH)
        elif mode == "any":
            candidates = self._downhill(self.locals[-CENTRES:], FAR_STRETCH)
        else:
            candidates = self._solutions(coefficients)
            if mode == "switch" and front:
                candidates += self._switches(front, coefficients)
        fresh = list({tuple(c): c for c in candidates if tuple(c) not in tried}.values())
        for _ in range(STEPS):  # everything solved for was measured: step away from it at random
            if fresh:
                break
            candidates = [self._step(list(c)) for c in candidates]
            fresh = [c for c in candidates if tuple(c) not in tried]
        if not fresh:
            return candidates[0]  # the space is exhausted, which the driver notices
        gains = self._gains(fresh, coefficients)
        return fresh[int(np.argmax(gains))]

    def _solutions(self, coefficients: Coefficients) -> list[list[int]]:
        """The corrected menu solved at budgets spread over the whole range, moved a little each time."""
        solved = self.solver(coefficients)
        shift = self.random.uniform()
        shares = (np.arange(BUDGETS) + shift) / BUDGETS
        return [solved.solve(self.menu.least + share * (self.menu.dense - self.menu.least)) for share in shares]

    def _downhill(self, centres: Sequence[Local], stretch: float) -> list[list[int]]:
        """The slopes of ``centres``, solved at budgets around each."""
        none = np.zeros((len(self.menu.lines), len(self.menu.lines)))
        found = []
        for local in centres:
            centre = self.menu.parameters(local.plan)
            for caution in CAUTIONS:
                solved = Descent(self.menu, local.losses(self.trust, caution), none)
                for share in (1.0, *(1 + stretch * self.random.uniform(-1, 1, NEIGHBOURS))):
                    found.append(solved.solve(min(max(share * centre, self.menu.least), self.menu.dense)))
        return found

    def best_within(self, budget: float) -> tuple[list[int], float]:
        """Of the measured plans within ``budget`` stored values and those solved for it, the one of least divergence.

        With it, the modelled objective's value: measured where the plan was, else predicted.
        """
        plans = [self.solver().solve(budget)]
        none = np.zeros((len(self.menu.lines), len(self.menu.lines)))
        for local in sorted(self.locals, key=lambda one: abs(self.menu.parameters(one.plan) - budget))[:NEIGHBOURS]:
            plans += [Descent(self.menu, local.losses(self.trust, c), none).solve(budget) for c in CAUTIONS]
        if budget >= self.menu.dense:
            return [0] * len(self.menu.lines), self.goal.dense
        levels = map(float, self._levels(plans)[0])
        value = {tuple(plan): self.goal.loss(level) for plan, level in zip(plans, levels, strict=True)}
        for known, found in self.measured.items():
            if self.menu.parameters(known) <= budget:
                value[known] = found.values[self.goal.quality]
        best = min(value, key=lambda plan: value[plan])
        return list(best), value[best]

    def solver(self, coefficients: Coefficients | None = None) -> Solver:
        """What finds the plan of least predicted divergence at any budget, as far as the trials have taught."""
        used = coefficients or self.surrogate.mean
        coupling = self.surrogate.coupling(used)
        losses = self.surrogate.losses(used)
        return sweep(self.menu, losses) if coupling is None else Descent(self.menu, losses, coupling)

    def _front(self) -> list[list[int]]:
        """The non-dominated plans that meet the study's limits."""
        met = self._met()
        if not len(met):
            return []
        plans = [plan for plan, found in self.measured.items() if not self.goal.excess(np.array([found.values]))[0]]
        keep = moocore.is_nondominated(met)
        return [list(plan) for plan, kept in zip(plans, keep, strict=True) if kept and any(plan)]

    def _met(self) -> np.ndarray:
        """The values of the measured plans that meet the study's limits, (N, d)."""
        values = np.array([found.values for found in self.measured.values()], dtype=float)
        values = values.reshape(-1, self.goal.count)
        met: np.ndarray = values[self.goal.excess(values) == 0]
        return met

    def _switches(self, front: Sequence[list[int]], coefficients: Coefficients) -> list[list[int]]:
        """Front members with one site moved to another option and a second one moved to stay within the budget."""
        losses = self.surrogate.losses(coefficients)
        found = []
        for _ in range(SWITCHES):
            plan = list(front[int(self.random.integers(len(front)))])
            budget = self.menu.parameters(plan)
            plan = self._step(plan)
            over = self.menu.parameters(plan) - budget
            best: tuple[float, int, int] | None = None
            for i in map(int, self.random.permutation(len(plan))[:PARTNERS]):
                line = self.menu.lines[i]
                if any(plan[rival] for rival in self.menu.rivals[i]):
                    continue
                enough = np.flatnonzero(line.parameters[plan[i]] - line.parameters >= over)
                if len(enough):
                    place = int(enough[losses[i][enough].argmin()])
                    change = float(losses[i][place] - losses[i][plan[i]])
                    if place != plan[i] and (best is None or change < best[0]):
                        best = (change, i, place)
            if best is not None:
                plan[best[1]] = best[2]
            if self.menu.parameters(plan) <= budget:
                found.append(plan)
        return found

    def _step(self, plan: list[int]) -> list[int]:
        """``plan`` with one site at another of its options, and its rivals at dense."""
        site = int(self.random.integers(len(plan)))
        count = len(self.menu.lines[site].options)
        plan[site] = (plan[site] + int(self.random.integers(1, max(count, 2)))) % count
        if plan[site]:
            for rival in self.menu.rivals[site]:
                plan[rival] = 0
        return plan

    def _gains(self, candidates: Sequence[list[int]], coefficients: Coefficients) -> np.ndarray:
        """Predicted gain in hypervolume of every candidate over the measured front, in units of the box."""
        values = self._values(candidates, coefficients)
        points, excess = self.goal.unit(values), self.goal.excess(values)
        measured = self.goal.unit(self._met())
        ones = np.ones(self.goal.count)
        front = measured[moocore.is_nondominated(measured)] if len(measured) else measured
        before = moocore.hypervolume(front, ref=ones) if len(front) else 0.0
        gains = np.array([moocore.hypervolume(np.vstack([front, point]), ref=ones) - before for point in points])
        if excess.min() > 0:
            return -excess  # nothing is predicted to meet the limits: come as near to them as possible
        gains[excess > 0] = -1.0
        if gains.max() > 0:
            return gains
        distance: np.ndarray = points.max(1) + np.where(excess > 0, 1e6, 0.0)
        return -distance  # nothing predicted inside the box: come as near to it as possible

    def _values(self, candidates: Sequence[list[int]], coefficients: Coefficients) -> np.ndarray:
        """Predicted objectives of every candidate, (N, d). What neither the plan nor the model gives (latency) is a
        straight line in the stored parameters, fitted to the measured trials."""
        logs, errors = self._levels(candidates, coefficients)
        logs = logs + PESSIMISM * errors
        values = np.full((len(candidates), self.goal.count), np.nan)
        stored = np.array([self.menu.parameters(candidate) for candidate in candidates]) / self.menu.dense
        for row, candidate in enumerate(candidates):
            values[row, self.goal.quality] = self.goal.loss(float(logs[row]))
            for column, value in self.goal.costs(self.menu.choices(candidate)).items():
                values[row, column] = value
        for column in map(int, np.flatnonzero(np.isnan(values).any(0))):
            pairs = [(self.menu.parameters(p) / self.menu.dense, m.values[column]) for p, m in self.measured.items()]
            x, y = np.array(pairs or [(1.0, 1.0)]).T
            design = np.stack([np.ones_like(x), x - 1.0], axis=1)
            line = np.linalg.solve(design.T @ design + 1e-3 * np.eye(2), design.T @ y)
            values[:, column] = line[0] + line[1] * (stored - 1.0)
        return values
