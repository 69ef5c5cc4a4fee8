"""Constraints on what plans store, cost or lose: ``figure operator bound``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rankfront.methods import InputError

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

    def missed(self, value: float) -> float:
        """How far ``value`` misses the bound, relative to it; 0 where it holds."""
        gap = abs(value - self.bound) / max(abs(self.bound), 1e-12)
        return 0.0 if TESTS[self.operator](value, self.bound) else max(gap, 1e-12)

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.bound:g}"
