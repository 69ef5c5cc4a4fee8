"""Objectives that nothing predicts from a plan: a straight line in what each method saves, fitted to the trials.

    y(plan) = y₀ + Σ_m (a + a_m) s_m,    s_m = stored size that method m saves in the plan, over the dense model's.

FLOPs, the cache's bytes and resident bytes fall in proportion to the size that one method takes off a weight, and by
another's not at all. a is common to all methods, so that one which no trial has used is taken for an average one: the
ridge lies on it lightly, on each a_m more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfront.search.plans.menu import Menu
from rankfront.search.tuning import TUNING


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
    (N, M); ones where nothing was."""
    if not len(values):
        return np.ones((len(asked), *values.shape[1:]))

    def design(saved: np.ndarray) -> np.ndarray:
        return np.hstack([np.ones((len(saved), 1)), saved.sum(1, keepdims=True), saved])

    x = design(known)
    ridge = np.diag([0.0, TUNING.ridges[0], *[TUNING.ridges[1]] * known.shape[1]])
    found: np.ndarray = design(asked) @ np.linalg.lstsq(x.T @ x + ridge, x.T @ values, rcond=None)[0]
    return found
