"""Multi-choice knapsack under several budgets at once, as an integer program."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankfront.methods import InputError
from rankfront.search.plans.agreed import Agreed, least
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Budget:
    """A limit beside stored values: bytes, predicted latency.

    Attributes:
        changes: what each option costs more than dense, all lines in a row; infinite ones are never taken.
        room: what the changes of a plan may come to.
    """

    changes: np.ndarray
    room: float


def knapsack_several(
    menu: Menu,
    budget: float,
    others: Sequence[Budget] = (),
    losses: Sequence[np.ndarray] | None = None,
    gap: float = 0.0,
) -> Places:
    """The least predicted divergence within ``budget`` stored values, infinite or not, and all ``others``, by HiGHS.

    Exact where ``gap`` is 0, else at most that much worse, relative to the optimum. ``losses`` replace the menu's
    divergences, line by line; infinite ones are never taken. Raises `InputError` where no plan meets all budgets.
    """
    if menu.bases:
        return _agreed(menu, budget, others, losses, gap)
    sizes = [len(line.options) for line in menu.lines]
    starts = np.cumsum([0, *sizes])[:-1]
    stored = np.concatenate([line.sizes - line.sizes[0] for line in menu.lines])
    changes = np.array([stored, *(other.changes for other in others)], dtype=float)  # (budgets, options)
    room = np.array([budget - menu.dense, *(other.room for other in others)])
    loss = np.concatenate([line.divergence for line in menu.lines] if losses is None else losses)
    offered = np.isfinite(loss) & np.isfinite(changes).all(0)
    changes, loss = np.where(offered, changes, 0.0), np.where(offered, loss, 0.0)
    tighter = room.copy()
    for attempt in range(TUNING.repairs):
        constraints = [*_one_each(menu), LinearConstraint(changes, -np.inf, tighter)]
        with _silent():
            found = milp(
                loss,
                constraints=constraints,
                integrality=np.ones(len(loss), dtype=int),
                bounds=Bounds(0, offered.astype(float)),
                # Presolving takes longer than the rest where near is enough.
                options={"mip_rel_gap": gap, "presolve": gap == 0},
            )
        if found.x is None:
            break
        places = tuple(int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=True))
        over = changes[:, starts + np.array(places)].sum(1) - room
        if (over <= 0).all():
            return places
        tighter -= 2**attempt * np.maximum(over, 0)  # the solver's tolerance let it through
    wanted = f"a budget of {budget:,.6g} and {len(others)} more"
    raise InputError(f"no plan meets {wanted}: raise one, or offer lower levels in space.keep")


def _agreed(
    menu: Menu, budget: float, others: Sequence[Budget], losses: Sequence[np.ndarray] | None, gap: float
) -> Places:
    """The same where lines have to agree, base by base."""
    ends = np.cumsum([len(line.options) for line in menu.lines])[:-1]

    def solve(agreed: Agreed, reduced: Menu, own: list[np.ndarray]) -> Places:
        left = [replace(o, changes=np.concatenate(agreed.gathered(np.split(o.changes, ends)))) for o in others]
        return knapsack_several(reduced, budget, left, own, gap)

    return least(menu, [line.divergence for line in menu.lines] if losses is None else losses, solve)


def _one_each(menu: Menu) -> list[LinearConstraint]:
    """One option a line, and at most one treatment a weight."""
    sizes = [len(line.options) for line in menu.lines]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    constraints = [LinearConstraint(csr_array((np.ones(len(rows)), (rows, np.arange(len(rows))))), 1, 1)]
    treated = np.concatenate([np.arange(size) > 0 for size in sizes])
    for weight in dict.fromkeys(weight for line in menu.lines for weight in line.weights):
        claiming = np.array([weight in line.claims for line in menu.lines])
        constraints.append(LinearConstraint((claiming[rows] & treated).astype(float)[None], -np.inf, 1))
    return constraints


@contextmanager
def _silent() -> Iterator[None]:
    """Within, what C code prints is dropped: HiGHS 1.12 prints now and then though told not to (its issue 2783)."""
    kept = os.dup(1)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
