"""Constraints on rows: ``figure operator bound``, and picking under them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankfront.methods import InputError
from rankfront.search.storage.front import Row, comparable, front_rung

CONSTRAINT = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
TESTS = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


@dataclass(frozen=True)
class Constraint:
    """``figure operator bound``, such as ``parameters<=0.8``."""

    figure: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        match = CONSTRAINT.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            return cls(match[1], match[2], float(match[3]))
        except ValueError as error:
            raise InputError(
                f"constraint {text!r} does not read as FIGURE<=NUMBER, such as 'parameters<=0.8'"
            ) from error

    def holds(self, row: Row) -> bool:
        return bool(TESTS[self.operator](row.figure(self.figure), self.bound))

    def excess(self, row: Row) -> float:
        """How far ``row`` misses the bound, relative to it; 0 where it holds."""
        return self.missed(row.figure(self.figure))

    def missed(self, value: float) -> float:
        """How far ``value`` misses the bound, relative to it; 0 where it holds."""
        gap = abs(value - self.bound) / max(abs(self.bound), 1e-12)
        return 0.0 if TESTS[self.operator](value, self.bound) else max(gap, 1e-12)

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.bound:g}"


def meeting(rows: Sequence[Row], constraints: Sequence[Constraint]) -> list[Row]:
    """The rows that meet every constraint; `InputError` naming the closest where none does."""
    if not rows:
        raise InputError("no trial is complete yet: launch the study first")
    met = holding(rows, constraints)
    if not met:
        closest = min(rows, key=lambda row: sum(constraint.excess(row) for constraint in constraints))
        figures = ", ".join(f"{c.figure}={closest.figure(c.figure):.4g}" for c in constraints)
        wanted = " and ".join(str(constraint) for constraint in constraints)
        raise InputError(f"no trial meets {wanted}; the closest is trial {closest.number} with {figures}")
    return met


def holding(rows: Iterable[Row], constraints: Sequence[Constraint]) -> list[Row]:
    """The rows that meet every constraint, if any does."""
    return [row for row in rows if all(constraint.holds(row) for constraint in constraints)]


def best_meeting(rows: Sequence[Row], constraints: Sequence[Constraint]) -> Row:
    """Of the rows that meet ``constraints``, the best in the first objective.

    Those of the front's rung where one meets them, else of the next below: not every plan went up. Raises `InputError`
    naming the closest where none does.
    """
    for rung in range(front_rung(rows), 0, -1):
        met = holding(comparable(rows, rung), constraints)
        if met:
            break
    else:
        met = meeting(comparable(rows, 0), constraints)
    return min(met, key=lambda row: list(row.values.values()))
