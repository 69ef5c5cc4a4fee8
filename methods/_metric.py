"""Metrics: from what calibration measured to the weightings R and S of ‖R (W − Ŵ) S‖_F."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankfront.methods._algebra import shrunk
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._weighting import (
    Diagonal,
    Gram,
    LeftDiagonal,
    LeftGram,
    LeftWeighting,
    Unweighted,
    Weighting,
)

ASVD_ALPHA = 0.5  # ASVD (2312.05821), the published exponent
UNSEEN = 1.0  # occurrences added to every token's count, so that one that calibration never met weighs as a rare one
INPUT_SHRINKAGE, GRADIENT_SHRINKAGE = 0.1, 0.3  # KFAC-SVD in LEMS, the shipped shares


@dataclass(frozen=True)
class Metric:
    """A named way to weigh the error of a weight's columns, and of its rows.

    Attributes:
        name: as shown to users.
        formula: S in one line.
        geometry: how distances are measured, in words.
        needs: the statistics it reads.
        weigh: statistics of one weight to its weighting S.
        left: statistics to the weighting R of the rows; None where R = I.
    """

    name: str
    formula: str
    geometry: str
    needs: tuple[str, ...]
    weigh: Callable[[Statistics], Weighting]
    left: Callable[[Statistics], LeftWeighting] | None = None


IDENTITY = Metric("identity", "S = I", "all entries alike", (), lambda statistics: Unweighted())

FISHER = Metric(
    "fisher",
    "S = diag(√f), f_j = Σ_t ‖g_t‖² x_tj²",
    "inputs weighed by how much the loss feels them",
    ("fisher",),
    lambda statistics: Diagonal(collected(statistics.fisher, "fisher")),
)

ACTIVATION = Metric(
    "activation",
    f"S = diag(mean|x|^{ASVD_ALPHA})",
    "inputs weighed by their size",
    ("absolute",),
    lambda statistics: Diagonal(
        (collected(statistics.absolute, "absolute").double() / statistics.tokens) ** (2 * ASVD_ALPHA)
    ),
)

WHITENING = Metric(
    "whitening",
    "S Sᵀ = C = Σ_t x_t x_tᵀ",
    "weighed by the outputs on real inputs",
    ("gram",),
    lambda statistics: collected(statistics.gram, "gram"),
)

TWO_SIDED = Metric(
    "two-sided whitening",
    f"S Sᵀ = C shrunk by {INPUT_SHRINKAGE}, RᵀR = Γ = Σ_t g_t g_tᵀ clipped and shrunk by {GRADIENT_SHRINKAGE}",
    "weighed by real inputs and by the loss's gradients",
    ("gram", "gradient"),
    lambda statistics: Gram(shrunk(collected(statistics.gram, "gram").raw, INPUT_SHRINKAGE)),
    lambda statistics: LeftGram(shrunk(collected(statistics.gradient, "gradient"), GRADIENT_SHRINKAGE)),
)

TOKENS = Metric(
    "token frequency",
    f"S Sᵀ = C = Σ_t x_t x_tᵀ, R = diag(√(c + {UNSEEN:g})), c_i the occurrences of token i",
    "tokens weighed by how often they occur, columns by the last hidden states",
    ("gram", "frequency"),
    lambda statistics: collected(statistics.gram, "gram"),
    lambda statistics: LeftDiagonal(collected(statistics.frequency, "frequency").double() + UNSEEN),
)
