"""Sums of Kronecker products: Van Loan's rearrangement makes the best ones a truncated SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import paired_modes
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, kronecker_storage
from rankfront.methods._tensor import NestedFormat, level_errors
from rankfront.methods._weighting import Unweighted

MODES = 2


@dataclass(frozen=True)
class Kronecker(NestedFormat):
    """Ŵ = Σ_{r ≤ R} A_r ⊗ B_r, A_r (m_1, n_1) and B_r (m_2, n_2), the minimiser of ‖W − Ŵ‖_F.

    m = m_1 m_2 and n = n_1 n_2 by balanced divisors, or padded; R (m_1 n_1 + m_2 n_2) values. Van Loan & Pitsianis,
    "Approximation with Kronecker products" (1993): the rearranged weight (m_1 n_1, m_2 n_2) has A ⊗ B as
    vec(A) vec(B)ᵀ, so its truncated SVD is optimal, and what is left is the tail of its spectrum. Where modes are
    padded the optimum is that of the padded weight. Nested, with the norm of a term shared equally between A and B.

    The metric is the identity: S⁻¹ of whitening would be dense and is no Kronecker product. Own solver: TensorLy has
    none, and the SVD is the one that low rank has.
    """

    name: str = "kronecker"
    paper: str = "Van Loan & Pitsianis 1993"
    family: str = "tensor-product subspaces"
    geometry: str = "blocks of the weight lie in one subspace of R small matrices"
    metric: str = "identity"
    formula: str = "Ŵ = Σ_r A_r ⊗ B_r, truncated SVD of the rearranged W"
    needs: tuple[str, ...] = ()
    kind = "kronecker"
    ranked = {"left": 0, "right": 0}  # noqa: RUF012 - a constant

    def cost(self, m: int, n: int, level: int) -> Storage:
        modes = paired_modes(m, n, MODES)
        return kronecker_storage(modes.rows, modes.columns, level)

    def full(self, m: int, n: int) -> int:
        return min(paired_modes(m, n, MODES).pairs)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight = weights["weight"]
        m, n = weight.shape
        modes = paired_modes(m, n, MODES)
        kept = self.sized(m, n, [self.kept(option) for option in options])
        rearranged = modes.tensor(weight)  # (m_1 n_1, m_2 n_2)
        left = weighted_subspace(rearranged, Unweighted())[0][:, :kept]
        right = left.T @ rearranged  # (k, m_2 n_2)
        energies = right.square().sum(1)
        scale = right.norm(dim=1).sqrt()[:, None]
        shared = right / torch.where(scale > 0, scale, 1)
        stored = {
            "left": (left.T * scale).unflatten(1, (modes.rows[0], modes.columns[0])).contiguous(),
            "right": shared.unflatten(1, (modes.rows[1], modes.columns[1])),
        }

        def term(i: int) -> Tensor:
            return torch.kron(stored["left"][i], stored["right"][i])[:m, :n]

        errors = level_errors(weight, energies, term if modes.padded else None)
        return {name: tensor.float() for name, tensor in stored.items()} | errors


register(Kronecker())
