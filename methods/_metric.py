"""Metrics: from what calibration measured to the right weighting S of ‖(W − Ŵ) S‖_F."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._weighting import Diagonal, Unweighted, Weighting

ASVD_ALPHA = 0.5  # ASVD (2312.05821), the published exponent


@dataclass(frozen=True)
class Metric:
    """A named way to weigh the error of a weight's columns.

    Attributes:
        name: as shown to users.
        formula: S in one line.
        needs: the statistics it reads.
        weigh: statistics of one weight to its weighting.
    """

    name: str
    formula: str
    needs: tuple[str, ...]
    weigh: Callable[[Statistics], Weighting]


IDENTITY = Metric("identity", "S = I", (), lambda statistics: Unweighted())

FISHER = Metric(
    "fisher",
    "S = diag(√f), f_j = Σ_t ‖g_t‖² x_tj²",
    ("fisher",),
    lambda statistics: Diagonal(collected(statistics.fisher, "fisher")),
)

ACTIVATION = Metric(
    "activation",
    f"S = diag(mean|x|^{ASVD_ALPHA})",
    ("absolute",),
    lambda statistics: Diagonal(
        (collected(statistics.absolute, "absolute").double() / statistics.tokens) ** (2 * ASVD_ALPHA)
    ),
)

WHITENING = Metric(
    "whitening",
    "S Sᵀ = C = Σ_t x_t x_tᵀ",
    ("gram",),
    lambda statistics: collected(statistics.gram, "gram"),
)
