"""Regions: sites that share weights, solved together so that no weight is ever treated twice.

Within a region a choice is an exact cover: every weight is taken by exactly one of the sites that claim it, by its
own single one at dense if by nothing else. Covers are built by deciding the first weight that is still open; states
that decided the same weights are merged, so the work is that of a dynamic program over sets of decided weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


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
    def _steps(self) -> list[tuple[int, int, int]]:
        """(decided weights, member that takes the first open one, decided then), no state before all that lead to it;
        a set of weights is an integer, a bit for each."""
        bits = {weight: 1 << i for i, weight in enumerate(dict.fromkeys(w for claim in self.claims for w in claim))}
        masks = [sum(bits[weight] for weight in claim) for claim in self.claims]
        steps: list[tuple[int, int, int]] = []
        states = {0}
        for bit in bits.values():
            open_here = sorted(state for state in states if not state & bit)
            takers = [(member, mask) for member, mask in enumerate(masks) if mask & bit]
            found = [(s, member, s | mask) for s in open_here for member, mask in takers if not mask & s]
            states = states - {*open_here} | {after for _, _, after in found}
            steps += found
        return steps

    def cover(self, values: Sequence[float]) -> list[int]:
        """The lines that a cover of least total takes, each at its own of ``values``, which are of all lines of the
        menu; infinite ones are not taken."""
        least = {0: 0.0}
        taken: dict[int, tuple[int, int]] = {}  # state -> (the one before it, the member between them)
        for state, member, after in self._steps:
            if state in least and (total := least[state] + values[self.members[member]]) < least.get(after, math.inf):
                least[after], taken[after] = total, (state, member)
        lines = []
        state = max(least)
        while state:
            state, member = taken[state]
            lines.append(self.members[member])
        return lines


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
