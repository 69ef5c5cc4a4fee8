"""What a launch may start now, within its limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankfront.search.storage.front import StudyState


@dataclass(frozen=True, eq=False)
class Phase:
    """What may start now.

    Attributes:
        state: the study as it is.
        left: trials and tokens that the limits leave.
        in_time: whether the launch's time is not over.
        only: the trial whose plan alone is measured, or None.
        exhausted: whether proposals only repeat what was measured.
    """

    state: StudyState
    left: np.ndarray
    in_time: bool
    only: int | None
    exhausted: bool

    @property
    def searching(self) -> bool:
        """Whether more trials may start."""
        return self.in_time and bool((self.left > 0).all()) and (self.exploring or self.only_waits)

    @property
    def exploring(self) -> bool:
        """Whether what starts next, if anything, is the next of the queue or a proposal."""
        return not self.exhausted and self.only is None

    @cached_property
    def only_waits(self) -> bool:
        """Whether the one trial that is measured is in the queue."""
        return any(trial.number == self.only for trial in self.state.waiting)
