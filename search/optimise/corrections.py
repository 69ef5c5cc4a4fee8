"""Correction factors of the menu by slopes around one plan: how much more or less options hurt in a compressed model.

    increase_i(o) = a_i(o) − a_i(dense) + κ b_i(o),    w_o = (λ d_i(o))² / variance_o
    f = (w Σ_o w_o increase_i(o) / (λ d_i(o)) / Σ_o w_o + 1 / τ²) / (w + 1 / τ²),    w = max_o w_o

a and b are the slopes around a plan (see `slopes`), d the menu's divergence of each option alone, λ what makes both
add up to the same over the plan, f one factor for each (site, method). A menu is measured around the dense model, and
what a site does there alone is not what it does among others that are compressed too; slopes say the latter of every
site at once, treated or not. Factors of several plans are averaged by how near their size is to that of the plan that
is asked about:

    log f(s) = Σ_c k((s − s_c) / width) log f_c / (Σ_c k((s − s_c) / width) + k₀),    k Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankfront.search.optimise.taylor import TaylorModel
from rankfront.search.plans.menu import Menu
from rankfront.search.tuning import TUNING


@dataclass(frozen=True, eq=False)
class Corrections:
    """The factors that slopes around one plan gave.

    Attributes:
        share: the plan's size over the dense one.
        logs: log f of every (line, method), (F,).
    """

    share: float
    logs: np.ndarray


def corrections_of(taylor: TaylorModel, menu: Menu, features: Mapping[tuple[int, str], int]) -> Corrections | None:
    """The factors by the slopes of ``taylor``; ``features`` are the places of (line, method).

    None where the plan treats nothing, or taking it back would not lower the loss: then λ says nothing.
    """
    treated = [int(i) for i in np.flatnonzero(taylor.places)]
    removed = -sum(float(taylor.first[i][0]) for i in treated)
    alone = sum(float(menu.lines[i].divergence[taylor.places[i]]) for i in treated)
    if removed <= 0 or alone <= 0:
        return None
    options = [(i, option.method) for i, line in enumerate(menu.lines) for option in line.options]
    feature = np.array([features.get(key, -1) for key in options])  # dense has none
    bend = TUNING.second_order[0] * np.concatenate(taylor.second)
    increase = np.concatenate([a - a[0] for a in taylor.first]) + bend  # over dense, each line's first option
    predicted = removed / alone * np.concatenate([line.divergence for line in menu.lines])
    # The variance of a slope a token over that by the Fisher, 2 b, is 1 / `own_labels`; taken for KL too.
    noise = 2 / TUNING.own_labels / taylor.tokens * np.concatenate([b + b[0] for b in taylor.second])
    variance = noise + (TUNING.increase_error * predicted) ** 2 + (TUNING.bend_error * bend) ** 2
    known = np.isfinite(increase) & np.isfinite(variance) & (predicted > 0) & (feature >= 0)
    logs = np.log(_factors(increase[known], predicted[known], variance[known], feature[known], len(features)))
    return Corrections(menu.size(taylor.places) / menu.dense, logs)


def _factors(
    increase: np.ndarray, predicted: np.ndarray, variance: np.ndarray, feature: np.ndarray, count: int
) -> np.ndarray:
    """f of all ``count`` pairs of line and method, (F,), from options whose pair is ``feature``, (K,) each: alike as
    they are, options of one pair say together what the surest says alone. 1 where nothing is known."""
    weights = predicted**2 / variance
    sure = np.zeros(count)
    np.maximum.at(sure, feature, weights)
    whole = np.maximum(np.bincount(feature, weights, count), np.finfo(float).tiny)
    mean = np.bincount(feature, weights * increase / predicted, count) / whole
    prior = 1 / TUNING.factor_deviation**2
    found: np.ndarray = np.clip((sure * mean + prior) / (sure + prior), *TUNING.factor_bounds)
    return found


def factors_at(corrections: Sequence[Corrections], shares: np.ndarray, count: int) -> np.ndarray:
    """log f of every (line, method) for plans whose size is ``shares`` (T,) of dense, (T, ``count``)."""
    if not corrections:
        return np.zeros((len(shares), count))
    references = np.array([one.share for one in corrections])
    near = np.exp(-0.5 * ((shares[:, None] - references) / TUNING.factor_width) ** 2)  # (T, corrections)
    weights = near / (near.sum(1, keepdims=True) + TUNING.factor_prior)
    mixed: np.ndarray = weights @ np.stack([one.logs for one in corrections])
    return mixed
