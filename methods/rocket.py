"""ROCKET: the eigenbasis, thresholded once, and the atoms refitted.

    c_ji = w_jᵀ C^{1/2} v_i, v_i the first k eigenvectors of C^{1/2} Wᵀ W C^{1/2}
    kept where |c_ji| · ‖C^{-1/2} v_i‖^{1/2} is large

Each row keeps (1 − β) s of its coefficients, and the places so freed go to the largest left over in any row: rows have
s nonzeros on average. Then the atoms are refitted by ridge least squares.

Source: ROCKET (2602.11008) and its code, β = 5e-3. That what is left over is ranked by the same score, and that at
least one place a row is freed where s > 1, is our reading [M]. Its knapsack over layers is the search's task here.
"""

from __future__ import annotations

import math

from torch import Tensor

from rankfront.methods._dictionary import Dictionary, Whitened, largest_in_rows
from rankfront.methods._method import register

SHARED = 5e-3  # β, the share of places that rows compete for
LENGTH_POWER = 0.5  # of ‖C^{-1/2} v_i‖ in the score


def shared_mask(scores: Tensor, count: int) -> Tensor:
    """A mask (m, k) with m · ``count`` places: (1 − β) ``count`` of each row's largest, the rest the largest in all."""
    own = count - min(math.ceil(SHARED * count), count - 1)
    mask = largest_in_rows(scores, own)
    rest = scores.masked_fill(mask, -1).flatten().topk(len(scores) * (count - own), sorted=False).indices
    return mask.flatten().scatter(0, rest, True).view_as(mask)


class Rocket(Dictionary):
    """A whitened dictionary without iteration: one eigendecomposition, one threshold, one least squares."""

    formula = "W C^{1/2} ≈ A V_kᵀ, A thresholded by |c_ji| · ‖C^{-1/2} v_i‖^{1/2}, then Ŵ = A A⁺ W"

    def solve(self, target: Whitened, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        coefficients = target.coordinates[:, :atoms]
        scores = coefficients.abs() * target.lengths[:atoms] ** LENGTH_POWER
        return coefficients, shared_mask(scores, nonzeros)


register(Rocket(name="rocket", paper="2602.11008"))
