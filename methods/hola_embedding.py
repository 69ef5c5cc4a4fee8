"""``hola-embedding``: tied embedding table and output head factored once, E ≈ A B, tokens weighed by their frequency.

    minimise Σ_i (c_i + 1) Σ_t ((E_i − Ê_i) x_t)² = ‖R (E − Ê) C^{1/2}‖²_F,    R = diag(√(c + 1)), C = Σ_t x_t x_tᵀ

over rank r: A (vocabulary, r) are coordinates of every token in the basis B (r, n) that all of them share, c_i is how
often token i occurs in the calibration text, x_t the last hidden states, which the head reads. The table looks rows of
A up and multiplies by B; the head multiplies by Bᵀ and Aᵀ: one pair of factors, so the model stays tied. The one that
is added to every count keeps tokens that calibration never met: their rows are projected on the same basis.

Source: HOLa (2507.15542) for the form, features of classes F ≈ W_t B with a basis B that is shared, here of tokens
instead of actions. Here nothing is centred and no scale dropped (the released start normalises the basis and
loses it); its training losses are no part of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import Site, register
from rankfront.methods._metric import TOKENS


@dataclass(frozen=True)
class TokenBasis(LowRank):
    """Low rank of the one matrix that embedding table and output head share."""

    family = "shared subspace"

    def refuses(self, site: Site) -> str | None:
        if len(site.weights) == 1 and not site.weights[0].tied:
            return "its rows are no tokens: it treats the matrix that embedding table and output head share"
        return super().refuses(site)


register(TokenBasis("hola-embedding", "2507.15542", TOKENS))
