"""Error rate: the share of predictions that the model gets wrong."""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods import Cost
from rankfront.objectives._objective import register
from rankfront.objectives._subject import Subject


@register
@dataclass(frozen=True)
class ErrorRate:
    """1 − accuracy: (1/N) Σ [argmax q ≠ y] over labelled texts, over masked tokens, or over next tokens."""

    name = "error_rate"
    unit = "share wrong"
    logarithmic = False

    def value(self, subject: Subject) -> float:
        from rankfront.objectives._scores import error_rate

        if subject.task.labelled:  # counted with the rest
            return subject.scores.error_rate
        with subject.clock.phase("evaluate"):
            return error_rate(subject.model, subject.windows, subject.task)

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return 0.0, 1.0
