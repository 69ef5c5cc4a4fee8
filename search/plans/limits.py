"""Limits as budgets: what every option of a menu adds to each figure that may be limited, so that a solver keeps them.

Every such figure is a straight line in the options: with f that of the dense model,

    f(plan) = f + Σ_i (f_i(o_i) − f_i(dense)),

stored values and bytes exactly, latency as its table predicts it, corrected by the trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankfront.methods import DENSE_OPTION, Cost, Option, Site
from rankfront.search.constraint import Constraint
from rankfront.search.plans.knapsack import Budget
from rankfront.search.plans.latency_table import Timings
from rankfront.search.plans.menu import Menu, stored
from rankfront.search.plans.plan import Plan, Prices

COSTS = ("parameters", "block_parameters", "parameter_count", "bytes")  # figures that a plan alone decides
FINE = 1e9  # units of a dense model's latency that budgets count in; solvers' tolerances are absolute


@dataclass(frozen=True)
class Figures:
    """What plans on a menu come to in every figure that a limit may be on.

    Attributes:
        menu: it.
        prices: what its plans cost.
        tables: the latencies among the objectives that have a table, as the trials corrected it.
    """

    menu: Menu
    prices: Prices
    tables: Timings

    @property
    def names(self) -> tuple[str, ...]:
        """What can be limited."""
        return (*COSTS, *self.tables)

    def of(self, plan: Plan) -> dict[str, float]:
        """Every figure of a plan: `COSTS` exactly, latencies predicted; NaN where an option was not timed."""
        exact = exact_figures(self.prices.of(plan))
        ratios = {name: timing.ratio(objective, plan) for name, (objective, timing) in self.tables.items()}
        timed = {name: np.nan if ratio is None else ratio for name, ratio in ratios.items()}
        return exact | timed

    def budgets(self, limits: Sequence[Constraint]) -> list[Budget]:
        """Those of ``limits`` that are on these figures, for a solver: no plan within these budgets misses them."""
        return [self._budget(limit) for limit in limits if limit.figure in self.names]

    def size(self, limits: Sequence[Constraint]) -> float | None:
        """What ``limits`` together allow a plan to store, in the menu's size; None where one of those that are on these
        figures is not a straight line in it."""
        saved = np.concatenate([line.sizes[0] - line.sizes for line in self.menu.lines])
        most = float(self.menu.dense)
        for budget in self.budgets(limits):
            rate = -float(budget.changes.sum()) / max(float(saved.sum()), 1.0)  # of the figure, for each value stored
            if rate <= 0 or not np.array_equal(budget.changes, -rate * saved):
                return None
            most = min(most, self.menu.dense + budget.room / rate)
        return most

    def _budget(self, limit: Constraint) -> Budget:
        sign = 1 if limit.operator.startswith("<") else -1
        if limit.figure in self.tables:
            changes, dense, most = self._latencies(limit.figure), FINE, FINE * limit.bound - sign
        else:
            changes, dense, scale = self._counts(limit.figure)
            most = round(limit.bound * scale)
            while limit.missed(most / scale):
                most -= sign
        return Budget(sign * np.concatenate(changes), sign * (most - dense))

    def _counts(self, figure: str) -> tuple[list[np.ndarray], int, float]:
        """(What each option adds to what the figure counts, line by line; that of dense; its count where it is 1).

        Index bits are rounded up option by option, and so never less than in the plan.
        """
        dense = self.prices.of(Plan(()))
        of_dense, scale = {
            "parameters": (dense.values, dense.dense_values),
            "block_parameters": (dense.block_values, dense.dense_block_values or 1),
            "parameter_count": (dense.values, 1),
            "bytes": (dense.bytes, 1),
        }[figure]
        by_name = {site.name: site for site in self.prices.sites}

        changes = []
        for line in self.menu.lines:
            treated = [
                sum(added(figure, by_name[site], o, self.prices) for site in line.members if o != DENSE_OPTION)
                for o in line.options
            ]
            changes.append(np.array(treated, dtype=float))
        return changes, of_dense, scale

    def _latencies(self, figure: str) -> list[np.ndarray]:
        """What each option adds to the predicted latency, line by line; infinite where it was not timed."""
        objective, timing = self.tables[figure]
        ratios = [[timing.ratio(objective, Plan.of(line.treated(o))) for o in line.options] for line in self.menu.lines]
        return [np.array([np.inf if ratio is None else FINE * (ratio - 1) for ratio in own]) for own in ratios]


def exact_figures(cost: Cost) -> dict[str, float]:
    """`COSTS` of a plan, by name."""
    found = (cost.parameters, cost.block_parameters, cost.values, cost.bytes)
    return dict(zip(COSTS, map(float, found), strict=True))


def added(figure: str, site: Site, option: Option, prices: Prices) -> int:
    """What an option adds to what a figure of `COSTS` counts: values, or bytes."""
    own, before = stored(site, option), stored(site, DENSE_OPTION)
    if figure == "bytes":
        return own.bytes(prices.value_bytes) - before.bytes(prices.value_bytes)
    return 0 if figure == "block_parameters" and not prices.sites[site] else own.parameters - before.parameters


def met(limits: Sequence[Constraint], known: Mapping[str, float]) -> bool:
    """Whether ``known`` figures keep ``limits``; what is not known, only measuring tells."""
    return not any(limit.missed(known[limit.figure]) for limit in limits if limit.figure in known)
