"""COMPOT: an orthonormal dictionary by Procrustes.

    minimise ‖Y − A D‖_F, D Dᵀ = I, s nonzeros in every row of A (m, k); Y = W C^{1/2}

In turns, A = the s largest in each row of Y Dᵀ, which is the optimum for orthonormal atoms, and D = U Vᵀ of the SVD of
Aᵀ Y, which is the optimum for given coefficients. It starts at the first k eigenvectors.

Source: COMPOT (2602.15200) [M]: k ≤ n, k/s = 2, 20 turns: that is `compot-published`. `compot` takes `TURNS` and
extrapolates, D = U Vᵀ of the SVD of M + (M − M'), M = AᵀY and M' that of the turn before, which reaches the error of
the 20 plain turns in about six. Both end with the atoms refitted without the constraint (see `_dictionary`).
Their pooled allocation over layers is the search's task here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._algebra import polar
from rankfront.methods._dictionary import Dictionary, Whitened, largest_in_rows
from rankfront.methods._method import register

TURNS, PUBLISHED_TURNS = 8, 20


def orthonormal_coding(y: Tensor, atoms: int, nonzeros: int, turns: int, ahead: float) -> tuple[Tensor, Tensor]:
    """Coefficients Y Dᵀ (m, k) and the mask (m, k) of the s largest in each row, of the best D met, for Y (m, q).

    ``ahead`` is how far each Procrustes target is extrapolated from the last: 0 is the published alternation.
    """
    dictionary = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:atoms]  # Y's own axes are the eigenvectors
    best = last = None
    for turn in range(turns + 1):
        projected = y @ dictionary.T  # (m, k)
        mask = largest_in_rows(projected.abs(), nonzeros)
        coefficients = projected * mask
        caught = float(coefficients.square().sum())  # ‖Y‖² less the error
        if best is None or caught > best[0]:
            best = (caught, coefficients, mask)
        if turn < turns:
            moment = coefficients.T @ y  # (k, q)
            dictionary = polar(moment if last is None else moment + ahead * (moment - last))
            last = moment
    assert best is not None
    return best[1], best[2]


@dataclass(frozen=True)
class Compot(Dictionary):
    """An orthonormal whitened dictionary; ``turns`` and ``ahead`` as in `orthonormal_coding`."""

    turns: int = TURNS
    ahead: float = 1.0
    formula = "W C^{1/2} ≈ A D, D Dᵀ = I, s nonzeros in each row of A, then Ŵ = A A⁺ W"

    def solve(self, target: Whitened, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        return orthonormal_coding(target.coordinates, atoms, nonzeros, self.turns, self.ahead)


register(Compot(name="compot", paper="2602.15200"))
register(Compot(name="compot-published", paper="2602.15200", turns=PUBLISHED_TURNS, ahead=0.0))
