"""Allocators: (menu, budget) -> plan. Every one meets its budget exactly or below, never above."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankfront.methods import InputError
from rankfront.search.menu import Line, Menu

MAX_UNITS = 2**17  # columns of the dynamic program; finer budgets are rounded up to this grid, costs with them
Places = list[int]


def _check(menu: Menu, budget: float) -> None:
    if budget < menu.least:
        raise InputError(
            f"a budget of {budget:,.0f} parameters is below the {menu.least:,} that every site at its cheapest option"
            " stores: raise the budget, or offer lower levels in space.keep"
        )


@dataclass(frozen=True)
class Sweep:
    """Every budget's optimum at once, from one dynamic program over units of storage.

    Attributes:
        menu: what was solved.
        unit: stored values per column.
        loss: the least predicted divergence within u units, (U + 1,), infinite where nothing fits.
        picks: the option taken at each site for each budget, (sites, U + 1).
    """

    menu: Menu
    unit: int
    loss: np.ndarray
    picks: np.ndarray

    def solve(self, budget: float) -> Places:
        """The optimum within ``budget`` stored values; `InputError` where nothing fits."""
        _check(self.menu, budget)
        # Costs are rounded up to the grid, and so would be dense: its own budget is the last column.
        last = len(self.loss) - 1
        column = last if budget >= self.menu.dense else min(int(budget // self.unit), last)
        if not np.isfinite(self.loss[column]):  # rounding costs up to the grid can lose the very cheapest plans
            return [int(line.parameters.argmin()) for line in self.menu.lines]
        places = []
        for line, picks in zip(reversed(self.menu.lines), self.picks[::-1], strict=True):
            place = int(picks[column])
            places.append(place)
            column -= ceil(line.parameters[place] / self.unit)
        return places[::-1]


def sweep(menu: Menu, losses: Sequence[np.ndarray] | None = None) -> Sweep:
    """Exact multi-choice knapsack for every budget by dynamic programming.

    f_i(u) = min_k f_{i−1}(u − c_ik) + d_ik. Exact where the costs' greatest common divisor allows at most
    `MAX_UNITS` columns; else costs are rounded up, so that plans stay within budget. ``losses`` replace the
    menu's divergences, line by line.
    """
    costs = np.concatenate([line.parameters for line in menu.lines])
    exact = gcd(*(int(cost) for cost in costs))
    unit = exact * ceil(menu.dense / (exact * MAX_UNITS))
    columns = sum(ceil(int(line.parameters[0]) / unit) for line in menu.lines) + 1
    loss = np.zeros(columns)
    picks = np.zeros((len(menu.lines), columns), dtype=np.int16)
    for number, line in enumerate(menu.lines):
        best = np.full(columns, np.inf)
        values = line.divergence if losses is None else losses[number]
        for place, (cost, value) in enumerate(zip(line.parameters, values, strict=True)):
            shift = ceil(int(cost) / unit)
            candidate = loss[: columns - shift] + value
            better = candidate < best[shift:]
            best[shift:][better] = candidate[better]
            picks[number, shift:][better] = place
        loss = best
    return Sweep(menu, unit, loss, picks)


def knapsack(menu: Menu, budget: float) -> Places:
    """The least predicted divergence within ``budget`` stored values, by `sweep`."""
    return sweep(menu).solve(budget)


def knapsack_several(menu: Menu, limits: Sequence[tuple[Sequence[np.ndarray], float]]) -> Places:
    """The least predicted divergence under several budgets at once, exactly, by HiGHS.

    ``limits`` are pairs (cost of every option, line by line; budget): parameters, bytes, predicted latency.
    Raises `InputError` where no plan meets them all.
    """
    sizes = [len(line.options) for line in menu.lines]
    total = sum(sizes)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(total), (rows, np.arange(total))), shape=(len(sizes), total))
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(np.concatenate(list(costs))[None], -np.inf, budget) for costs, budget in limits]
    loss = np.concatenate([line.divergence for line in menu.lines])
    found = milp(
        loss,
        constraints=constraints,
        integrality=np.ones(total, dtype=int),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        budgets = ", ".join(f"{budget:,.6g}" for _, budget in limits)
        raise InputError(
            f"no plan meets the budgets {budgets} together: raise one, or offer lower levels in space.keep"
        )
    starts = np.cumsum([0, *sizes[:-1]])
    return [int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=True)]


def _cheapest_from(line: Line, keep: float) -> int:
    """The best option of ``line`` that stores at most ``keep`` of dense; the cheapest where none does."""
    allowed = np.flatnonzero(line.parameters <= keep * line.parameters[0])
    if not len(allowed):
        return int(line.parameters.argmin())
    largest = line.parameters[allowed].max()
    best = allowed[line.parameters[allowed] == largest]
    return int(best[line.divergence[best].argmin()])


def _largest_within(menu: Menu, budget: float, rule: Callable[[float], Places], low: float, high: float) -> Places:
    """The plan of ``rule`` at the knob setting that stores the most within ``budget``; rules store more as it grows."""
    _check(menu, budget)
    if menu.parameters(rule(high)) <= budget:
        return rule(high)
    best = rule(low)
    if menu.parameters(best) > budget:
        best = [int(line.parameters.argmin()) for line in menu.lines]
    for _ in range(60):
        middle = (low + high) / 2
        places = rule(middle)
        if menu.parameters(places) <= budget:
            best, low = places, middle
        else:
            high = middle
    return best


def uniform(menu: Menu, budget: float) -> Places:
    """The same kept fraction everywhere, as large as the budget allows."""
    return _largest_within(menu, budget, lambda keep: [_cheapest_from(line, keep) for line in menu.lines], 0.0, 1.0)


def tolerance(menu: Menu, budget: float) -> Places:
    """One bound on predicted error for every site, as small as the budget allows (PGSVD, 2510.05544).

    Each site takes its cheapest option within the bound. With the spectrum's predictions, the relative squared
    error in the method's metric, this is the paper's uniform tolerance, and TRP's energy rule (1812.02402) with
    energy 1 − bound.
    """
    highest = max(float(line.divergence.max()) for line in menu.lines)

    def rule(knob: float) -> Places:
        if knob >= 1.0:
            return [0] * len(menu.lines)
        bound = highest * 1e-9**knob  # a larger knob allows less error and stores more
        places = []
        for line in menu.lines:
            within = np.flatnonzero(line.divergence <= bound)
            places.append(int(within[line.parameters[within].argmin()]))
        return places

    return _largest_within(menu, budget, rule, 0.0, 1.0)


def sensitivity(menu: Menu, budget: float) -> Places:
    """ASVD's search (2312.05821): every option of every site sorted by its measured effect alone; go down the sorted
    list and take what hurts least, until the budget is met.

    Options are visited by rising divergence; a site moves to an option when it stores less than what it has.
    """
    _check(menu, budget)
    places = [0] * len(menu.lines)
    stored = menu.dense
    effects = [(float(d), i, k) for i, line in enumerate(menu.lines) for k, d in enumerate(line.divergence) if k]
    for _, i, k in sorted(effects):
        if stored <= budget:
            break
        saved = int(menu.lines[i].parameters[places[i]] - menu.lines[i].parameters[k])
        if saved > 0:
            places[i] = k
            stored -= saved
    return places


ALLOCATORS: Mapping[str, Callable[[Menu, float], Places]] = {
    "uniform": uniform,
    "tolerance": tolerance,
    "sensitivity": sensitivity,
    "knapsack": knapsack,
}
