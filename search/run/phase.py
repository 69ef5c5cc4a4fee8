"""Where a launch stands between its limits: exploring, promoting the front, or done with trials."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rankfront.search.optimise.closing import Closing
from rankfront.search.optimise.halving import Promotion, promotion_of
from rankfront.search.storage.front import StudyState


@dataclass(frozen=True, eq=False)
class Phase:
    """What may start now.

    Attributes:
        state: the study as it is.
        closing: what promoting its front takes of what is left.
        in_time: whether the launch's time is not over.
        only: the trial whose plan alone is measured, or None.
        exhausted: whether proposals only repeat what was measured.
    """

    state: StudyState
    closing: Closing
    in_time: bool
    only: int | None
    exhausted: bool

    @cached_property
    def searching(self) -> bool:
        """Whether more trials may start."""
        within = self.in_time and bool((self.closing.left > 0).all())
        return within and (self.exploring or self.promotion is not None)

    @cached_property
    def exploring(self) -> bool:
        """Whether what starts next, if anything, is the next of the queue or a proposal, no promotion of the front."""
        if self.exhausted or self.only is not None:
            return False
        waiting = self.state.waiting
        return len(self.closing.tokens) == 1 or self.closing.explores(waiting[0] if waiting else None)

    @cached_property
    def promotion(self) -> Promotion | None:
        """The next measurement that promotes the front, or the one plan that is measured."""
        if self.only is not None:
            return promotion_of(self.state.rows, self.only)
        return self.closing.following(self.exhausted)
