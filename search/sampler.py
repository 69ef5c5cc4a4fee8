"""Our sampler: correct the menu by what was measured, solve again where it pays most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rankfront.search.beliefs import CENTRES, SURROGATE_ERROR, Beliefs, rung_of
from rankfront.search.config import StudyConfig
from rankfront.search.front import Row
from rankfront.search.goal import Timings, make_goal
from rankfront.search.lines import fitted, savings
from rankfront.search.local import Local
from rankfront.search.menu import Menu
from rankfront.search.samplers import INTERRUPTED
from rankfront.search.space import Single, Space
from rankfront.search.surrogate import Coefficients

BUDGETS = 24  # budgets at which the corrected menu is solved for each proposal
STEPS = 100  # random steps before the space is taken to be exhausted
PARTNERS = 24  # sites looked at to make up for a switched one
SWITCHES = 64  # budget-preserving level switches tried for each proposal
NOT_PROPOSED = {"anchor", "slopes_of", "promoted"}  # attributes of trials that were queued
MODES = ("solve", "sample", "solve", "switch")  # what global proposals are drawn from, in turn
STEPS_PER_SLOPES = 3  # proposals measured between two passes, the first of them from the newest
GLOBAL_EVERY = 12  # one proposal in so many is global, though there are slopes
STRETCH, FAR_STRETCH, NEIGHBOURS = 0.04, 0.12, 4  # budgets around a centre's: how far, relative to it, and how many
NEARBY = 0.06  # kept fraction within which slopes count as measured nearby
WIDEST = 0.1  # kept fraction; a wider gap between front members says no more about what is to gain
SLACK = 0.01  # kept fraction that a much better plan may store more for a front member not to be worth refining
PESSIMISM = 0.5  # standard deviations that a candidate is taken to be worse than predicted: the best of many flatter


class RankfrontSampler(BaseSampler):
    """Proposes plans by solving again what every measured trial corrects.

    Each proposal is the candidate with the largest predicted gain in hypervolume. Where slopes were measured the
    candidates are steps downhill from their centres, at budgets around them, then solutions of the corrected menu at
    many budgets beside them, and now and then those of a posterior sample of its coefficients, or switches of levels
    within front members that keep their budget. Where plans cost several things at once, such as values and bytes,
    each proposal weighs them anew, and its budgets are in the weighed cost. Plans that were measured or are running are
    never proposed again.

    Args:
        beliefs: what is known of the plans, shared with whoever asks for predictions.
        seed: of everything random here.
    """

    def __init__(self, beliefs: Beliefs, seed: int) -> None:
        self.beliefs = beliefs
        self.menu, self.options, self.goal = beliefs.menu, beliefs.options, beliefs.goal
        self.random = np.random.default_rng(seed)

    # -- Optuna's interface

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {site: IntDistribution(0, len(found) - 1) for site, found in self.options.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self.beliefs.learn(study)
        everything = study.get_trials(deepcopy=False)
        others = [t for t in everything if t.number != trial.number and t.user_attrs.get("failure") != INTERRUPTED]
        tried = {self._key(t.params) for t in others if t.params}
        by_site = self.menu.choices(self._propose(tried, self._mode(trial.number, everything)))
        return {
            site: list(found).index(by_site[site]) if site in by_site else 0 for site, found in self.options.items()
        }

    def _mode(self, number: int, trials: Sequence[FrozenTrial]) -> str:
        """Without slopes the global modes in turn; with them, a step downhill from the newest, then from any of them or
        a solution of the corrected menu, and now and then a global one."""
        proposed = sum(t.number < number and NOT_PROPOSED.isdisjoint(t.user_attrs) for t in trials)
        last = max((t.number for t in trials if "slopes" in t.user_attrs), default=None)
        if last is None or not self.beliefs.locals:
            return MODES[proposed % len(MODES)]
        if proposed % GLOBAL_EVERY == GLOBAL_EVERY - 1:
            return MODES[proposed // GLOBAL_EVERY % len(MODES)]
        steps = sum(last < t.number < number and "slopes_of" not in t.user_attrs for t in trials)
        return "any" if steps else "newest"

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return 0  # a variable that the menu does not know stays dense

    def _key(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self.beliefs.plan_of(params) or ())

    def slopes_due(self, study: optuna.Study) -> int | None:
        """The trial whose plan slopes should be measured around next; None where proposals should be measured first.

        After every `STEPS_PER_SLOPES` proposals: of the front members without slopes, the one where most is to gain,
        by its divergence and the gap between its neighbours, and where slopes were measured least nearby.
        """
        self.beliefs.learn(study)
        trials = study.get_trials(deepcopy=False)
        asked = [t for t in trials if "slopes_of" in t.user_attrs and t.user_attrs.get("failure") != INTERRUPTED]
        last = max((t.number for t in asked), default=-1)
        if any(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in asked):
            return None
        since = sum(t.number > last and t.state == TrialState.COMPLETE and rung_of(t) == 0 for t in trials)
        if since < STEPS_PER_SLOPES:
            return None
        front = sorted(self.beliefs.front(), key=self.menu.size)
        done = {tuple(self.beliefs.plan_of(t.params) or ()) for t in asked}
        stored = np.array([self.menu.least, *map(self.menu.size, front), self.menu.dense]) / self.menu.dense
        centres = np.array([self.menu.size(local.plan) for local in self.beliefs.locals])
        best: tuple[float, int] | None = None
        levels = np.array([self.beliefs.measured[tuple(plan)].level for plan in front])
        for i, plan in enumerate(front, start=1):
            found = self.beliefs.measured[tuple(plan)]
            if (levels[stored[1:-1] <= stored[i] + SLACK] < found.level - SURROGATE_ERROR).any():
                continue  # for hardly more storage there is something much better
            inside = float(self.goal.unit(np.array([found.values]))[0, self.goal.quality])
            nearby = int((np.abs(centres / self.menu.dense - stored[i]) < NEARBY).sum())
            gap = min(stored[i + 1] - stored[i - 1], WIDEST)
            gain = float(np.sqrt(min(inside, 1.0))) * gap / (1 + nearby) ** 2
            if tuple(plan) not in done and inside < 1 and (best is None or gain > best[0]):
                best = gain, found.trial
        return None if best is None else best[1]

    # -- proposing

    def _propose(self, tried: set[tuple[int, ...]], mode: str) -> list[int]:
        coefficients = self.beliefs.surrogate.sample() if mode == "sample" else self.beliefs.surrogate.mean
        front = self.beliefs.front()
        costs = self.menu.count
        priced = self.menu.weighed(list(self.random.dirichlet([1.0] * costs))) if costs > 1 else self.menu
        if mode == "newest":
            candidates = self._downhill(self.beliefs.locals[-1:], STRETCH, priced)
        elif mode == "any":
            candidates = self._downhill(self.beliefs.locals[-CENTRES:], FAR_STRETCH, priced)
            candidates += self._solutions(coefficients, priced)
        else:
            candidates = self._solutions(coefficients, priced)
            if front and (mode == "switch" or self.beliefs.poor):
                candidates += self._switches(front, coefficients, priced)
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

    def _solutions(self, coefficients: Coefficients, priced: Menu) -> list[list[int]]:
        """The corrected menu solved at budgets spread over the whole range, moved a little each time."""
        solved = self.beliefs.solver(coefficients, priced)
        shift = self.random.uniform()
        shares = (np.arange(BUDGETS) + shift) / BUDGETS
        return [solved.solve(priced.least + share * (priced.dense - priced.least)) for share in shares]

    def _downhill(self, centres: Sequence[Local], stretch: float, priced: Menu) -> list[list[int]]:
        """The slopes of ``centres``, solved at budgets around each."""
        found = []
        for local in centres:
            shares = np.array([1.0, *(1 + stretch * self.random.uniform(-1, 1, NEIGHBOURS))])
            found += self.beliefs.downhill(local, list(priced.size(local.plan) * shares), priced)
        return found

    def _switches(self, front: Sequence[list[int]], coefficients: Coefficients, priced: Menu) -> list[list[int]]:
        """Front members with one site moved to another option and a second one moved to stay within the budget."""
        found = []
        for _ in range(SWITCHES):
            plan = list(front[int(self.random.integers(len(front)))])
            budget = priced.size(plan)
            losses = self.beliefs.surrogate.losses(coefficients, self.menu.size(plan) / self.menu.dense)
            plan = self._step(plan)
            over = priced.size(plan) - budget
            best: tuple[float, int, int] | None = None
            for i in map(int, self.random.permutation(len(plan))[:PARTNERS]):
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

    def _gains(self, candidates: Sequence[list[int]], coefficients: Coefficients) -> np.ndarray:
        """Predicted gain in hypervolume of every candidate over the measured front, in units of the box."""
        values = self._values(candidates, coefficients)
        points, excess = self.goal.unit(values), self.goal.excess(values)
        measured = self.goal.unit(self.beliefs.met())
        ones = np.ones(self.goal.count)
        front = measured[moocore.is_nondominated(measured)] if len(measured) else measured
        before = moocore.hypervolume(front, ref=ones) if len(front) else 0.0
        gains = np.array([moocore.hypervolume(np.vstack([front, point]), ref=ones) - before for point in points])
        if excess.min() > 0:
            return -excess  # nothing is predicted to meet the limits: come as near to them as possible
        gains[excess > 0] = -1.0
        if gains.max() > 0:
            return gains
        # Nothing is predicted to gain: what the front dominates least, in every objective at once, may do so after all.
        depth = (points[:, None, :] - front[None, :, :]).min(2).max(1) if len(front) else points.max(1)
        behind: np.ndarray = depth + np.where(excess > 0, 1e6, 0.0)
        return -behind

    def _values(self, candidates: Sequence[list[int]], coefficients: Coefficients) -> np.ndarray:
        """Predicted objectives of every candidate, (N, d). Latency is what its table says, corrected by the trials and
        worse by the median error; the logarithm of a perplexity beside divergence rises in proportion to it; what
        nothing predicts is a line in what each method saves, fitted to the trials."""
        logs, errors = self.beliefs.levels(candidates, coefficients)
        logs = logs + PESSIMISM * errors
        values = np.full((len(candidates), self.goal.count), np.nan)
        for row, candidate in enumerate(candidates):
            values[row, self.goal.quality] = self.goal.loss(float(logs[row]))
            for column, value in self.goal.costs(self.menu.choices(candidate)).items():
                values[row, column] = value
        for column, (objective, timing) in self.goal.timed.items():
            trials = [(self.menu.choices(plan), known.values[column]) for plan, known in self.beliefs.measured.items()]
            table = timing.calibrated(objective, trials)
            ratios = [table.timing.ratio(objective, self.menu.choices(candidate)) for candidate in candidates]
            doubt = 0.0 if np.isnan(table.median) else table.median
            values[:, column] = [np.nan if ratio is None else ratio + doubt for ratio in ratios]
        if self.goal.perplexity is not None:
            column, dense = self.goal.perplexity
            values[:, column] = dense * np.exp(np.minimum(self.beliefs.excess_rate(column, dense) * np.exp(logs), 100))
        unknown = np.isnan(values).any(0)
        if unknown.any():
            plans = list(self.beliefs.measured)
            known = np.array([found.values for found in self.beliefs.measured.values()]).reshape(-1, self.goal.count)
            values[:, unknown] = fitted(
                savings(self.menu.even, plans), known[:, unknown], savings(self.menu.even, candidates)
            )
        return values


def ours(
    menu: Menu,
    space: Space,
    config: StudyConfig,
    dense: Row,
    origin: Mapping[str, str],
    timings: Timings | None = None,
) -> RankfrontSampler:
    """Our sampler for a study whose menu and dense model are measured."""
    places = {site.name: place for site, place in space.sites.items()}
    kinds = [places[line.site].kind for line in menu.lines]
    blocks = [-1 if (block := places[line.site].block) is None else block for line in menu.lines]
    options = {variable.name: variable.options for variable in space.variables if isinstance(variable, Single)}
    goal = make_goal(config, space, dense, origin["dtype"], timings)
    beliefs = Beliefs(menu, options, kinds, blocks, goal, config.search.seed, space.disjoint)
    return RankfrontSampler(beliefs, config.search.seed)
