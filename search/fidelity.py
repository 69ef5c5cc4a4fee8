"""Multi-fidelity: plans start on few tokens, and those in front are measured again on more, fresh ones.

Successive halving, asynchronous as in ASHA (Li et al. 1810.05934, algorithm 2), with Pareto rank in place of a loss: of
the plans measured at one rung, one in ``reduction`` goes on to the next. Plans of one rung are compared on the same
windows, and no window serves two rungs, so that a plan that was lucky at one rung is not lucky again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import moocore
import numpy as np
import optuna

from rankfront.methods import InputError
from rankfront.search.front import Row, dense_row
from rankfront.search.samplers import INTERRUPTED

KEPT = ("origin", "anchor", "predicted")  # attributes of a trial that its promotion has too


def rung_windows(rungs: Sequence[int], windows: int, length: int) -> list[slice]:
    """Which windows of the search split each rung reads; all of them where there is only one fidelity.

    ``rungs`` are in tokens; each takes at least one window. Raises `InputError` where the split has too few.
    """
    if not rungs:
        return [slice(0, windows)]
    ends = list(accumulate(max(1, tokens // length) for tokens in rungs))
    if ends[-1] > windows:
        raise InputError(
            f"search.rungs = {list(rungs)} read {ends[-1]} windows of {length} tokens and data.search.windows is"
            f" {windows}: each rung takes windows of its own, so set data.search.windows to {ends[-1]} or more"
        )
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Ladder:
    """Moves a study's plans from rung to rung, by queueing the next measurement in its storage.

    Attributes:
        study: where trials are queued; trials carry ``rung``, and ``promoted``: the trial they continue.
        rungs: how many there are; none or one is no ladder.
        reduction: of the compressed plans measured at a rung, one in so many goes on.
    """

    study: optuna.Study
    rungs: int
    reduction: int

    def promote(self, rows: Sequence[Row]) -> None:
        """Queue what is due at every rung but the first, and before it the dense model there.

        Of the plans in the best ``1 / reduction`` of a rung as it stands, those that were not moved on before, as long
        as no more than that share have moved on in all.
        """
        if self.rungs < 2:
            return
        dense = dense_row(rows, rung=0)
        queued = self._queued()
        for rung in range(self.rungs - 1) if dense else ():
            here = [row for row in rows if row.rung == rung and row.state == "complete" and not row.is_dense]
            due = len(here) // self.reduction
            best = pareto_order(np.array([list(row.values.values()) for row in here]))[:due] if due else []
            moved = sum((row.number, rung + 1) in queued for row in here)
            fresh = [here[place].number for place in best if (here[place].number, rung + 1) not in queued]
            chosen = fresh[: max(due - moved, 0)]
            if dense and (chosen or moved) and (dense.number, rung + 1) not in queued:
                self._queue(dense.number, rung + 1)
            for number in chosen:
                self._queue(number, rung + 1)

    def _queued(self) -> set[tuple[int, int]]:
        """(trial, rung) of all that wait, run or were measured at a higher rung; interrupted ones are due again."""
        return {
            (trial.user_attrs["promoted"], trial.user_attrs["rung"])
            for trial in self.study.get_trials(deepcopy=False)
            if "promoted" in trial.user_attrs and trial.user_attrs.get("failure") != INTERRUPTED
        }

    def _queue(self, number: int, rung: int) -> None:
        source = self.study.get_trials(deepcopy=False)[number]
        kept = {key: source.user_attrs[key] for key in KEPT if key in source.user_attrs}
        self.study.enqueue_trial(source.params, user_attrs=kept | {"rung": rung, "promoted": number})


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
