"""Solvers of what a predictor knows: the corrected menu at any budget, and steps along slopes around measured plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING


def corrected(predictor: Predictor, budget: float, priced: Menu) -> Places:
    """The plan of nearly least divergence within ``budget`` by the predictor's menu as the trials corrected it.

    ``priced`` is that menu, or the same with its costs weighed, and ``budget`` in its size. What options hurt depends
    on the plan's own size: where costs are weighed that is known once it is solved for, so that it is solved for again.
    """
    share, places = budget / priced.dense, priced.cheapest
    for _ in range(TUNING.share_rounds if predictor.menu.count > 1 else 1):
        places = Lagrangian(priced, predictor.surrogate.losses(share)).solve(budget)
        share = predictor.menu.size(places) / predictor.menu.dense
    return places


def downhill(predictor: Predictor, taylor: TaylorModel, budgets: Sequence[float], priced: Menu) -> list[Places]:
    """The slopes of ``taylor``, solved at ``budgets`` in the size of ``priced``, by steps of `Tuning.lengths`."""
    scaling = predictor.scalings[predictor.history.taylor_models.index(taylor)]
    solved, _, promised = damped(taylor, scaling, priced, np.geomspace(*TUNING.dampings))
    reached = [np.flatnonzero(promised >= length) for length in TUNING.lengths]  # the last: the shortest step
    chosen = dict.fromkeys(int(places[-1]) for places in reached if len(places)) or {0: None}
    within = np.clip(budgets, priced.least, priced.dense)
    return [solved[place].solve(budget) for place in chosen for budget in within]


def nearby(predictor: Predictor, budgets: Sequence[float]) -> list[Places]:
    """Steps downhill to ``budgets`` of stored values from the references nearest to the first of them."""
    models, menu = predictor.history.taylor_models, predictor.menu
    by_distance = sorted(models, key=lambda taylor: abs(menu.size(taylor.places) - budgets[0]))
    return [plan for taylor in by_distance[: TUNING.nearest] for plan in downhill(predictor, taylor, budgets, menu)]


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
