"""Regions: sites that share weights, solved together so that no weight is ever treated twice.

Within a region a choice is an exact cover: every weight is taken by exactly one of the sites that claim it, by its
own single one at dense if by nothing else. Covers are built by deciding the first weight that is still open; states
that decided the same weights are merged, so the work is that of a dynamic program over sets of decided weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np

from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Merged:
    """The choices of a region as one line.

    Attributes:
        members: the region's lines, M of them.
        costs: stored values of each choice, (K,).
        losses: its predicted divergence, (K,).
        places: the option of every member, (K, M).
    """

    members: tuple[int, ...]
    costs: np.ndarray
    losses: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Region:
    """Lines connected by shared weights.

    Attributes:
        members: their numbers in the menu.
        claims: the weights of each.
    """

    members: tuple[int, ...]
    claims: tuple[tuple[str, ...], ...]

    @cached_property
    def _masks(self) -> list[int]:
        bits = {weight: 1 << i for i, weight in enumerate(dict.fromkeys(w for claim in self.claims for w in claim))}
        return [sum(bits[weight] for weight in claim) for claim in self.claims]

    @cached_property
    def _steps(self) -> list[tuple[int, int]]:
        """(decided weights, member that takes the first open one), no state before all that lead to it."""
        whole = max(np.bitwise_or.accumulate(self._masks))
        steps: list[tuple[int, int]] = []
        reached = {0}
        waiting = {0}
        while waiting:
            state = min(waiting, key=_first_open)
            waiting.remove(state)
            takers = [i for i, mask in enumerate(self._masks) if mask & _first_open(state) and not mask & state]
            steps += [(state, member) for member in takers]
            found = {state | self._masks[member] for member in takers} - reached
            reached |= found
            waiting |= found - {whole}
        return steps

    def _options(self, member: int, costs: Sequence[np.ndarray]) -> range:
        """The options that a cover may take: a joint site at dense is its single ones at dense, once is enough."""
        return range(0 if len(self.claims[member]) == 1 else 1, len(costs[member]))

    def cover(self, values: Sequence[float]) -> list[int]:
        """The members that a cover of least total takes, each at its own of ``values``; infinite ones are not taken."""
        if len(self.members) == 1:
            return [0]
        least = {0: 0.0}
        taken: dict[int, tuple[int, int]] = {}  # state -> (the one before it, the member between them)
        for state, member in self._steps:
            if state in least:
                after, total = state | self._masks[member], least[state] + values[member]
                if total < least.get(after, np.inf):
                    least[after], taken[after] = total, (state, member)
        members = []
        state = max(least)
        while state:
            state, member = taken[state]
            members.append(member)
        return members

    def cheapest(self, costs: Sequence[np.ndarray]) -> dict[int, int]:
        """Line -> option of the cover that stores least; lines that it leaves out are not named."""
        options = [self._options(member, costs) for member in range(len(costs))]
        places = [min(own, key=lambda k: cost[k], default=0) for own, cost in zip(options, costs, strict=True)]
        values = [
            float(cost[place]) if own else np.inf for own, cost, place in zip(options, costs, places, strict=True)
        ]
        return {self.members[member]: places[member] for member in self.cover(values)}

    def merge(self, costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], unit: int) -> Merged:
        """The region's best choice at every budget, as one line.

        Exact where ``unit`` divides every cost; else costs are rounded up to it while choosing. Of more choices than
        `Tuning.region_points`, those on the lower convex hull stay, and others spread evenly between the cheapest and
        dense.
        """
        if len(self.members) == 1:
            return Merged(self.members, costs[0], losses[0], np.arange(len(costs[0]))[:, None])
        loss, taken = self._solve(costs, losses, unit)
        improving = np.flatnonzero(loss < np.append(np.inf, loss[:-1]))
        columns = improving[_spread(improving, loss[improving])]
        places = np.stack([self._trace(taken, int(column), costs, unit) for column in columns])
        alone = [int(cost[0]) for cost, claim in zip(costs, self.claims, strict=True) if len(claim) == 1]
        spent = np.full(len(places), sum(alone))
        lost = np.zeros(len(places))
        for member, (cost, values) in enumerate(zip(costs, losses, strict=True)):
            spent = spent + cost[places[:, member]] - cost[0]
            lost += values[places[:, member]]
        return Merged(self.members, spent, lost, places)

    def _solve(
        self, costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], unit: int
    ) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """The least loss within u units, (U + 1,), and for every state the member and option taken last, (U + 1,)."""
        units = [[ceil(int(cost) / unit) for cost in own] for own in costs]
        columns = 1 + sum(own[0] for own, claim in zip(units, self.claims, strict=True) if len(claim) == 1)
        best = {0: np.zeros(columns)}
        taken: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for state, member in self._steps:
            after = state | self._masks[member]
            if after not in best:
                best[after] = np.full(columns, np.inf)
                taken[after] = np.zeros(columns, dtype=np.int16), np.zeros(columns, dtype=np.int16)
            for place in self._options(member, costs):
                shift = units[member][place]
                if shift >= columns:  # dearer than all of the region dense
                    continue
                candidate = best[state][: columns - shift] + losses[member][place]
                better = candidate < best[after][shift:]
                best[after][shift:][better] = candidate[better]
                for array, value in zip(taken[after], (member, place), strict=True):
                    array[shift:][better] = value
        return best[max(best)], taken

    def _trace(
        self, taken: dict[int, tuple[np.ndarray, np.ndarray]], column: int, costs: Sequence[np.ndarray], unit: int
    ) -> np.ndarray:
        """The option of every member behind one column of `_solve`, (M,)."""
        places = np.zeros(len(self.members), dtype=int)
        state = max(taken)
        while state:
            member, place = (int(array[column]) for array in taken[state])
            places[member] = place
            column -= ceil(int(costs[member][place]) / unit)
            state ^= self._masks[member]
        return places


def _first_open(state: int) -> int:
    """The lowest bit that ``state`` lacks."""
    return ~state & (state + 1)


def _spread(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """At most `Tuning.region_points` of the choices (costs rising, losses falling): those a Lagrangian finds, and some
    evenly spread, the first and the last always among them."""
    points = TUNING.region_points
    if len(costs) <= points:
        return np.arange(len(costs))
    slopes = np.geomspace(1e-9, 1e3, points // 2) * (losses[0] - losses[-1]) / (costs[-1] - costs[0])
    hull = (losses[None, :] + slopes[:, None] * costs[None, :]).argmin(1)
    even = np.linspace(0, len(costs) - 1, points // 2).round().astype(int)
    return np.unique(np.concatenate([hull, even]))


@lru_cache(maxsize=8)  # a menu whose costs are weighed anew claims the same weights
def regions_of(claims: tuple[tuple[str, ...], ...]) -> tuple[Region, ...]:
    """Lines grouped by shared weights, in the order of their first lines."""
    group_of: dict[str, list[int]] = {}
    for number, claim in enumerate(claims):
        joined = [number]
        for group in {id(group_of[w]): group_of[w] for w in claim if w in group_of}.values():
            joined = group + joined
        joined.sort()
        for weight in {w for member in joined for w in claims[member]}:
            group_of[weight] = joined
    groups = {id(group): group for group in group_of.values()}.values()
    return tuple(
        Region(tuple(group), tuple(claims[member] for member in group)) for group in sorted(groups, key=lambda g: g[0])
    )


@lru_cache(maxsize=8)
def rivals_of(claims: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """For each line, the other lines that share a weight with it."""
    by_weight: dict[str, list[int]] = {}
    for number, claim in enumerate(claims):
        for weight in claim:
            by_weight.setdefault(weight, []).append(number)
    shared = [{other for weight in claim for other in by_weight[weight]} for claim in claims]
    return tuple(tuple(sorted(others - {number})) for number, others in enumerate(shared))
