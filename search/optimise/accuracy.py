"""How well predictions made before each trial agree with what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankfront.search import attributes as keys
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig, quality_of
from rankfront.search.storage.front import Row, comparable, dense_row, front_of
from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Calibration:
    """How well the sampler's predictions, made before each trial, agree with what was measured.

    Attributes:
        trials: how many predictions there are.
        spearman, kendall: rank correlations of predicted and measured values, over plans of all sizes.
        at_size: Spearman's partial correlation given the size, for size alone orders plans of all sizes well; None
            where too few trials, or nearly none of the order but what size decides, are left to tell.
        front_error: median relative error of the predictions of front members.
        error: median error of the log-divergence predicted of the last `Tuning.recent` trials, measured or predicted
            below `Tuning.faint` counted as that.
    """

    trials: int
    spearman: float
    kendall: float
    at_size: float | None
    front_error: float
    error: float

    @property
    def poor(self) -> bool:
        """Whether the predictions are too poor to lean on: in their order, or in how much recent plans would hurt."""
        wrong = self.spearman < TUNING.poor_spearman or self.error > TUNING.poor_error
        return self.trials >= TUNING.least_predictions and wrong

    @property
    def brief(self) -> str:
        """The four figures that a status line has room for."""
        at_size = "" if self.at_size is None else f" (at a size {self.at_size:.2f})"
        front = "" if math.isnan(self.front_error) else f", front within {self.front_error:.1%}"
        return f"Spearman {self.spearman:.2f}{at_size}, Kendall {self.kendall:.2f}{front}"

    def __str__(self) -> str:
        at_size = "not to be told" if self.at_size is None else f"{self.at_size:.3f}"
        return (
            f"predicted against measured over {self.trials} trials: Spearman {self.spearman:.3f}, at comparable size"
            f" {at_size}, Kendall {self.kendall:.3f}, median error at the front {self.front_error:.1%}, of the"
            f" log-divergence of recent trials {self.error:.2f}"
            + (" (poor: trust the measured trials, not the predictions)" if self.poor else "")
        )


def calibration_of(config: StudyConfig, rows: Sequence[Row]) -> Calibration | None:
    """How well our sampler's predictions held in a study so far; None with another sampler, or too few of them."""
    return calibration(rows, quality_of(config)) if config.search.sampler == OURS else None


def calibration(rows: Sequence[Row], objective: str) -> Calibration | None:
    """The calibration of predictions of ``objective``; None below three predictions."""
    known = [row for row in comparable(rows, rung=0) if row.attributes.get(keys.PREDICTED) is not None]
    pairs = np.array([(row.attributes[keys.PREDICTED], row.values[objective]) for row in known]).reshape(-1, 2)
    if len(pairs) < 3 or len(np.unique(pairs[:, 0])) < 2 or len(np.unique(pairs[:, 1])) < 2:
        return None
    front = {row.plan_key for row in front_of(rows)}
    at_front = [abs(p / m - 1) for row, (p, m) in zip(known, pairs, strict=True) if row.plan_key in front]
    sizes = np.array([row.attributes.get(keys.BLOCK_PARAMETERS, math.nan) for row in known])
    return Calibration(
        trials=len(pairs),
        spearman=float(np.corrcoef(ranks_of(pairs[:, 0]), ranks_of(pairs[:, 1]))[0, 1]),
        kendall=kendall_tau(pairs[:, 0], pairs[:, 1]),
        at_size=_partial(pairs[:, 0], pairs[:, 1], sizes),
        front_error=float(np.median(at_front)) if at_front else math.nan,
        error=_recent_error(rows, pairs, objective),
    )


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of ``values`` (T,), the mean rank for equals."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return found


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's τ_b = (C − D) / √((P − P_x) (P − P_y)) of two sequences (T,), C pairs in the same order in both, D in
    opposite ones, P of all pairs, P_x and P_y those of equals."""
    orders = [np.sign(values[:, None] - values) for values in (x, y)]  # of every pair, (T, T)
    return float((orders[0] * orders[1]).sum() / math.sqrt(math.prod(float((order**2).sum()) for order in orders)))


def _partial(predicted: np.ndarray, measured: np.ndarray, sizes: np.ndarray) -> float | None:
    """Spearman's correlation of ``predicted`` and ``measured`` given ``sizes``, (T,) each: that of what is left of
    their ranks after a regression on the ranks of the sizes."""
    if len(sizes) < TUNING.least_predictions or not np.isfinite(sizes).all():
        return None
    ranks = np.array([ranks_of(values) for values in (predicted, measured, sizes)])
    ranks -= ranks.mean(1, keepdims=True)
    by_size = ranks[2] / max(float(ranks[2] @ ranks[2]), 1.0)
    left = ranks[:2] - np.outer(ranks[:2] @ ranks[2], by_size)  # (2, T)
    if ((left**2).sum(1) < TUNING.least_variance * (ranks[:2] ** 2).sum(1)).any():
        return None
    return float(left[0] @ left[1] / np.sqrt((left**2).sum(1).prod()))


def _recent_error(rows: Sequence[Row], pairs: np.ndarray, objective: str) -> float:
    """The median of |log D predicted − log D measured| over the last of ``pairs`` (T, 2) of ``objective``; NaN where
    the dense model, which perplexities are relative to, is not measured."""
    divergences = pairs[-TUNING.recent :]
    if objective == "perplexity":
        dense = dense_row(rows, rung=0)
        divergences = np.log(divergences / (dense.values[objective] if dense else math.nan))
    logs = np.log(np.maximum(divergences, TUNING.faint))
    return float(np.median(np.abs(logs[:, 0] - logs[:, 1])))
