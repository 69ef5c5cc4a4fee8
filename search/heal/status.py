"""Where a healing is, and what its stages did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Status:
    """Where a healing is.

    Attributes:
        stage: which.
        done, tokens: tokens seen, and to be seen, in all.
        loss: of the newest step, or the newest block's error relative to its start.
        measure: what is measured on held-out windows: the divergence from the dense model, or the entropy of the text.
        start, now: this before and as last measured, nats a token.
        seconds: since this launch began healing; `resumed` tokens were seen before it.
    """

    tokens: int
    measure: str = "divergence"
    stage: str = ""
    done: int = 0
    resumed: int = 0
    loss: float = float("nan")
    start: float = float("nan")
    now: float = float("nan")
    seconds: float = 0.0

    @property
    def closed(self) -> float:
        """Share of the held-out divergence that is gone."""
        return 1 - self.now / self.start if self.start > 0 else 0.0

    @property
    def left(self) -> float:
        """Seconds to go, at the pace of this launch."""
        seen = self.done - self.resumed
        return (self.tokens - self.done) * self.seconds / seen if seen else float("nan")


@dataclass(frozen=True)
class StageResult:
    """What a stage did: tokens, seconds, held-out divergence before and after, and what went wrong, if anything."""

    stage: str
    tokens: int
    seconds: float
    before: float
    after: float
    note: str | None = None
