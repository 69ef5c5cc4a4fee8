"""The allocator for options that interact: coordinate descent on the Lagrangian, along a path of multipliers.

    S(plan) = Σ_i e_i(o_i) + ½ Σ_{i≠j} K_ij r_i(o_i) r_j(o_j),    r_i = √(2 e_i),

with e_i the predicted divergence of site i alone and K_ij how much two sites' effects coincide. S + λ · stored values
is lowered one site at a time until no site can lower it, for multipliers λ up and down a path, each starting where the
last one ended. In general that is a local optimum. Where K is zero the regions of sites that share weights do not see
each other, and S + λ · stored values is solved for at once, exactly: one argmin a site, one cover a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rankfront.search.plans.knapsack import check_budget, sweep
from rankfront.search.plans.menu import Menu

MULTIPLIERS = 48  # along the path, from one that keeps everything dense to one that keeps everything cheapest
BISECTIONS = 8  # multipliers tried between two of the path for a given budget
ROUNDS = 50  # passes over the sites for one multiplier; a handful is enough
EXCHANGES = 200  # pairs of moves made at most after that
PAIRED = 256  # moves up and moves down of which every pair is looked at
FEW = 32  # lines
LAST = 2  # candidates that are filled up where sites do not interact
TINY = 1e-15  # nats; less is rounding
NEVER = 1e9  # nats; the loss of an option of which nothing is known, or that a line does not have
UNLIKELY = 1e6  # nats; the same where differences of losses are added up, which digits have to be left for
Places = list[int]


@dataclass
class Descent:
    """Plans of least S for a menu, its corrected ``losses`` (line by line) and ``coupling`` K (lines, lines), None for
    zero."""

    menu: Menu
    losses: Sequence[np.ndarray]
    coupling: np.ndarray | None = None
    _path: list[tuple[float, np.ndarray]] = field(default_factory=list)  # (multiplier, places), multipliers rising

    def __post_init__(self) -> None:
        lines = self.menu.lines
        self._coupling = np.zeros((len(lines), len(lines))) if self.coupling is None else self.coupling
        widest = max(len(line.options) for line in lines)
        self._e = np.full((len(lines), widest), NEVER)
        self._saved = np.zeros((len(lines), widest))
        for i, (line, loss) in enumerate(zip(lines, self.losses, strict=True)):
            self._e[i, : len(loss)] = np.minimum(loss, NEVER)
            self._saved[i, : len(loss)] = line.sizes[0] - line.sizes
        self._r = np.sqrt(2 * np.where(self._e < NEVER / 2, np.maximum(self._e, 0), 0))
        self._all = np.arange(len(lines))
        self._alone = not self._coupling.any()
        self._single = np.array([not line.weights for line in lines])
        self._lone = np.array([r.members[0] for r in self.menu.regions if len(r.members) == 1], dtype=int)
        self._shared = [region for region in self.menu.regions if len(region.members) > 1]
        self._pairs = np.array([(i, j) for i, rivals in enumerate(self.menu.rivals) for j in rivals], dtype=int)
        self._pairs = self._pairs.reshape(-1, 2)
        self._rivals = np.zeros((len(lines), len(lines)), dtype=bool)
        self._rivals[tuple(self._pairs.T)] = True
        self._follow()

    def value(self, places: Sequence[int] | np.ndarray) -> float:
        """S of a choice."""
        chosen = self._all, np.asarray(places)
        r = self._r[chosen]
        return float(self._e[chosen].sum() + 0.5 * r @ self._coupling @ r)

    def _priced(self, places: np.ndarray, multiplier: float) -> float:
        """S − λ · saved."""
        return self.value(places) - multiplier * float(self._saved[self._all, places].sum())

    @property
    def plans(self) -> list[Places]:
        """The plans along the path, each once, from dense to the cheapest."""
        return [list(map(int, places)) for places in dict.fromkeys(tuple(places) for _, places in self._path)]

    def solve(self, budget: float) -> Places:
        """A plan of least S within ``budget`` stored values; `InputError` where nothing fits."""
        check_budget(self.menu, budget)
        stored = [self.menu.dense - self._saved[self._all, places].sum() for _, places in self._path]
        within = [i for i, amount in enumerate(stored) if amount <= budget]
        candidates = [np.array(self.menu.cheapest)] if not within else [self._path[within[0]][1]]
        if within and within[0]:
            (low, _), (high, start) = self._path[within[0] - 1], self._path[within[0]]
            for _ in range(BISECTIONS):
                middle = np.sqrt(low * high)
                places = self._descend(start, middle)
                if self.menu.dense - self._saved[self._all, places].sum() <= budget:
                    high = middle
                    candidates.append(places)
                else:
                    low = middle
        if len(self._all) <= FEW:  # where a local optimum can be far off, start from the additive one too
            candidates.append(np.array(sweep(self.menu, self.losses).solve(budget)))
        if self._alone:
            candidates = candidates[-LAST:]  # those of larger multipliers store less, and are worse for it
        distinct = {tuple(places): places for places in candidates}.values()
        refined = [self._exchange(self._fill(places, budget), budget) for places in distinct]
        values = [self.value(places) for places in refined]
        return list(map(int, refined[int(np.argmin(values))]))

    def _follow(self) -> None:
        """Descend along the multipliers upwards from dense and downwards from the cheapest; keep the better of both."""
        slopes = self._e[:, 1:] / np.maximum(self._saved[:, 1:], 1)
        known = slopes[(self._e[:, 1:] < NEVER / 2) & (slopes > 0)]
        low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
        multipliers = np.geomspace(low / 10, high * 100, MULTIPLIERS)
        if self._alone:
            self._path = [(float(multiplier), self._covered(multiplier)) for multiplier in multipliers]
            return
        up, down = [], []
        places = np.zeros(len(self._all), dtype=int)
        for multiplier in multipliers:
            places = self._descend(places, multiplier)
            up.append(places)
        places = np.array(self.menu.cheapest)
        for multiplier in multipliers[::-1]:
            places = self._descend(places, multiplier)
            down.append(places)
        for multiplier, a, b in zip(multipliers, up, down[::-1], strict=True):
            better = a if self._priced(a, multiplier) <= self._priced(b, multiplier) else b
            self._path.append((float(multiplier), better))

    def _covered(self, multiplier: float) -> np.ndarray:
        """The choice of least S − λ · saved where K is zero."""
        priced = np.minimum(self._e, UNLIKELY) - multiplier * self._saved
        offered = priced.copy()
        offered[~self._single, 0] = np.inf  # joint sites at dense are their weights' own sites at dense
        best = offered.argmin(1)
        values = offered[self._all, best] - priced[:, 0]  # against leaving a line at dense
        places = np.zeros(len(self._all), dtype=int)
        places[self._lone] = np.where(values[self._lone] < 0, best[self._lone], 0)
        for region in self._shared:
            taken = [region.members[member] for member in region.cover(values[list(region.members)].tolist())]
            places[taken] = best[taken]
        return places

    def _descend(self, start: np.ndarray, multiplier: float) -> np.ndarray:
        """A choice that no single site can lower S − λ · saved from; ``start`` stays as it is."""
        if self._alone:
            return self._covered(multiplier)
        places = start.copy()
        priced = self._e - multiplier * self._saved
        r = self._r[self._all, places]
        pull = self._coupling @ r
        for _ in range(ROUNDS):
            gains = priced + self._r * pull[:, None]
            gains -= gains[self._all, places][:, None]
            moved = False
            for i in np.argsort(gains.min(1)):
                if gains[i].min() >= -TINY:
                    break
                moved |= self._improve(int(i), places, priced, r, pull)
            if not moved:
                break
        return places

    def _improve(self, i: int, places: np.ndarray, priced: np.ndarray, r: np.ndarray, pull: np.ndarray) -> bool:
        """Move line ``i`` to its best option, its rivals to dense; whether that lowered the Lagrangian."""
        scores = priced[i] + self._r[i] * pull[i]
        place = int(scores.argmin())
        change = float(scores[place] - scores[places[i]])
        if change >= -TINY:
            return False
        rivals = [j for j in self.menu.rivals[i] if places[j]] if place else []
        trial = r.copy()
        trial[i] = self._r[i, place]
        for j in rivals:
            trial[j] = self._r[j, 0]
            change += priced[j, 0] - priced[j, places[j]]
        if rivals:
            alone = self._r[i, place] * pull[i] - r[i] * pull[i]
            change += 0.5 * float(trial @ self._coupling @ trial - r @ self._coupling @ r) - float(alone)
            if change >= -TINY:
                return False
        pull += self._coupling @ (trial - r)
        r[:] = trial
        places[i] = place
        places[rivals] = 0
        return True

    def _changes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every line and option: by how much the move alone changes S, and the stored values that it adds.

        Moves of lines whose rivals are treated count as bad as can be.
        """
        pull = self._coupling @ self._r[self._all, places]
        change = self._e + self._r * pull[:, None]
        change -= change[self._all, places][:, None]
        one, other = self._pairs.T
        change[one[places[other] > 0], 1:] = NEVER
        return change, self._saved[self._all, places][:, None] - self._saved

    def _fill(self, places: np.ndarray, budget: float) -> np.ndarray:
        """Spend what is left of ``budget`` on the moves that lower S most by the value stored."""
        places = places.copy()
        room = budget - self.menu.dense + float(self._saved[self._all, places].sum())
        while True:
            change, added = self._changes(places)
            worth = np.where((added <= room) & (change < -TINY), -change / np.maximum(added, 1.0), 0.0)
            i, place = divmod(int(worth.argmax()), worth.shape[1])
            if worth[i, place] <= 0:
                return places
            room -= added[i, place]
            places[i] = place

    def _exchange(self, places: np.ndarray, budget: float) -> np.ndarray:
        """Lower S by moves of two lines at once, one dearer and one cheaper, as long as any pair does within budget."""
        places = places.copy()
        for _ in range(EXCHANGES):
            change, added = self._changes(places)
            room = budget - self.menu.dense + float(self._saved[self._all, places].sum())
            rows, columns = np.nonzero((change < NEVER / 2) & (change != 0))
            worth, stored = change[rows, columns], added[rows, columns]
            up = np.argsort(np.where(stored > 0, worth, np.inf))[:PAIRED]
            down = np.argsort(np.where(stored < 0, worth, np.inf))[:PAIRED]
            up, down = up[stored[up] > 0], down[stored[down] < 0]
            step = self._r[rows, columns] - self._r[rows, places[rows]]
            cross = self._coupling[np.ix_(rows[up], rows[down])] * np.outer(step[up], step[down])
            both = worth[up][:, None] + worth[down][None, :] + cross
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
