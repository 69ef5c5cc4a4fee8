"""Our sampler: correct the menu by what was measured, solve again where it pays most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.config import StudyConfig
from rankfront.search.optimise.budgets import target_budgets, uses_up
from rankfront.search.optimise.goal import make_goal
from rankfront.search.optimise.predictor import Places, Predictor
from rankfront.search.optimise.surrogate import Coefficients
from rankfront.search.optimise.taylor import TaylorModel
from rankfront.search.optimise.tuning import DEFAULT, Tuning
from rankfront.search.plans.latency_table import Timings
from rankfront.search.plans.lines import fitted, savings
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.space import Single, Space
from rankfront.search.storage.front import Row

NOT_PROPOSED = {keys.LABEL, keys.SLOPES_OF, keys.PROMOTED}  # attributes of trials that were queued


class RankfrontSampler(BaseSampler):
    """Proposes plans by solving again what every measured trial corrects.

    Each proposal is the candidate with the largest predicted gain in hypervolume. Where slopes were measured the
    candidates are steps downhill from those reference plans, at round kept fractions around them, then solutions of the
    corrected menu at many of those beside them, and now and then those of a posterior sample of its coefficients, or
    switches of levels within front members that keep their budget. Where plans cost several things at once, such as
    values and bytes, each proposal weighs them anew, and its budgets are in the weighed cost. Plans that were measured
    or are running are never proposed again.

    Args:
        predictor: what is known of the plans, shared with whoever asks for predictions.
        seed: of everything random here.
    """

    def __init__(self, predictor: Predictor, seed: int) -> None:
        self.predictor = predictor
        self.tuning = predictor.tuning
        self.menu, self.options, self.goal = predictor.menu, predictor.options, predictor.goal
        self.random = np.random.default_rng(seed)

    # -- Optuna's interface

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {site: IntDistribution(0, len(found) - 1) for site, found in self.options.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        everything = study.get_trials(deepcopy=False)
        self.predictor.learn(everything)
        others = [t for t in everything if t.number != trial.number and not is_void(t.user_attrs)]
        tried = {self._key(t.params) for t in others if t.params}
        by_site = self.menu.choices(self._propose(tried, self._mode(trial.number, everything)))
        return {
            site: list(found).index(by_site[site]) if site in by_site else 0 for site, found in self.options.items()
        }

    def _mode(self, number: int, trials: Sequence[FrozenTrial]) -> str:
        """Without slopes the global modes in turn; with them, a step downhill from the newest, then from any of them or
        a solution of the corrected menu, and now and then a global one."""
        modes, every = self.tuning.modes, self.tuning.global_every
        proposed = [t for t in trials if t.number < number and NOT_PROPOSED.isdisjoint(t.user_attrs)]
        passes = [t for t in trials if keys.SLOPES in t.user_attrs]
        if not passes or not self.predictor.taylor_models:
            return modes[len(proposed) % len(modes)]
        since = [sum(_follows(t, one) for t in proposed) for one in passes]  # those asked while it ran do not know it
        if not since[-1]:
            return "newest"
        others = len(proposed) - sum(later < earlier for earlier, later in pairwise([*since, 0]))
        return modes[others // every % len(modes)] if others % every == every - 1 else "any"

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return 0  # a variable that the menu does not know stays dense

    def _key(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self.predictor.plan_of(params) or ())

    # -- proposing

    def _propose(self, tried: set[Places], mode: str) -> list[int]:
        """The best untried plan of those solved for at targets, else at any budget, else of random steps away."""
        coefficients = self.predictor.surrogate.sample() if mode == "sample" else self.predictor.surrogate.mean
        for pessimism in self._candidates(mode, coefficients):
            fresh = {candidate: worse for candidate, worse in pessimism.items() if candidate not in tried}
            if fresh:
                return self._best(fresh, coefficients)
        candidates = list(pessimism)
        for _ in range(self.tuning.random_steps):
            candidates = [tuple(self._step(list(candidate))) for candidate in candidates]
            fresh = {candidate: self.tuning.steps_worse for candidate in candidates if candidate not in tried}
            if fresh:
                return self._best(fresh, coefficients)
        return list(candidates[0])  # the space is exhausted, which the driver notices

    def _candidates(self, mode: str, coefficients: Coefficients) -> Iterator[dict[Places, float]]:
        """Plans to choose a proposal from, and should all of them be tried, others: the standard deviations by which
        each may be worse than predicted (the winner's curse)."""
        costs = self.menu.count
        priced = self.menu.weighed(list(self.random.dirichlet([1.0] * costs))) if costs > 1 else self.menu
        steps: list[list[int]] = []
        if mode == "newest":
            steps = self._downhill(self.predictor.taylor_models[-1:], priced)
            yield self._at_targets(self._with_pessimism(steps, []))
            yield self._with_pessimism(steps, [])
        if mode in ("newest", "any"):
            steps = self._downhill(self.predictor.taylor_models[-self.tuning.references :], priced)
        front, switches = self.predictor.front(), []
        if front and (mode == "switch" or self.predictor.poor):
            switches = self._switches(front, coefficients, priced)
        solutions = self._solutions(coefficients, priced, at_targets=True) + switches
        yield self._at_targets(self._with_pessimism(steps, solutions))
        yield self._with_pessimism(steps, solutions)
        yield self._with_pessimism(steps, self._solutions(coefficients, priced) + switches)

    def _with_pessimism(self, steps: Sequence[list[int]], solutions: Sequence[list[int]]) -> dict[Places, float]:
        """Each plan once, and the standard deviations by which its kind turns out worse than predicted."""
        worse = self.tuning
        return {tuple(c): worse.solutions_worse for c in solutions} | {tuple(c): worse.steps_worse for c in steps}

    def _best(self, candidates: Mapping[Places, float], coefficients: Coefficients) -> list[int]:
        """The one that gains most by prediction; where none does, that would if predictions were too dark.

        Plans smaller than anything measured need no pessimism: there is nothing that they would have to be better than.
        """
        plans, pessimism = list(candidates), np.array(list(candidates.values()))
        least = min(map(self.menu.size, self.predictor.measured), default=0) - self.tuning.slack * self.menu.dense
        pessimism[[self.menu.size(plan) < least for plan in plans]] = 0.0
        for easing in self.tuning.easings:
            values = self._values(plans, coefficients, pessimism - easing)
            gains = self._gains(values)
            if gains.max() > 0:
                return list(plans[int(gains.argmax())])
        return list(plans[int(self._behind(values).argmin())])

    def _solutions(self, coefficients: Coefficients, priced: Menu, at_targets: bool = False) -> list[list[int]]:
        """The corrected menu solved at budgets spread over the whole range, moved a little each time, or to targets."""
        solved, count = self.predictor.solver(coefficients, priced), self.tuning.solutions
        shift = self.random.uniform()
        budgets = priced.least + (np.arange(count) + shift) / count * (priced.dense - priced.least)
        return [solved.solve(budget) for budget in (self._to_targets(budgets) if at_targets else budgets)]

    def _downhill(self, references: Sequence[TaylorModel], priced: Menu) -> list[list[int]]:
        """The slopes of ``references``, solved at budgets around each."""
        found = []
        for taylor in references:
            moved = self.tuning.stretch * self.random.uniform(-1, 1, self.tuning.around)
            shares = np.array([1.0, *(1 + moved)])
            found += self.predictor.downhill(taylor, self._to_targets(priced.size(taylor.plan) * shares), priced)
        return found

    @cached_property
    def targets(self) -> np.ndarray:
        """Of this study, found once: neither costs nor limits change."""
        return target_budgets(self.predictor)

    def _to_targets(self, budgets: np.ndarray) -> list[float]:
        """``budgets`` moved to the nearest target, each once."""
        if not len(self.targets):
            return list(map(float, budgets))
        return sorted({float(self.targets[np.abs(self.targets - budget).argmin()]) for budget in budgets})

    def _at_targets(self, candidates: Mapping[Places, float]) -> dict[Places, float]:
        """Those of ``candidates`` that use up what a target allows: cautious steps up stop short of it."""
        slack = self.tuning.slack * self.menu.dense
        return {c: worse for c, worse in candidates.items() if uses_up(self.menu.size(c), self.targets, slack)}

    def _switches(self, front: Sequence[list[int]], coefficients: Coefficients, priced: Menu) -> list[list[int]]:
        """Front members with one site moved to another option and a second one moved to stay within the budget."""
        found = []
        losses_of: dict[int, list[np.ndarray]] = {}  # by the front member that they hold around
        for _ in range(self.tuning.switches):
            member = int(self.random.integers(len(front)))
            plan, budget = list(front[member]), priced.size(front[member])
            if member not in losses_of:
                share = self.menu.size(plan) / self.menu.dense
                losses_of[member] = self.predictor.surrogate.losses(coefficients, share)
            losses = losses_of[member]
            plan = self._step(plan)
            over = priced.size(plan) - budget
            best: tuple[float, int, int] | None = None
            for i in map(int, self.random.permutation(len(plan))[: self.tuning.partners]):
                line = priced.lines[i]
                if any(plan[rival] for rival in priced.rivals[i]):
                    continue
                enough = np.flatnonzero(line.sizes[plan[i]] - line.sizes >= over)
                if len(enough):
                    place = int(enough[losses[i][enough].argmin()])
                    change = float(losses[i][place] - losses[i][plan[i]])
                    if place != plan[i] and (best is None or change < best[0]):
                        best = (change, i, place)
            if best is not None:
                plan[best[1]] = best[2]
            if priced.size(plan) <= budget:
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

    def _gains(self, values: np.ndarray) -> np.ndarray:
        """Gain in hypervolume over the measured front, in units of the box, of plans with objectives ``values``
        (N, d), (N,); -1 where limits are missed."""
        points, front, ones = self.goal.unit(values), self._front(), np.ones(self.goal.count)
        before = moocore.hypervolume(front, ref=ones) if len(front) else 0.0
        gains = np.array([moocore.hypervolume(np.vstack([front, point]), ref=ones) - before for point in points])
        gains[self.goal.excess(values) > 0] = -1.0
        return gains

    def _behind(self, values: np.ndarray) -> np.ndarray:
        """How far plans with objectives ``values`` (N, d) are from a gain, (N,): from meeting the limits where none
        does, else from what the front dominates least, in every objective at once."""
        points, front, excess = self.goal.unit(values), self._front(), self.goal.excess(values)
        if excess.min() > 0:
            return excess
        depth = (points[:, None, :] - front[None, :, :]).min(2).max(1) if len(front) else points.max(1)
        behind: np.ndarray = depth + np.where(excess > 0, 1e6, 0.0)
        return behind

    def _front(self) -> np.ndarray:
        """The non-dominated of the measured plans that meet the limits, in units of the box."""
        measured = self.goal.unit(self.predictor.met())
        return measured[moocore.is_nondominated(measured)] if len(measured) else measured

    def _values(self, candidates: Sequence[Places], coefficients: Coefficients, pessimism: np.ndarray) -> np.ndarray:
        """Predicted objectives of every candidate, (N, d). Latency is what its table says, corrected by the trials and
        worse by the median error; the logarithm of a perplexity beside divergence rises in proportion to it; what
        nothing predicts is a line in what each method saves, fitted to the trials."""
        logs, errors = self.predictor.levels(candidates, coefficients)
        logs = logs + pessimism * errors
        values = np.full((len(candidates), self.goal.count), np.nan)
        for row, candidate in enumerate(candidates):
            values[row, self.goal.quality] = self.goal.loss(float(logs[row]))
            for column, value in self.goal.costs(self.menu.choices(candidate)).items():
                values[row, column] = value
        for column, (objective, timing) in self.goal.timed.items():
            trials = [
                (self.menu.choices(plan), known.values[column]) for plan, known in self.predictor.measured.items()
            ]
            table = timing.calibrated(objective, trials)
            ratios = [table.timing.ratio(objective, self.menu.choices(candidate)) for candidate in candidates]
            worse = 0.0 if np.isnan(table.median) else table.median
            values[:, column] = [np.nan if ratio is None else ratio + worse for ratio in ratios]
        if self.goal.perplexity is not None:
            column, dense = self.goal.perplexity
            values[:, column] = dense * np.exp(
                np.minimum(self.predictor.excess_rate(column, dense) * np.exp(logs), 100)
            )
        unknown = np.isnan(values).any(0)
        if unknown.any():
            plans = list(self.predictor.measured)
            known = np.array([found.values for found in self.predictor.measured.values()]).reshape(-1, self.goal.count)
            values[:, unknown] = fitted(
                savings(self.menu.even, plans), known[:, unknown], savings(self.menu.even, candidates)
            )
        return values


def _follows(trial: FrozenTrial, measured: FrozenTrial) -> bool:
    """Whether ``trial`` began after another was finished."""
    begun, ended = trial.datetime_start, measured.datetime_complete
    return begun is not None and ended is not None and begun >= ended


def make_rankfront_sampler(
    menu: Menu,
    space: Space,
    config: StudyConfig,
    dense: Row,
    origin: Mapping[str, str],
    timings: Timings | None = None,
    tuning: Tuning = DEFAULT,
) -> RankfrontSampler:
    """Our sampler for a study whose menu and dense model are measured."""
    places = {site.name: place for site, place in space.sites.items()}
    kinds = [places[line.site].kind for line in menu.lines]
    blocks = [-1 if (block := places[line.site].block) is None else block for line in menu.lines]
    options = {variable.name: variable.options for variable in space.variables if isinstance(variable, Single)}
    goal = make_goal(config, space, dense, origin["dtype"], timings)
    predictor = Predictor(menu, options, kinds, blocks, goal, config.search.seed, space.disjoint, tuning)
    return RankfrontSampler(predictor, config.search.seed)
