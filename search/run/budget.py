"""What a study may spend, has spent, and is about to: trials, and tokens run through the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig, preferred_loss
from rankfront.search.plans.job import PASSES
from rankfront.search.run.in_flight import InFlight
from rankfront.search.storage.front import StudyState
from rankfront.search.tuning import TUNING


def slope_tokens(spent: int, quality: str) -> int:
    """Of how many tokens slopes of ``quality`` are measured once a study has ``spent`` so many."""
    return max(TUNING.slope_tokens, int(TUNING.slope_share * spent / PASSES[quality]))


@dataclass(frozen=True)
class Budget:
    """The limits of a study, and what of them is left: a function of them, of the study's state and what is in flight.

    What is spent and left is a pair (trials, tokens), as an array.

    Attributes:
        limit: of the whole study; infinite where there is none.
        trial: tokens that a trial runs through the model.
        quality: the objective that slopes are of, if there is one.
        readable: tokens of the search split that slopes read: those that no trial does, where they are enough.
    """

    limit: np.ndarray
    trial: int
    quality: str | None
    readable: int

    @classmethod
    def of(cls, config: StudyConfig) -> Budget:
        """The limits and costs that a study states."""
        search, data = config.search, config.data
        unread = (data.search.windows - config.trial_windows) * data.length
        return cls(
            limit=np.array([search.trials, math.inf if search.tokens is None else search.tokens], dtype=float),
            trial=config.trial_windows * data.length,
            quality=preferred_loss(config),
            readable=unread if unread >= TUNING.slope_tokens else data.search.windows * data.length,
        )

    @property
    def passes(self) -> int:
        """Tokens that slopes cost for each that they read."""
        return PASSES[self.quality] if self.quality is not None else 0

    def left(self, state: StudyState, running: InFlight) -> np.ndarray:
        """What the limits leave once what runs is measured; slopes count as trials until they are told."""
        promised = sum(
            self.passes * trial.user_attrs.get(keys.SLOPE_TOKENS, TUNING.slope_tokens)
            if keys.SLOPES_OF in trial.user_attrs
            else self.trial
            for trial in running.trials.values()
        )
        left: np.ndarray = self.limit - (state.spent, state.tokens) - (len(running.trials), promised)
        return left

    def slope_tokens(self, state: StudyState, running: InFlight) -> int:
        """Of how many tokens slopes would be measured now; 0 where the limit leaves too few for them and a trial."""
        assert self.quality is not None
        room = (self.left(state, running)[1] - self.trial) / self.passes
        fitting = min(slope_tokens(state.tokens, self.quality), self.readable, room)
        return int(fitting) if fitting >= min(TUNING.slope_tokens, self.readable) else 0
