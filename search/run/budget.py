"""What a study may spend, has spent, and is about to: trials, and tokens run through the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig, preferred_loss
from rankfront.search.optimise.closing import Closing
from rankfront.search.plans.slope_cost import PASSES, slope_tokens
from rankfront.search.run.in_flight import InFlight
from rankfront.search.storage.front import StudyState
from rankfront.search.storage.trials import rung_of
from rankfront.search.tuning import DEFAULT


@dataclass(frozen=True)
class Budget:
    """The limits of a study, and what of them is left: a function of them, of the study's state and what is in flight.

    What is spent and left is a pair (trials, tokens), as an array.

    Attributes:
        limit: of the whole study; infinite where there is none.
        tokens: what a trial at each rung runs through the model.
        teachers: models that each have to learn what the dense one predicts at a rung before they measure there; 0
            where no objective compares with that.
        quality: the objective that slopes are of, if there is one.
        readable: tokens of the search split that slopes read: those that no trial does, where they are enough.
    """

    limit: np.ndarray
    tokens: tuple[int, ...]
    teachers: int
    quality: str | None
    readable: int

    @classmethod
    def of(cls, config: StudyConfig) -> Budget:
        """The limits and costs that a study states."""
        search, data, windows = config.search, config.data, config.rung_windows()
        unread = (data.search.windows - windows[-1].stop) * data.length
        return cls(
            limit=np.array([search.trials, math.inf if search.tokens is None else search.tokens], dtype=float),
            tokens=tuple((part.stop - part.start) * data.length for part in windows),
            teachers=max(search.workers or 0, 1) if "divergence" in config.objectives else 0,
            quality=preferred_loss(config),
            readable=unread if unread >= DEFAULT.slope_tokens else data.search.windows * data.length,
        )

    @property
    def passes(self) -> int:
        """Tokens that slopes cost for each that they read."""
        return PASSES[self.quality] if self.quality is not None else 0

    def promised(self, running: InFlight) -> np.ndarray:
        """What the trials and slopes that run will have spent; slopes count as trials until they are told."""
        tokens = sum(
            self.passes * trial.user_attrs.get(keys.SLOPE_TOKENS, DEFAULT.slope_tokens)
            if keys.SLOPES_OF in trial.user_attrs
            else self.tokens[rung_of(trial)]
            for trial in running.trials.values()
        )
        return np.array([len(running.trials), tokens])

    def left(self, state: StudyState, running: InFlight) -> np.ndarray:
        """What the limits leave once what runs is measured."""
        left: np.ndarray = self.limit - (state.spent, state.tokens) - self.promised(running)
        return left

    def closing(self, state: StudyState, running: InFlight) -> Closing:
        """What promoting the front in the end takes of what is left."""
        teaching = [max(self.teachers - running.measured[rung], 0) * tokens for rung, tokens in enumerate(self.tokens)]
        return Closing(state.rows, self.left(state, running), self.limit, self.tokens, teaching)

    def unreserved(self, state: StudyState, running: InFlight) -> np.ndarray:
        """What is left beside what promoting the front takes."""
        closing = self.closing(state, running)
        left: np.ndarray = closing.left - closing.reserve
        return left

    def slope_tokens(self, state: StudyState, running: InFlight) -> int:
        """Of how many tokens slopes would be measured now; 0 where the limit leaves too few for them and trials."""
        assert self.quality is not None
        room = (self.unreserved(state, running)[1] - self.tokens[0]) / self.passes
        fitting = min(slope_tokens(state.tokens, self.quality), self.readable, room)
        return int(fitting) if fitting >= min(DEFAULT.slope_tokens, self.readable) else 0
