"""Target budgets, which plans are solved for. A plan that stores a little less than what a limit will ask for wastes
what is between, so these are round kept fractions, and the most that the study's own limits allow."""

from __future__ import annotations

import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.tuning import TUNING

ROUNDING = 1e-6  # stored values; what floating point leaves below a whole number of them


def target_budgets(predictor: Predictor) -> np.ndarray:
    """Budgets in the menu's size, rising: `Tuning.round_fractions` of the first objective that options decide, and what
    the limits allow; none where several costs are weighed anew each time."""
    menu = predictor.menu
    if menu.count > 1:
        return np.zeros(0)
    budgets = np.floor(_budgets(predictor) + ROUNDING)
    found = {budget for budget in budgets.tolist() if menu.least <= budget <= menu.dense}
    if not all(predictor.may_meet(menu.decode(end)) for end in (menu.untreated, menu.cheapest)):
        solved = Lagrangian(menu)
        most = _most(predictor, solved)
        within = {budget for budget in found if predictor.may_meet(menu.decode(solved.solve(budget)))}
        found = {budget for budget in within if budget <= most} | ({most} if most < menu.dense else set()) or found
    return np.array(sorted(found), dtype=float)


def uses_up(size: float, targets: np.ndarray, slack: float) -> bool:
    """Whether the least of ``targets`` that allows a plan of ``size`` allows less than ``slack`` more."""
    return bool(targets[targets >= size].min(initial=np.inf) - size < slack)


def _budgets(predictor: Predictor) -> np.ndarray:
    """Sizes at which the objective is at `Tuning.round_fractions` of the dense model's: it is a straight line in the
    size."""
    menu, costs, rounded = predictor.menu, predictor.goal.costs, np.array(TUNING.round_fractions)
    dense, cheapest = costs(menu.decode(menu.untreated)), costs(menu.decode(menu.cheapest))
    column = min((column for column in dense if dense[column] > cheapest[column]), default=None)
    if column is None:
        return rounded * menu.dense
    shares = (rounded * dense[column] - cheapest[column]) / (dense[column] - cheapest[column])
    budgets: np.ndarray = menu.least + shares * (menu.dense - menu.least)
    return budgets


def _most(predictor: Predictor, solved: Lagrangian) -> float:
    """The largest size of a plan of the menu, ``solved`` for it, that may meet the study's limits; infinite where there
    is none."""
    menu = predictor.menu
    most, above = np.inf, float(menu.dense)
    for budget in np.linspace(menu.dense, menu.least, TUNING.limit_tries):
        plan = solved.solve(float(budget))
        if predictor.may_meet(menu.decode(plan)):
            most = menu.size(plan)
            break
        above = float(budget)
    for _ in range(TUNING.limit_halvings if np.isfinite(most) else 0):
        middle = (most + above) / 2
        plan = solved.solve(middle)
        most, above = (menu.size(plan), above) if predictor.may_meet(menu.decode(plan)) else (most, middle)
    return most
