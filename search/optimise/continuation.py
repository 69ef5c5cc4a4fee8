"""Continuation: from near dense to smaller plans in short steps, with slopes measured anew at every stop.

    p₀ = the menu's plan of size s₀,    p_{k+1} = argmin Σ_i α ā_i(o_i) + κ b̄_i(o_i)    over plans of size s_{k+1}

with ā and b̄ the slopes around p_k, those of earlier stops mixed in:

    ā_i(o) = Σ_j w_j (a^j_i(o) − a^j_i(p_k)) / Σ_j w_j,    w_j = (1 − n / `POOLED`)^(k − j),

n the tokens of a stop's slopes, and b̄ likewise over the stops with the same option at site i. What a menu says of
options alone is not what they do together; of a short step slopes say it well, whatever the steps before it have come
to, and what one step gets wrong the next one sees. What that gains over the menu is in studies/results/paths.md. Below
`END` steps around measured plans have come as far for their tokens, in runs on smollm2-135m.

Source: numerical continuation, Allgower & Georg (2003), chapter 2, its predictor alone; pruning in steps rather than at
once, Zhu & Gupta (1710.01878). Ours is the application to plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.solvers import corrected
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.plans.space import Space

START, END = 0.95, 0.7  # kept fractions
ROUNDING = 1e-6  # stored values: a target at `START` is rounded down too, and no stop below it
STEP = 0.025  # between stops, at most
POOLED = 5120  # tokens that the slopes of several stops come to together
FEWEST = 1536  # tokens of a stop; with 1,024 the plan at 0.9 is worse than the menu's (paths.md)
SHARE = 0.3  # of what a study has spent: the cost of a path
MORE = 2  # times the tokens of the path before, for another to be worth its own
PATH = keys.PATH  # origin of the plans that are measured along one, and the attribute of its stops that numbers it


def stops(start: float, targets: Sequence[float], step: float) -> list[float]:
    """Sizes from ``start`` down to the least of ``targets``, at most ``step`` apart; ``targets`` are among them."""
    ends = [start, *sorted((target for target in targets if target < start), reverse=True)]
    found = [start]
    for high, low in pairwise(ends):
        count = math.ceil((high - low) / step - 1e-6)
        found += [high - (high - low) * i / count for i in range(1, count)] + [low]
    return found


def pooled(path: Sequence[TaylorModel]) -> TaylorModel:
    """The slopes of the last of ``path``, those of the stops before it mixed in."""
    now = path[-1]
    fading = max(1 - now.tokens / POOLED, 0.0)
    weights = np.array([fading**age for age in reversed(range(len(path)))])
    first, second = [], []
    for i, place in enumerate(now.places):
        alike = weights * [one.places[i] == place for one in path]
        first.append(_mean([one.first[i] - one.first[i][place] for one in path], weights))
        second.append(_mean([one.second[i] for one in path], alike))
    return replace(now, first=first, second=second)


def _mean(values: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Weighted; what has no weight does not count, infinite or not."""
    counted = [weight * value for weight, value in zip(weights, values, strict=True) if weight]
    mean: np.ndarray = np.sum(counted, axis=0) / weights.sum()
    return mean


def next_plan(path: Sequence[TaylorModel], menu: Menu, size: float) -> Places:
    """The plan of ``size`` in the menu's that slopes along ``path`` promise to lose least; `InputError` where nothing
    is as small."""
    return Lagrangian(menu, pooled(path).losses(Scaling.prior())).solve(size)


@dataclass(frozen=True, eq=False)
class Paths:
    """Queues the stops of paths, one after the other. The study's storage is its only state.

    The first path is begun once it costs no more than `SHARE` of what was spent, each later one when it can read `MORE`
    times as much. A path ends early where slopes fail.

    Attributes:
        study: where trials are queued.
        space: what they draw from.
        predictor: of our sampler.
        targets: sizes at which plans on a path are measured, if they may meet the study's limits; where it ends.
        enqueue: queues a trial by origin, label and draws, unless one of the same was measured or waits; its number.
    """

    study: optuna.Study
    space: Space
    predictor: Predictor
    targets: Sequence[float]
    enqueue: Callable[[str, str, Mapping[str, int | str]], int]

    @cached_property
    def sizes(self) -> list[float]:
        """Where a path stops; nowhere without targets between `START` and `END`."""
        even = self.predictor.menu.even
        start, least = math.floor(START * even.dense + ROUNDING), max(math.floor(END * even.dense), even.least)
        solved = corrected(self.predictor, menu=even)
        within = [target for target in self.targets if least <= target < start]
        reachable = [target for target in within if self.predictor.may_meet(even.decode(solved.solve(target)))]
        return stops(start, reachable, STEP * even.dense) if reachable else []

    def advance(self, spent: int, passes: int, readable: int, left: np.ndarray, trial: int) -> bool:
        """Queue the next stop, if one is due; whether it is.

        ``spent`` are the study's tokens, slopes cost ``passes`` tokens for each of at most ``readable`` that they read,
        a trial costs ``trial``, and limits leave so many trials and tokens, (2,), beside those that run.
        """
        if not self.sizes:
            return False
        trials = self.study.get_trials(deepcopy=False)
        asked = [t for t in trials if PATH in t.user_attrs and not is_void(t.user_attrs)]
        if not all(t.state.is_finished() for t in asked):
            return False
        self._again(trials, asked)
        number = max((t.user_attrs[PATH] for t in asked), default=0)
        on_it = [t for t in asked if t.user_attrs[PATH] == number]
        tokens = int(on_it[0].user_attrs[keys.SLOPE_TOKENS]) if on_it else 0
        if not on_it or len(on_it) == len(self.sizes) or any(keys.FAILURE in t.user_attrs for t in on_it):
            least = max(FEWEST, MORE * tokens)
            tokens = min(int(SHARE * spent / (passes * len(self.sizes))), readable)
            trials_on_it = 1 + sum(size in self.targets for size in self.sizes[1:])
            whole = trials_on_it, passes * tokens * len(self.sizes) + trial * trials_on_it
            if tokens < least or (left < whole).any():
                return False
            number, on_it = number + 1, []
        if (left < (1, passes * tokens + trial)).any():
            return False
        self._stop(number, tokens, on_it)
        return True

    def _again(self, trials: Sequence[FrozenTrial], asked: Iterable[FrozenTrial]) -> None:
        """Queue the plans at targets of the stops ``asked`` that were interrupted, unless they wait already."""
        for stop in asked:
            reference = stop.user_attrs[keys.SLOPES_OF]
            if reference is not None and is_void(trials[reference].user_attrs):
                self.enqueue(PATH, trials[reference].user_attrs[keys.LABEL], stop.params)

    def _stop(self, number: int, tokens: int, before: Sequence[FrozenTrial]) -> None:
        """Queue slopes at the stop after those ``before`` it, and at a target its plan first."""
        even, size = self.predictor.menu.even, self.sizes[len(before)]
        found = self.predictor.history.along(before)
        places = next_plan(found, even, size) if found else corrected(self.predictor, menu=even).solve(size)
        chosen = even.decode(places)
        draws, reference = self.space.encode(chosen), None
        if before and size in self.targets and self.predictor.may_meet(chosen):
            reference = self.enqueue(PATH, f"{number}, keep={size / even.dense:.3g}", draws)
        attributes = {keys.ORIGIN: keys.SLOPES, keys.SLOPES_OF: reference, PATH: number, keys.SLOPE_TOKENS: tokens}
        self.study.enqueue_trial(draws, user_attrs=attributes)
