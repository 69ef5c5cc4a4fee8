"""Tucker decompositions over two modes of the outputs and the inputs as a whole, in the whitening metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import balanced_divisors, even_norms, leading_basis, padded_rows
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, tucker_storage
from rankfront.methods._tensor import TensorFormat
from rankfront.methods._weighting import Weighting

MODES = 2
SWEEPS = 3  # of HOOI, after HOSVD


def hooi(scaled: Tensor, ranks: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Orthonormal U_1 (m_1, R_1) and U_2 (m_2, R_2) for a tensor (m_1, m_2, n): `SWEEPS` of HOOI from HOSVD.

    De Lathauwer, De Moor & Vandewalle (2000), "On the best rank-(R_1, R_2, …, R_N) approximation". Each step is the
    optimum for one mode while the others stand, so nothing a sweep does can hurt.
    """
    m1, m2, n = scaled.shape
    r1, r2, r3 = ranks
    first = leading_basis(scaled.reshape(m1, -1), r1)
    second = leading_basis(scaled.transpose(0, 1).reshape(m2, -1), r2)
    for _ in range(SWEEPS if (r1, r2) != (m1, m2) else 0):
        inner = torch.einsum("ijk,ia,jb->abk", scaled, first, second).reshape(r1 * r2, n)
        inputs = leading_basis(inner.T, r3)
        seen = scaled @ inputs  # (m_1, m_2, R_3)
        first = leading_basis(torch.einsum("ijk,jb->ibk", seen, second).reshape(m1, -1), r1)
        second = leading_basis(torch.einsum("ijk,ia->jak", seen, first).reshape(m2, -1), r2)
    return first, second


def tucker_factors(
    work: Tensor, weighting: Weighting, modes: tuple[int, int], ranks: tuple[int, int, int]
) -> list[Tensor]:
    """Core (R_1, R_2, R_3) and factors (m_1, R_1), (m_2, R_2), (R_3, n) of W (m_1 m_2, n) under ‖(W − Ŵ) S‖_F."""
    m1, m2 = modes
    r1, r2, r3 = ranks
    first, second = hooi(weighting.times_root(work).reshape(m1, m2, -1), ranks)
    inner = torch.einsum("ijk,ia,jb->abk", work.reshape(m1, m2, -1), first, second).reshape(r1 * r2, -1)
    core = weighted_subspace(inner, weighting)[0][:, :r3]  # (R_1 R_2, R_3)
    return even_norms(core.reshape(r1, r2, r3), first, second, core.T @ inner)


@dataclass(frozen=True)
class Tucker(TensorFormat):
    """Ŵ = G ×_1 U_1 ×_2 U_2 ×_3 U_3ᵀ of W as a tensor (m_1, m_2, n), G (R_1, R_2, R_3), U_k (m_k, R_k), U_3 (R_3, n).

    R_1 R_2 R_3 + m_1 R_1 + m_2 R_2 + R_3 n values, m = m_1 m_2 by balanced divisors, or padded. Outputs are two modes,
    for with one Tucker is an SVD and a core to spare; inputs are one, so that the metric folds in: HOSVD and HOOI
    (De Lathauwer et al. 2000) of W S with S Sᵀ = C give orthonormal U_1, U_2 and G, whose product is Q (m, R_3), and
    the input factor U_3 S = Qᵀ W S is met by U_3 = Qᵀ W. No inverse: singular C do no harm. From one level r follow
    R_k = min(r, m_k) and R_3 = min(r, R_1 R_2, n), all ranks alike and capped. Where both output modes are whole the
    optimum is whitened low rank with small factors to spare; any smaller R_1 or R_2 at the same price lost more on each
    weight that was tried (q, v, o and gate of a block of a 135M model at four kept fractions), so no other rule is
    offered.

    Own solver: TensorLy's HOOI takes SVDs of unfoldings that are as large as W in every step, ours only eigenvectors
    of the smaller side. A local optimum where R_1 < m_1 or R_2 < m_2.
    """

    name: str = "tucker"
    paper: str = "De Lathauwer et al. 2000"
    family: str = "tensor-product subspaces"
    geometry: str = (
        "a subspace for each mode of the outputs and for the inputs, joined by a core, weighed by real inputs"
    )
    metric: str = "whitening"
    formula: str = "Ŵ = Q Qᵀ W, Q = (U_1 ⊗ U_2) G of the Tucker decomposition of W S, S Sᵀ = C = Σ_t x_t x_tᵀ"
    needs: tuple[str, ...] = ("gram",)
    kind = "tucker"

    def ranks(self, m: int, n: int, level: int) -> tuple[int, int, int]:
        r1, r2 = (min(level, size) for size in balanced_divisors(m, MODES))
        return r1, r2, min(level, r1 * r2, n)

    def cost(self, m: int, n: int, level: int) -> Storage:
        return tucker_storage((*balanced_divisors(m, MODES), n), self.ranks(m, n, level))

    def full(self, m: int, n: int) -> int:
        return max(*balanced_divisors(m, MODES), self.ranks(m, n, m * n)[2])

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight, weighting = weights["weight"], collected(statistics["weight"].gram, "gram")
        m, n = weight.shape
        m1, m2 = balanced_divisors(m, MODES)
        ranks = self.ranks(m, n, self.kept(options[0]))
        factors = tucker_factors(padded_rows(weight, m1 * m2), weighting, (m1, m2), ranks)
        return self.fitted(weight, dict(zip(("core", "first", "second", "third"), factors, strict=True)), weighting)


register(Tucker())
