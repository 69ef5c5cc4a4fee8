"""Multi-fidelity: plans start on few tokens, and those in front are measured again on more, fresh ones.

Successive halving, asynchronous as in ASHA (Li et al. 1810.05934, algorithm 2), with Pareto rank in place of a loss: of
the plans measured at one rung, one in ``reduction`` goes on to the next. Plans of one rung are compared on the same
windows, and no window serves two rungs, so that a plan that was lucky at one rung is not lucky again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import moocore
import numpy as np

from rankfront.methods import InputError


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
