"""What calibration measures for a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from rankfront.methods._weighting import Gram

NEEDS = ("gram", "absolute", "fisher", "gradient", "frequency")
WIDEST = 8  # outputs per input up to which Γ is summed: that of a head would be the vocabulary squared
T = TypeVar("T")


def narrow_outputs(out_features: int, in_features: int) -> bool:
    """Whether a weight's Γ (m, m) is summed at all."""
    return out_features <= WIDEST * in_features


@dataclass
class Statistics:
    """Sums over the calibration tokens t of one weight's inputs x_t (n,) and output gradients g_t (m,).

    Weights that read the same input are handed the same `gram` object, so its root is computed once.
    What no chosen method needs stays None.

    Attributes:
        tokens: how many tokens were seen.
        gram: C = Σ_t x_t x_tᵀ, (n, n), uncentred.
        absolute: Σ_t |x_t|, (n,).
        fisher: f_j = Σ_t ‖g_t‖² x_tj², (n,): token-wise Fisher information, summed over outputs.
        gradient: Γ = Σ_t g_t g_tᵀ, (m, m), over the tokens of each batch whose ‖g_t‖ lies in the middle three quarters.
        frequency: how often each token id occurs, (m,); of a matrix that the embedding table and the head share.
    """

    tokens: int
    gram: Gram | None = None
    absolute: Tensor | None = None
    fisher: Tensor | None = None
    gradient: Tensor | None = None
    frequency: Tensor | None = None


def collected(statistic: T | None, name: str) -> T:
    """The statistic, or ValueError where calibration was not asked for it, or had none."""
    if statistic is None:
        raise ValueError(
            f"the statistic {name!r} was not collected: the method has it not in its needs, or no gradient comes here"
        )
    return statistic
