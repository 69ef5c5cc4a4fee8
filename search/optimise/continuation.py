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
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.solvers import corrected
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places

START, END = 0.95, 0.7  # kept fractions; guess, the end by runs on smollm2-135m that are not kept
ROUNDING = 1e-6  # stored values: a target at `START` is rounded down too, and no stop below it
STEP = 0.025  # between stops, at most; guess
POOLED = 5120  # tokens that the slopes of several stops come to together; guess


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


def path_sizes(predictor: Predictor, targets: Sequence[float]) -> list[float]:
    """Where a path stops on its way to the ``targets`` that the study's limits allow; nowhere without any between
    `START` and `END`."""
    even = predictor.menu.even
    start, least = math.floor(START * even.dense + ROUNDING), max(math.floor(END * even.dense), even.least)
    solved = corrected(predictor, menu=even)
    within = [target for target in targets if least <= target < start]
    reachable = [target for target in within if predictor.may_meet(even.decode(solved.solve(target)))]
    return stops(start, reachable, STEP * even.dense) if reachable else []
