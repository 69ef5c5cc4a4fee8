"""Perplexity: exp of the mean negative log-likelihood of the next token, in nats, on the split it is asked of."""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods import Cost
from rankfront.objectives._objective import register
from rankfront.objectives._subject import Subject

REFERENCE = 10.0  # times dense: a model ten times as perplexed as the dense one counts for nothing


@register
@dataclass(frozen=True)
class Perplexity:
    """exp(−(1/N) Σ log q(token | what came before in its window))."""

    name = "perplexity"
    unit = "exp(nats/token)"
    logarithmic = True

    def value(self, subject: Subject) -> float:
        return subject.scores.perplexity

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return dense, REFERENCE * dense
