"""Multi-choice knapsack for one budget by Lagrangian relaxation, then greedy filling and exchanges of pairs.

    min_plan Σ_i e_i(o_i) + λ · stored values(plan)

separates over regions of lines that share weights, so that each multiplier λ is solved exactly: one argmin a line, one
cover a region. A bisection finds the λ whose plan just fits the budget; what the budget leaves is filled greedily, and
pairs of moves are exchanged as long as any pair lowers the loss. On many lines that is nearly as good as the integer
program of `knapsack`, in a hundredth of its time.

Source: Everett (1963), generalised Lagrange multipliers, for the relaxation; filling and exchanges are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfront.methods import InputError
from rankfront.search.plans.agreed import least
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING

TINY = 1e-15  # nats; less is rounding
NEVER = 1e9  # nats; the loss of an option of which nothing is known, or that a line does not have
UNLIKELY = 1e6  # nats; the same where differences of losses are added up, which digits have to be left for


def check_budget(menu: Menu, budget: float) -> None:
    """Raise `InputError` where nothing on the menu fits ``budget`` stored values."""
    if budget < menu.least:
        raise InputError(
            f"a budget of {budget:,.0f} is below the {menu.least:,} that every site at its cheapest option"
            " stores: raise the budget, or offer lower levels in space.keep"
        )


class Lagrangian:
    """Plans of nearly least total loss within any budget, for a menu and ``losses`` of its options, line by line; its
    divergences unless given."""

    def __init__(self, menu: Menu, losses: Sequence[np.ndarray] | None = None) -> None:
        self.menu = menu
        lines = menu.lines
        widest = max(len(line.options) for line in lines)
        self._loss = np.full((len(lines), widest), NEVER)
        self._saved = np.zeros((len(lines), widest))
        used = self._used = [line.divergence for line in lines] if losses is None else losses
        for i, (line, loss) in enumerate(zip(lines, used, strict=True)):
            self._loss[i, : len(loss)] = np.minimum(loss, NEVER)
            self._saved[i, : len(loss)] = line.sizes[0] - line.sizes
        self._all = np.arange(len(lines))
        self._single = np.array([not line.weights for line in lines])
        self._shared = [region for region in menu.regions if len(region.members) > 1]
        self._rivals = np.zeros((len(lines), len(lines)), dtype=bool)
        for i, rivals in enumerate(menu.rivals):
            self._rivals[i, list(rivals)] = True
        rates = self._loss[:, 1:] / np.maximum(self._saved[:, 1:], 1)
        known = rates[(self._loss[:, 1:] < NEVER / 2) & (rates > 0)]
        low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
        # From a multiplier that keeps everything dense to one that keeps everything cheapest.
        self._multipliers = low / TUNING.beyond, high * TUNING.beyond

    def solve(self, budget: float) -> Places:
        """A plan of nearly least loss within ``budget`` stored values; `InputError` where nothing fits."""
        check_budget(self.menu, budget)
        if self.menu.bases:
            return least(self.menu, self._used, lambda agreed, menu, losses: Lagrangian(menu, losses).solve(budget))
        places = np.array(self.menu.cheapest)
        low, high = self._multipliers
        for _ in range(TUNING.bisections):
            middle = np.sqrt(low * high)
            found = self._relaxed(middle)
            if self._stored(found) <= budget:
                places, high = found, middle
            else:
                low = middle
        return tuple(map(int, self._exchange(self._fill(places, budget), budget)))

    def _stored(self, places: np.ndarray) -> float:
        return float(self.menu.dense - self._saved[self._all, places].sum())

    def _relaxed(self, multiplier: float) -> np.ndarray:
        """The choice of least loss − λ · saved."""
        priced = np.minimum(self._loss, UNLIKELY) - multiplier * self._saved
        offered = priced.copy()
        offered[~self._single, 0] = np.inf  # joint sites at dense are their weights' own sites at dense
        best = offered.argmin(1)
        values = (offered[self._all, best] - priced[:, 0]).tolist()  # against leaving a line at dense
        places: np.ndarray = best.copy()
        for region in self._shared:
            taken = region.cover(values)
            places[list(region.members)] = 0
            places[taken] = best[taken]
        return places

    def _changes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every line and option: by how much the move changes the loss, and the stored values that it adds.

        Moves of lines whose rivals are treated count as bad as can be.
        """
        change = self._loss - self._loss[self._all, places][:, None]
        change[self._rivals[:, places > 0].any(1), 1:] = NEVER
        return change, self._saved[self._all, places][:, None] - self._saved

    def _fill(self, places: np.ndarray, budget: float) -> np.ndarray:
        """Spend what is left of ``budget`` on the moves that lower the loss most by the value stored."""
        room = budget - self._stored(places)
        while True:
            change, added = self._changes(places)
            worth = np.where((added <= room) & (change < -TINY), -change / np.maximum(added, 1.0), 0.0)
            i, place = divmod(int(worth.argmax()), worth.shape[1])
            if worth[i, place] <= 0:
                return places
            room -= added[i, place]
            places[i] = place

    def _exchange(self, places: np.ndarray, budget: float) -> np.ndarray:
        """Lower the loss by moves of two lines at once, one dearer and one cheaper, as long as any pair does within
        budget."""
        for _ in range(TUNING.exchanges):
            change, added = self._changes(places)
            room = budget - self._stored(places)
            rows, columns = np.nonzero((change < NEVER / 2) & (change != 0))
            worth, stored = change[rows, columns], added[rows, columns]
            up = np.argsort(np.where(stored > 0, worth, np.inf))[: TUNING.paired]
            down = np.argsort(np.where(stored < 0, worth, np.inf))[: TUNING.paired]
            up, down = up[stored[up] > 0], down[stored[down] < 0]
            both = worth[up][:, None] + worth[down][None, :]
            both[rows[up][:, None] == rows[down][None, :]] = np.inf
            treated = (columns[up] > 0)[:, None] & (columns[down] > 0)
            both[self._rivals[np.ix_(rows[up], rows[down])] & treated] = np.inf
            both[stored[up][:, None] + stored[down][None, :] > room] = np.inf
            if not both.size or both.min() >= -TINY:
                return places
            a, b = divmod(int(both.argmin()), both.shape[1])
            for move in (up[a], down[b]):
                places[rows[move]] = columns[move]
        return places
