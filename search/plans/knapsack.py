"""Multi-choice knapsacks: the plan of least predicted divergence within a budget, or within several at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankfront.methods import InputError
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.plans.regions import Merged
from rankfront.search.tuning import TUNING


def check_budget(menu: Menu, budget: float) -> None:
    """Raise `InputError` where nothing on the menu fits ``budget`` stored values."""
    if budget < menu.least:
        raise InputError(
            f"a budget of {budget:,.0f} is below the {menu.least:,} that every site at its cheapest option"
            " stores: raise the budget, or offer lower levels in space.keep"
        )


@dataclass(frozen=True)
class Sweep:
    """Every budget's optimum at once, from one dynamic program over units of storage.

    Attributes:
        menu: what was solved.
        merged: its regions, each as one line.
        unit: stored values per column.
        loss: the least predicted divergence within u units, (U + 1,), infinite where nothing fits.
        picks: the choice taken in each region for each budget, (regions, U + 1).
    """

    menu: Menu
    merged: tuple[Merged, ...]
    unit: int
    loss: np.ndarray
    picks: np.ndarray

    def solve(self, budget: float) -> Places:
        """The optimum within ``budget`` stored values; `InputError` where nothing fits."""
        check_budget(self.menu, budget)
        # Costs are rounded up to the grid, and so would be dense: its own budget is the last column.
        last = len(self.loss) - 1
        column = last if budget >= self.menu.dense else min(int(budget // self.unit), last)
        if not np.isfinite(self.loss[column]):  # rounding costs up to the grid can lose the very cheapest plans
            return self.menu.cheapest
        places = [0] * len(self.menu.lines)
        for region, picks in zip(reversed(self.merged), self.picks[::-1], strict=True):
            choice = int(picks[column])
            column -= ceil(int(region.costs[choice]) / self.unit)
            for member, place in zip(region.members, region.places[choice], strict=True):
                places[member] = int(place)
        return tuple(places)


def sweep(menu: Menu, losses: Sequence[np.ndarray] | None = None) -> Sweep:
    """Multi-choice knapsack for every budget by dynamic programming, over regions of sites that share no weight.

    f_i(u) = min_k f_{i−1}(u − c_ik) + d_ik. Exact where no two sites share a weight and the costs' greatest common
    divisor allows at most `Tuning.columns`; else costs are rounded up, so that plans stay within budget, and a
    region offers a limited number of combined choices (`Region.merge`). ``losses`` replace the menu's divergences,
    line by line.
    """
    used = [line.divergence for line in menu.lines] if losses is None else losses
    exact = gcd(*(int(cost) for line in menu.lines for cost in line.sizes))
    unit = exact * ceil(menu.dense / (exact * TUNING.columns))
    merged = tuple(
        region.merge([menu.lines[i].sizes for i in region.members], [used[i] for i in region.members], unit)
        for region in menu.regions
    )
    columns = sum(ceil(int(region.costs.max()) / unit) for region in merged) + 1
    loss = np.zeros(columns)
    picks = np.zeros((len(merged), columns), dtype=np.int16)
    for number, region in enumerate(merged):
        best = np.full(columns, np.inf)
        for choice, (cost, value) in enumerate(zip(region.costs, region.losses, strict=True)):
            shift = ceil(int(cost) / unit)
            candidate = loss[: columns - shift] + value
            better = candidate < best[shift:]
            best[shift:][better] = candidate[better]
            picks[number, shift:][better] = choice
        loss = best
    return Sweep(menu, merged, unit, loss, picks)


@dataclass(frozen=True)
class Budget:
    """A limit beside stored values: bytes, predicted latency.

    Attributes:
        costs: of every option, line by line, dense's 0 where they are changes; infinite ones are never taken.
        most: what the costs of a plan may come to, each weight counted once.
    """

    costs: Sequence[np.ndarray]
    most: float

    def room(self, menu: Menu) -> float:
        """What is left of it with every site dense."""
        alone = (cost[0] for line, cost in zip(menu.lines, self.costs, strict=True) if not line.weights)
        return self.most - float(sum(alone))

    @property
    def changes(self) -> np.ndarray:
        """What each option costs more than dense, all lines in a row."""
        return np.concatenate([cost - cost[0] for cost in self.costs])


def knapsack_several(
    menu: Menu,
    budget: float,
    others: Sequence[Budget] = (),
    losses: Sequence[np.ndarray] | None = None,
    gap: float = 0.0,
) -> Places:
    """The least predicted divergence within ``budget`` stored values, infinite or not, and all ``others``, by HiGHS.

    Exact where ``gap`` is 0, else at most that much worse, relative to the optimum. ``losses`` replace the menu's
    divergences, line by line; infinite ones are never taken. Raises `InputError` where no plan meets all budgets.
    """
    sizes = [len(line.options) for line in menu.lines]
    starts = np.cumsum([0, *sizes])[:-1]
    budgets = [Budget([line.sizes for line in menu.lines], budget), *others]
    changes = np.array([each.changes for each in budgets], dtype=float)  # (budgets, options)
    room = np.array([each.room(menu) for each in budgets])
    loss = np.concatenate([line.divergence for line in menu.lines] if losses is None else losses)
    offered = np.isfinite(loss) & np.isfinite(changes).all(0)
    changes, loss = np.where(offered, changes, 0.0), np.where(offered, loss, 0.0)
    tighter = room.copy()
    for attempt in range(TUNING.repairs):
        constraints = [*_one_each(menu), LinearConstraint(changes, -np.inf, tighter)]
        with _silent():
            found = milp(
                loss,
                constraints=constraints,
                integrality=np.ones(len(loss), dtype=int),
                bounds=Bounds(0, offered.astype(float)),
                # Presolving takes longer than the rest where near is enough.
                options={"mip_rel_gap": gap, "presolve": gap == 0},
            )
        if found.x is None:
            break
        places = tuple(int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=True))
        over = changes[:, starts + np.array(places)].sum(1) - room
        if (over <= 0).all():
            return places
        tighter -= 2**attempt * np.maximum(over, 0)  # the solver's tolerance let it through
    wanted = ", ".join(f"{each.most:,.6g}" for each in budgets if np.isfinite(each.most))
    raise InputError(f"no plan meets the budgets {wanted} together: raise one, or offer lower levels in space.keep")


def _one_each(menu: Menu) -> list[LinearConstraint]:
    """One option a line, and at most one treatment a weight."""
    sizes = [len(line.options) for line in menu.lines]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    total = len(rows)
    constraints = [LinearConstraint(csr_array((np.ones(total), (rows, np.arange(total)))), 1, 1)]
    treated = np.concatenate([np.arange(size) > 0 for size in sizes])
    for weight in dict.fromkeys(weight for line in menu.lines for weight in line.weights):
        claiming = np.array([weight in line.claims for line in menu.lines])
        constraints.append(LinearConstraint((claiming[rows] & treated).astype(float)[None], -np.inf, 1))
    return constraints


@contextmanager
def _silent() -> Iterator[None]:
    """Within, what C code prints is dropped: HiGHS 1.12 prints now and then though told not to (its issue 2783)."""
    kept = os.dup(1)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
