"""Menus whose lines have to agree, such as in one width of all MLPs: solved one width after another.

With every line at one base, what is left to choose is which moves to make, of which no two touch one line. That is a
menu as well, with a line for each move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankfront.methods import DENSE_OPTION, InputError, Option
from rankfront.search.plans.menu import Line, Menu, Places, moved
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.variables import Linked

Losses = Sequence[np.ndarray]  # of the options of every line


def agreeing(menu: Menu, linked: Sequence[Linked]) -> Menu:
    """``menu`` with what sites have to take together, as far as all of it is on it."""
    if not linked:
        return menu
    bases: list[Places] = [menu.untreated]
    moves: list[Places] = []
    for each in linked:
        found = [menu.encode(Plan.of(options)) for options in each.together[1:]]
        (bases if each.common else moves).extend(places for places in found if places is not None)
    return replace(menu, bases=tuple(bases), moves=tuple(moves))


@dataclass(frozen=True)
class Agreed:
    """What is left to choose of a ``menu`` once all its lines are at ``base``: which moves are made."""

    menu: Menu
    base: Places

    def gathered(self, values: Losses) -> list[np.ndarray]:
        """Sums of ``values`` of the menu's options, in the shape of `reduced`: first those that no move changes."""
        at_base = np.array([own[place] for own, place in zip(values, self.base, strict=True)])
        found, others = [], np.ones(len(values), dtype=bool)
        for move in self.menu.moves:
            touched = [line for line, place in enumerate(move) if place]
            found.append(np.array([at_base[touched].sum(), sum(values[line][move[line]] for line in touched)]))
            others[touched] = False
        return [np.array([at_base[others].sum()]), *found]

    @property
    def reduced(self) -> Menu:
        """The menu of moves. What each costs counts from the dense model, of which the first line has the size."""
        costs = [
            self.gathered([line.costs[row] - line.costs[row, 0] for line in self.menu.lines])
            for row in range(self.menu.count)
        ]
        for own, dense in zip(costs, self.menu.costs(self.menu.untreated), strict=True):
            own[0] = own[0] + dense
        divergence = self.gathered([line.divergence for line in self.menu.lines])
        options = (DENSE_OPTION, Option.of("drop-block"))
        lines = [
            Line(f"move {number}", options[: len(loss)], first, loss, more=tuple(more))
            for number, (loss, first, *more) in enumerate(zip(divergence, *costs, strict=True))
        ]
        return Menu(tuple(lines))

    def expanded(self, places: Sequence[int]) -> Places:
        """The choice of the menu that one of `reduced` stands for."""
        return moved(self.base, [move for move, place in zip(self.menu.moves, places[1:], strict=True) if place])


def least(menu: Menu, losses: Losses, solve: Callable[[Agreed, Menu, list[np.ndarray]], Places]) -> Places:
    """The best of what ``solve`` finds at each base; `InputError` where it finds nothing at any."""
    found, refusal = {}, InputError("no plan is on the menu")
    for base in menu.bases:
        agreed = Agreed(menu, base)
        try:
            places = agreed.expanded(solve(agreed, agreed.reduced, agreed.gathered(losses)))
        except InputError as error:
            refusal = error
            continue
        found[places] = float(sum(own[place] for own, place in zip(losses, places, strict=True)))
    if not found:
        raise refusal
    return min(found, key=lambda places: found[places])


def neighbour(menu: Menu, places: Places, random: np.random.Generator) -> Places:
    """``places`` at another base, or with one move more or less."""
    moves = [move for move in menu.moves if all(p == m for p, m in zip(places, move, strict=True) if m)]
    base = next(base for base in menu.bases if moved(base, moves) == places)
    number = int(random.integers(len(menu.bases) + len(menu.moves)))
    if number < len(menu.bases):
        return moved(menu.bases[number], moves)
    chosen = menu.moves[number - len(menu.bases)]
    return moved(base, [move for move in moves if move != chosen] + [chosen] * (chosen not in moves))
