"""Baseline allocators of the literature that our search is compared with: (menu, budget) -> the plan as a choice of it.

Every one meets its budget exactly or below, never above; `InputError` where nothing on the menu fits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rankfront.search.plans.lagrangian import Lagrangian, check_budget
from rankfront.search.plans.menu import TINY, Line, Menu, Places


def knapsack(menu: Menu, budget: float) -> Places:
    """Nearly the least predicted divergence: our Lagrangian relaxation."""
    return Lagrangian(menu).solve(budget)


def _cheapest_from(line: Line, keep: float) -> int:
    """The best option of ``line`` that stores at most ``keep`` of dense; the cheapest where none does."""
    allowed = np.flatnonzero(line.sizes <= keep * line.sizes[0])
    if not len(allowed):
        return int(line.sizes.argmin())
    largest = line.sizes[allowed].max()
    best = allowed[line.sizes[allowed] == largest]
    return int(best[line.divergence[best].argmin()])


def _rule(menu: Menu, choose: Callable[[Line], int]) -> Places:
    """``choose`` for every line of a cover: single sites first, and joint ones where they take no weight of theirs."""
    places = [0] * len(menu.lines)
    covered: set[str] = set()
    for i in sorted(range(len(menu.lines)), key=lambda i: len(menu.lines[i].claims)):
        line = menu.lines[i]
        if len(line.options) > 1 and covered.isdisjoint(line.claims):
            covered.update(line.claims)
            places[i] = choose(line)
    return tuple(places)


def _largest_within(menu: Menu, budget: float, rule: Callable[[float], Places]) -> Places:
    """The plan of ``rule`` at the knob in [0, 1] that stores the most within ``budget``; plans grow with the knob."""
    check_budget(menu, budget)
    low, high = 0.0, 1.0
    if menu.size(rule(high)) <= budget:
        return rule(high)
    best = rule(low)
    if menu.size(best) > budget:
        best = menu.cheapest
    for _ in range(60):
        middle = (low + high) / 2
        places = rule(middle)
        if menu.size(places) <= budget:
            best, low = places, middle
        else:
            high = middle
    return best


def uniform(menu: Menu, budget: float) -> Places:
    """The same kept fraction everywhere, as large as the budget allows."""
    return _largest_within(menu, budget, lambda keep: _rule(menu, lambda line: _cheapest_from(line, keep)))


def tolerance(menu: Menu, budget: float) -> Places:
    """One bound on predicted error for every site, as small as the budget allows (PGSVD, 2510.05544).

    Each site takes its cheapest option within the bound. With the spectrum's predictions, the relative squared
    error in the method's metric, this is the paper's uniform tolerance, and TRP's energy rule (1812.02402) with
    energy 1 − bound.
    """
    highest = max(float(line.divergence.max()) for line in menu.lines)

    def within(line: Line, knob: float) -> int:
        bound = highest * 1e-9**knob  # a larger knob allows less error and stores more
        allowed = np.flatnonzero(line.divergence <= bound)
        return int(allowed[line.sizes[allowed].argmin()])

    return _largest_within(menu, budget, lambda knob: _rule(menu, lambda line: 0 if knob >= 1 else within(line, knob)))


def value(menu: Menu, budget: float) -> Places:
    """One threshold on what a component is worth, for every site: TRP's value rule (1812.02402).

    TRP drops the components with σ_i below a threshold. Levels differ by several components, and other families have
    none, so what counts is the divergence that a level saves over the next cheaper one by the share of the site's
    storage that it adds; a site keeps the levels worth the threshold.
    """
    curves = {line.site: _worth(line) for line in menu.lines}
    worths = np.concatenate([worth for _, worth in curves.values()])
    highest = 2 * float(worths.max(initial=TINY))

    def above(line: Line, knob: float) -> int:
        options, worth = curves[line.site]
        kept = np.flatnonzero(worth >= highest * 1e-12**knob)
        return int(options[kept[-1] + 1] if len(kept) else options[0])

    return _largest_within(menu, budget, lambda knob: _rule(menu, lambda line: 0 if knob >= 1 else above(line, knob)))


def _worth(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """(the K options that nothing cheaper beats, by rising cost; what each saves over the one before, (K − 1,))."""
    by_cost = np.lexsort((line.divergence, line.sizes))
    least = np.minimum.accumulate(line.divergence[by_cost])
    options = by_cost[np.append(True, least[1:] < least[:-1])]
    saved, added = -np.diff(line.divergence[options]), np.diff(line.sizes[options])
    return options, saved * line.sizes[0] / added


def sensitivity(menu: Menu, budget: float) -> Places:
    """ASVD's search (2312.05821): every option of every site sorted by its measured effect alone; go down the sorted
    list and take what hurts least, until the budget is met.

    Options are visited by rising divergence; a site moves to an option when it stores less than what it has.
    """
    check_budget(menu, budget)
    places = [0] * len(menu.lines)
    stored = menu.dense
    effects = [(float(d), i, k) for i, line in enumerate(menu.lines) for k, d in enumerate(line.divergence) if k]
    for _, i, k in sorted(effects):
        if stored <= budget:
            break
        saved = int(menu.lines[i].sizes[places[i]] - menu.lines[i].sizes[k])
        if saved > 0 and not any(places[rival] for rival in menu.rivals[i]):
            places[i] = k
            stored -= saved
    return tuple(places) if stored <= budget else menu.cheapest
