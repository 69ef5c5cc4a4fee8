"""What a proposal is chosen by: the predicted gain in hypervolume over the measured front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import moocore
import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING

LARGEST = 100  # nats of excess loss that a perplexity is predicted of at most: beyond, exp overflows
FAR = 1e6  # boxes; what misses a limit is behind everything that meets it


class Acquisition:
    """Chooses among candidates by what ``predictor`` expects of them."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.menu, self.goal = predictor.menu, predictor.goal

    def best(self, candidates: Mapping[Places, float]) -> Places:
        """The one that gains most by prediction, each worse by so many standard deviations (the winner's curse); where
        none gains, that which is nearest to it.

        Plans smaller than anything measured need no pessimism: there is nothing that they would have to be better than.
        """
        plans, pessimism = list(candidates), np.array(list(candidates.values()))
        sizes = map(self.menu.size, self.predictor.history.measured)
        least = min(sizes, default=0) - TUNING.slack * self.menu.dense
        pessimism[[self.menu.size(plan) < least for plan in plans]] = 0.0
        values = self.values(plans, pessimism)
        gains = self.gains(values)
        return plans[int(gains.argmax() if gains.max() > 0 else self.behind(values).argmin())]

    def gains(self, values: np.ndarray) -> np.ndarray:
        """Gain in hypervolume over the measured front, in units of the box, of plans with objectives ``values``
        (N, d), (N,); -1 where limits are missed."""
        points, front, ones = self.goal.unit(values), self._front(), np.ones(self.goal.count)
        before = moocore.hypervolume(front, ref=ones) if len(front) else 0.0
        gains = np.array([moocore.hypervolume(np.vstack([front, point]), ref=ones) - before for point in points])
        gains[self.goal.excess(values) > 0] = -1.0
        return gains

    def behind(self, values: np.ndarray) -> np.ndarray:
        """How far plans with objectives ``values`` (N, d) are from a gain, (N,): from meeting the limits where none
        does, else from what the front dominates least, in every objective at once."""
        points, front, excess = self.goal.unit(values), self._front(), self.goal.excess(values)
        if excess.min() > 0:
            return excess
        depth = (points[:, None, :] - front[None, :, :]).min(2).max(1) if len(front) else points.max(1)
        behind: np.ndarray = depth + np.where(excess > 0, FAR, 0.0)
        return behind

    def _front(self) -> np.ndarray:
        """The non-dominated of the measured plans that meet the limits, in units of the box."""
        measured = self.goal.unit(self.predictor.history.met())
        return measured[moocore.is_nondominated(measured)] if len(measured) else measured

    def values(self, candidates: Sequence[Places], pessimism: np.ndarray) -> np.ndarray:
        """Predicted objectives of every candidate, (N, d), its log-divergence worse by ``pessimism`` (N,) standard
        deviations.

        Latency is what its table says, corrected by the trials and worse by the median error; the logarithm of a
        perplexity beside divergence rises in proportion to it; what nothing predicts is a line in what each method
        saves, fitted to the trials.
        """
        goal, history = self.goal, self.predictor.history
        plans = [self.menu.decode(candidate) for candidate in candidates]
        logs, errors = self.predictor.levels(candidates)
        logs = logs + pessimism * errors
        values = np.full((len(candidates), goal.count), np.nan)
        for row, plan in enumerate(plans):
            values[row, goal.quality] = goal.loss(float(logs[row]))
            for column, value in goal.costs(plan).items():
                values[row, column] = value
        for column, (objective, timing) in goal.timed.items():
            trials = [(self.menu.decode(places), known.values[column]) for places, known in history.measured.items()]
            table = timing.calibrated(objective, trials)
            ratios = [table.timing.ratio(objective, plan) for plan in plans]
            values[:, column] = np.array(ratios, dtype=float) + np.nan_to_num(table.median)
        if goal.perplexity is not None:
            column, dense = goal.perplexity
            excess = history.excess_rate(column, dense) * np.exp(logs)
            values[:, column] = dense * np.exp(np.minimum(excess, LARGEST))
        unknown = np.isnan(values).any(0)
        if unknown.any():
            saved = [savings(self.menu.even, each) for each in (list(history.measured), candidates)]
            values[:, unknown] = fitted(saved[0], history.values[:, unknown], saved[1])
        return values


def savings(menu: Menu, plans: Sequence[Sequence[int]]) -> np.ndarray:
    """s (N, M) of plans, given as places in the menu, by the methods in alphabetical order."""
    methods = sorted({option.method for line in menu.lines for option in line.options[1:]})
    found = np.zeros((len(plans), len(methods)))
    for row, plan in enumerate(plans):
        for line, place in zip(menu.lines, plan, strict=True):
            if place:
                found[row, methods.index(line.options[place].method)] += line.sizes[0] - line.sizes[place]
    return found / menu.dense


def fitted(known: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Values (K, ...) of plans that save ``asked`` (K, M), from those (N, ...) measured of plans that save ``known``
    (N, M), of objectives that nothing predicts from a plan; ones where nothing was measured.

        y(plan) = y₀ + Σ_m (a + a_m) s_m,    s_m = size that method m saves in the plan, over the dense model's

    FLOPs, the cache's bytes and resident bytes fall in proportion to the size that one method takes off a weight, and
    by another's not at all. a is common to all methods, so that one which no trial has used is taken for an average
    one: the ridge lies on it lightly, on each a_m more.
    """
    if not len(values):
        return np.ones((len(asked), *values.shape[1:]))

    def design(saved: np.ndarray) -> np.ndarray:
        return np.hstack([np.ones((len(saved), 1)), saved.sum(1, keepdims=True), saved])

    x = design(known)
    ridge = np.diag([0.0, TUNING.ridges[0], *[TUNING.ridges[1]] * known.shape[1]])
    found: np.ndarray = design(asked) @ np.linalg.lstsq(x.T @ x + ridge, x.T @ values, rcond=None)[0]
    return found
