"""How a search with several rungs closes: by promoting its front.

What a search returns is a front, and a front is of one rung. So a search keeps back what it takes to measure the front
as it stands on the higher rungs too, and spends that once nothing else fits into its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.optimise.halving import Promotion, in_order, known_at, reach
from rankfront.search.storage.front import DENSE_KEY, Row, comparable, compressed_front, dense_row
from rankfront.search.tuning import DEFAULT


@dataclass(frozen=True, eq=False)
class Closing:
    """What promoting the front takes of what is left; with one rung nothing.

    What is spent and left is a pair (trials, tokens), as an array.

    Attributes:
        rows: of the study.
        left: of its limits.
        limit: those of the whole study.
        tokens: what a trial at each rung runs through the model.
        teacher_tokens: what this launch will run through the dense model at each rung, for its divergences.
    """

    rows: Sequence[Row]
    left: np.ndarray
    limit: np.ndarray
    tokens: Sequence[int]
    teacher_tokens: Sequence[int]

    def explores(self, following: FrozenTrial | None) -> bool:
        """Whether what is next in the queue, ``following``, or a proposal, may be measured.

        It may if the front can still be promoted afterwards, even if the plan joins it.
        """
        known = following.user_attrs if following is not None else {}
        rung, source = int(known.get(keys.RUNG, 0)), known.get(keys.PROMOTED)
        joined = rung and any(row.number == source and row.plan_key in self._due[rung] for row in self.rows)
        return bool(joined and rung <= self._goal) or self._fits(rung, self._goal)

    @property
    def reserve(self) -> np.ndarray:
        """What is kept back to promote the front."""
        return self._cost(self._goal)

    def following(self, exhausted: bool) -> Promotion | None:
        """The next plan to measure higher for the front to stand there: the lowest rung first, the dense model before
        others. None where all is done, more does not fit into what is left, or what runs has to finish first.

        What is left then is too little to go on searching, for a plan that joined the front could not be promoted: it
        is spent as high as possible on those next in order, unless the search was ``exhausted``.
        """
        due, rows = self._due, self.rows
        goal = self._reachable(1.0) if exhausted else self._goal
        rung = next((rung for rung in range(1, goal + 1) if due[rung]), None)
        if rung is not None:
            if DENSE_KEY in due[rung]:
                dense = dense_row(rows, rung=0)
                return Promotion(dense.number, rung) if dense else None
            ready = [row for row in comparable(rows, rung - 1) if row.plan_key in due[rung] and not row.is_dense]
            return Promotion(in_order(ready)[0].number, rung) if ready else None
        for rung in range(goal, 0, -1) if not exhausted else ():
            known = known_at(rows, rung)
            others = [row for row in comparable(rows, rung - 1) if row.within and row.plan_key not in known]
            if others and self._fits(rung, goal):
                return Promotion(in_order(others)[0].number, rung)
        return None

    @cached_property
    def _due(self) -> list[set[str | None]]:
        """Keys of the plans that each rung still has to start on for the front to stand there; none at the first.

        What is due at a rung or runs there is taken to join its front.
        """
        due: list[set[str | None]] = [set()]
        for rung in range(1, len(self.tokens)):
            running = {row.plan_key for row in self.rows if row.rung == rung - 1 and row.state == "running"}
            below = {row.plan_key for row in compressed_front(self.rows, rung - 1)} | due[-1] | running
            due.append((below | {DENSE_KEY}) - known_at(self.rows, rung) if below - {DENSE_KEY} else set())
        return due

    @cached_property
    def _goal(self) -> int:
        """The highest rung that the front can be promoted to while the search goes on."""
        return self._reachable(DEFAULT.closing_share)

    def _reachable(self, share: float) -> int:
        """The highest rung that the front can be promoted to with what is left and a ``share`` of the limits."""
        for rung in range(reach(self.rows, len(self.tokens)), 0, -1):
            cost = self._cost(rung)
            if (cost <= self.left).all() and (cost + self._entry(0, rung) <= share * self.limit).all():
                return rung
        return 0

    def _fits(self, rung: int, goal: int) -> bool:
        """Whether a plan at ``rung`` may join what is promoted to ``goal``."""
        return bool((self._cost(goal) + self._entry(rung, goal) <= self.left).all())

    def _cost(self, goal: int) -> np.ndarray:
        """What it takes to promote the front to ``goal``."""
        counts = np.array([len(plans) for plans in self._due[: goal + 1]])
        tokens = counts @ np.array(self.tokens[: goal + 1]) + sum(self.teacher_tokens[: goal + 1])
        return np.array([counts.sum(), tokens])

    def _entry(self, rung: int, goal: int) -> np.ndarray:
        """What a plan takes that is measured at ``rung`` and goes on to ``goal``."""
        above = sum(self.teacher_tokens[goal + 1 : rung + 1])
        return np.array([max(goal - rung, 0) + 1, sum(self.tokens[rung : max(goal, rung) + 1]) + above])
