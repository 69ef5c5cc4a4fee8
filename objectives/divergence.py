"""Divergence: how far the compressed model's next-token distributions moved from the dense model's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rankfront.methods import Cost
from rankfront.objectives._objective import register
from rankfront.objectives._subject import Subject

REFERENCE = math.log(10.0)  # nats a token, beside perplexity's factor of ten


@register
@dataclass(frozen=True)
class Divergence:
    """(1/N) Σ KL(dense ‖ compressed) over predicted tokens, on the teacher's top k tokens and the rest.

    k is `TEACHER_TOP_K` (1,024), noted as ``divergence_top_k``; it is never more than on the whole vocabulary, and
    studies/results/divergence.md says how much less.
    """

    name = "divergence"
    unit = "nats/token"
    logarithmic = False

    def value(self, subject: Subject) -> float:
        from rankfront.objectives._scores import TEACHER_TOP_K

        subject.notes["divergence_top_k"] = TEACHER_TOP_K
        return subject.scores.divergence

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return 0.0, REFERENCE
