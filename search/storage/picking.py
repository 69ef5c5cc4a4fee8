"""Picking rows of a study under constraints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankfront.methods import InputError
from rankfront.search.constraint import Constraint
from rankfront.search.storage.front import Row, comparable, front_rung


def holds(row: Row, constraint: Constraint) -> bool:
    """Whether the row's figure is within the bound; `InputError` where it has no such figure."""
    return not constraint.missed(row.figure(constraint.figure))


def meeting(rows: Sequence[Row], constraints: Sequence[Constraint]) -> list[Row]:
    """The rows that meet every constraint; `InputError` naming the closest where none does."""
    if not rows:
        raise InputError("no trial is complete yet: launch the study first")
    met = holding(rows, constraints)
    if not met:
        closest = min(
            rows, key=lambda row: sum(constraint.missed(row.figure(constraint.figure)) for constraint in constraints)
        )
        figures = ", ".join(f"{c.figure}={closest.figure(c.figure):.4g}" for c in constraints)
        wanted = " and ".join(str(constraint) for constraint in constraints)
        raise InputError(f"no trial meets {wanted}; the closest is trial {closest.number} with {figures}")
    return met


def holding(rows: Iterable[Row], constraints: Sequence[Constraint]) -> list[Row]:
    """The rows that meet every constraint, if any does."""
    return [row for row in rows if all(holds(row, constraint) for constraint in constraints)]


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
