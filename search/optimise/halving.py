"""Multi-fidelity: plans start on few tokens, and those in front are measured again on more, fresh ones.

Successive halving, asynchronous as in ASHA (Li et al. 1810.05934, algorithm 2), with Pareto rank in place of a loss: of
the plans measured at one rung, one in ``reduction`` goes on to the next. Plans of one rung are compared on the same
windows, and no window serves two rungs, so that a plan that was lucky at one rung is not lucky again.

What a search returns is a front, and a front is of one rung: how it is promoted in the end is in `closing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import moocore
import numpy as np
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.storage.front import Row, comparable, dense_row, front_rung


class Promotion(NamedTuple):
    """The plan of trial ``number`` is to be measured at ``rung``; at rung 0 the trial itself, which waits."""

    number: int
    rung: int


def promoted(trials: Iterable[FrozenTrial]) -> set[Promotion]:
    """All that wait, run or were measured at a higher rung; interrupted ones are due again."""
    return {
        Promotion(trial.user_attrs[keys.PROMOTED], trial.user_attrs[keys.RUNG])
        for trial in trials
        if keys.PROMOTED in trial.user_attrs and not is_void(trial.user_attrs)
    }


def promotions_due(rows: Sequence[Row], known: set[Promotion], rungs: int, reduction: int) -> list[Promotion]:
    """What is due at each of so many ``rungs`` but the first, and before it the dense model there, in order.

    Of the compressed plans in the best ``1 / reduction`` of a rung as it stands, those that are not ``known`` to have
    moved on, as long as no more than that share have moved on in all. Plans beyond the study's limits stay where they
    are.
    """
    due: list[Promotion] = []
    dense = dense_row(rows, rung=0) if rungs > 1 else None
    for rung in range(reach(rows, rungs)) if dense else ():
        here = [row for row in comparable(rows, rung) if row.within and not row.is_dense]
        share = len(here) // reduction
        best = [Promotion(row.number, rung + 1) for row in in_order(here)[:share]]
        moved = sum(Promotion(row.number, rung + 1) in known for row in here)
        chosen = [promotion for promotion in best if promotion not in known][: max(share - moved, 0)]
        if dense and (chosen or moved):
            chosen = [own for own in (Promotion(dense.number, rung + 1),) if own not in known] + chosen
        due += chosen
    return due


def reach(rows: Sequence[Row], rungs: int) -> int:
    """The highest of so many ``rungs`` that plans may go to: below those at which the dense model failed."""
    failed = [row.rung for row in rows if row.is_dense and row.state == "failed" and row.counts]
    return max(min([rungs, *failed]) - 1, 0)


def promotion_of(rows: Sequence[Row], number: int) -> Promotion | None:
    """The next measurement of one trial's plan on its way to where the front stands without it; None at its end."""
    row = next((row for row in rows if row.number == number), None)
    if row is None:
        return None
    if row.state == "waiting":
        return Promotion(number, 0)
    others = [other for other in rows if other.plan_key != row.plan_key]
    for rung in range(1, max(front_rung(rows), front_rung(others)) + 1):
        if row.plan_key not in known_at(rows, rung):
            below = [other for other in comparable(rows, rung - 1) if other.plan_key == row.plan_key]
            return Promotion(below[0].number, rung) if below else None
    return None


def known_at(rows: Sequence[Row], rung: int) -> set[str | None]:
    """Keys of the plans that were measured at ``rung``, failed there by themselves, or run there."""
    return {row.plan_key for row in rows if row.rung == rung and (row.counts or row.state == "running")}


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Complete rows of one rung by `pareto_order`."""
    values = np.array([list(row.values.values()) for row in rows])
    return [rows[place] for place in pareto_order(values)] if rows else []


def pareto_order(values: np.ndarray) -> list[int]:
    """The rows of ``values`` (N, d), all minimised, by Pareto rank; within a rank the least crowded first.

    Crowding is NSGA-II's distance (Deb et al. 2002, section III-B): extremes of an objective are never crowded.
    """
    rank = moocore.pareto_rank(values, maximise=False)
    order: list[int] = []
    for level in np.unique(rank):
        members = np.flatnonzero(rank == level)
        distance = _crowding(values[members])
        order += [int(members[i]) for i in np.lexsort((members, -distance))]
    return order


def _crowding(values: np.ndarray) -> np.ndarray:
    """The sum over objectives of the gap between each row's neighbours, in units of the range, (N,)."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        gaps = np.full(len(column), np.inf)
        if width > 0 and len(column) > 2:
            gaps[1:-1] = (column[order[2:]] - column[order[:-2]]) / width
        distance[order] += gaps
    return distance
