"""What slopes around one plan say of the whole menu: how much more or less options hurt in a compressed model.

    harm_i(o) = a_i(o) − a_i(dense) + κ b_i(o),    w_o = (λ d_i(o))² / variance_o
    f = (w Σ_o w_o harm_i(o) / (λ d_i(o)) / Σ_o w_o + 1 / τ²) / (w + 1 / τ²),    w = max_o w_o

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

from rankfront.search.optimise.taylor import SECOND, Local
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.slope_cost import OWN_LABELS

SPREAD = 0.5  # τ, of a factor around 1
MODEL, BEND = 0.5, 0.25  # of a predicted harm, and of κ b: what even exact slopes would miss of them, deviations
OVER_FISHER = 1 / OWN_LABELS  # variance of a slope a token, of that by the Fisher, 2 b; taken for KL too
BOUNDS = (0.25, 4.0)  # of a factor
WIDTH = 0.12  # kept fraction within which factors of one plan serve another
PRIOR = 0.1  # k₀: far from every plan factors fade to 1


@dataclass(frozen=True, eq=False)
class Context:
    """The factors that slopes around one plan gave.

    Attributes:
        share: the plan's size over the dense one.
        logs: log f of every (line, method), (F,).
    """

    share: float
    logs: np.ndarray


def context_of(local: Local, menu: Menu, features: Mapping[tuple[int, str], int]) -> Context | None:
    """The factors by the slopes of ``local``; ``features`` are the places of (line, method).

    None where the plan treats nothing, or taking it back would not lower the loss: then λ says nothing.
    """
    treated = [int(i) for i in np.flatnonzero(local.places)]
    removed = -sum(float(local.first[i][0]) for i in treated)
    alone = sum(float(menu.lines[i].divergence[local.places[i]]) for i in treated)
    if removed <= 0 or alone <= 0:
        return None
    lengths = [len(line.options) for line in menu.lines]
    own_dense = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)  # of every option, its line's first one
    options = [(i, option.method) for i, line in enumerate(menu.lines) for option in line.options]
    feature = np.array([features.get(key, -1) for key in options])  # dense has none
    a, b = np.concatenate(local.first), np.concatenate(local.second)
    bend = SECOND[0] * b
    harm = a - a[own_dense] + bend
    predicted = removed / alone * np.concatenate([line.divergence for line in menu.lines])
    noise = 2 * OVER_FISHER / local.tokens * (b + b[own_dense])
    variance = noise + (MODEL * predicted) ** 2 + (BEND * bend) ** 2
    known = np.isfinite(harm) & np.isfinite(variance) & (predicted > 0) & (feature >= 0)
    logs = np.log(_factors(harm[known], predicted[known], variance[known], feature[known], len(features)))
    return Context(menu.size(local.plan) / menu.dense, logs)


def _factors(
    harm: np.ndarray, predicted: np.ndarray, variance: np.ndarray, feature: np.ndarray, count: int
) -> np.ndarray:
    """f of all ``count`` pairs of line and method, (F,), from options whose pair is ``feature``, (K,) each: alike as
    they are, options of one pair say together what the surest says alone. 1 where nothing is known."""
    weights = predicted**2 / variance
    sure = np.zeros(count)
    np.maximum.at(sure, feature, weights)
    whole = np.maximum(np.bincount(feature, weights, count), np.finfo(float).tiny)
    mean = np.bincount(feature, weights * harm / predicted, count) / whole
    prior = 1 / SPREAD**2
    found: np.ndarray = np.clip((sure * mean + prior) / (sure + prior), *BOUNDS)
    return found


def factors_at(contexts: Sequence[Context], shares: np.ndarray, count: int) -> np.ndarray:
    """log f of every (line, method) for plans whose size is ``shares`` (T,) of dense, (T, ``count``)."""
    if not contexts:
        return np.zeros((len(shares), count))
    centres = np.array([context.share for context in contexts])
    near = np.exp(-0.5 * ((shares[:, None] - centres) / WIDTH) ** 2)  # (T, contexts)
    weights = near / (near.sum(1, keepdims=True) + PRIOR)
    mixed: np.ndarray = weights @ np.stack([context.logs for context in contexts])
    return mixed
