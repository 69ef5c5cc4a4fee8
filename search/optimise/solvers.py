"""Solvers of what a predictor knows: the corrected menu at any budget, and steps along slopes around measured plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.knapsack import sweep
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING


class Solver(Protocol):
    """A menu, solved for any budget."""

    def solve(self, budget: float) -> Places:
        """The plan of least predicted divergence within ``budget`` stored values; `InputError` where nothing fits."""


def corrected(predictor: Predictor, menu: Menu | None = None) -> Solver:
    """The predictor's menu, as corrected by what the trials taught, for any budget.

    ``menu`` is the same with its costs weighed otherwise; budgets are in its size.
    """
    priced = menu or predictor.menu
    if predictor.surrogate.terms.corrections:
        return _Banded(predictor, priced)
    return sweep(priced, predictor.surrogate.losses())


class _Banded:
    """The corrected menu where what options hurt depends on the size of the plan: solved for bands of it."""

    def __init__(self, predictor: Predictor, priced: Menu) -> None:
        self.predictor, self.priced = predictor, priced
        self._solved: dict[int, Lagrangian] = {}

    def solve(self, budget: float) -> Places:
        """By the losses of the nearest of `bands` shares of the dense size; where costs are weighed otherwise, the
        size of a plan is known once it is solved for, so that it is solved for again."""
        menu = self.predictor.menu
        share, places = budget / self.priced.dense, self.priced.cheapest
        for _ in range(TUNING.band_rounds):
            places = self._band(round(share * TUNING.bands)).solve(budget)
            before, share = share, menu.size(places) / menu.dense
            if round(before * TUNING.bands) == round(share * TUNING.bands):
                break
        return places

    def _band(self, band: int) -> Lagrangian:
        if band not in self._solved:
            losses = self.predictor.surrogate.losses(band / TUNING.bands)
            self._solved[band] = Lagrangian(self.priced, losses)
        return self._solved[band]


def downhill(
    predictor: Predictor, taylor: TaylorModel, budgets: Sequence[float], menu: Menu | None = None
) -> list[Places]:
    """The slopes of ``taylor``, solved at ``budgets`` in the size of ``menu`` (the predictor's), by steps of
    `Tuning.lengths`."""
    priced = menu or predictor.menu
    scaling = predictor.scalings[predictor.history.taylor_models.index(taylor)]
    solved, _, promised = damped(taylor, scaling, priced, np.geomspace(*TUNING.dampings))
    reached = [np.flatnonzero(promised >= length) for length in TUNING.lengths]  # the last: the shortest step
    chosen = dict.fromkeys(int(places[-1]) for places in reached if len(places)) or {0: None}
    within = [min(max(budget, priced.least), priced.dense) for budget in budgets]
    return [solved[place].solve(budget) for place in chosen for budget in within]


def nearby(predictor: Predictor, budgets: Sequence[float]) -> list[Places]:
    """Steps downhill to ``budgets`` of stored values from the references nearest to the first of them."""
    models, menu = predictor.history.taylor_models, predictor.menu
    by_distance = sorted(models, key=lambda taylor: abs(menu.size(taylor.places) - budgets[0]))
    return [plan for taylor in by_distance[: TUNING.nearest] for plan in downhill(predictor, taylor, budgets)]


def damped(
    taylor: TaylorModel, scaling: Scaling, menu: Menu, dampings: np.ndarray
) -> tuple[list[Lagrangian], list[Places], np.ndarray]:
    """The slopes of ``taylor`` under each of ``dampings``: what solves them, the step at the reference's own size, and
    the share of the reference's divergence that it promises by that damping."""
    solved = [Lagrangian(menu, taylor.losses(scaling, damping)) for damping in dampings]
    own = max(menu.size(taylor.places), menu.least)
    steps = [one.solve(own) for one in solved]
    a, b = taylor.sums(np.array(steps))
    return solved, steps, -(scaling.first * a + dampings * scaling.second * b) / taylor.divergence
