"""Tensor trains over two modes of the outputs and the inputs as a whole, in the whitening metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import balanced_divisors, even_norms, leading_basis, padded_rows
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, ring_storage
from rankfront.methods._tensor import TensorFormat

MODES = 2


@dataclass(frozen=True)
class TensorTrain(TensorFormat):
    """Ŵ[(i_1 i_2), j] = Σ G_1[i_1, a] G_2[a, i_2, b] G_3[b, j], G_1 (m_1, r_1), G_2 (r_1, m_2, r_2), G_3 (r_2, n).

    m_1 r_1 + r_1 m_2 r_2 + r_2 n values, m = m_1 m_2 by balanced divisors, or padded. TT-SVD (Oseledets 2011,
    Algorithm 1) of W S with S Sᵀ = C: its first two cores are orthonormal, together Q (m, r_2), and the third is
    Qᵀ W S. Inputs are one mode, so S⁻¹ folds into it, and G_3 = Qᵀ W needs no inverse: singular C do no harm.
    From one level r follow r_1 = min(r, m_1) and r_2 = min(r, r_1 m_2, n), all ranks alike and capped. Where
    r_1 = m_1 the train is whitened low rank with one small core to spare; smaller r_1 at the same price lost more on
    each weight that was tried (q, v, o and gate of a block of a 135M model at four kept fractions).

    With a single core for all outputs, m_1 = 1, it is `svd-llm`, and with C = I `svd`. Own solver: TensorLy's takes
    SVDs of W S itself and would need S⁻¹ for the last core, ours takes eigenvectors of the smaller side.
    """

    name: str = "tensor-train"
    paper: str = "Oseledets 2011"
    family: str = "tensor-product subspaces"
    geometry: str = "outputs projected on a subspace that a chain over two modes spans, weighed by real inputs"
    metric: str = "whitening"
    formula: str = "Ŵ = Q Qᵀ W, Q = G_1 G_2 of the tensor train of W S, S Sᵀ = C = Σ_t x_t x_tᵀ"
    needs: tuple[str, ...] = ("gram",)
    kind = "tensor-train"

    def ranks(self, m: int, n: int, level: int) -> tuple[int, int]:
        first, second = balanced_divisors(m, MODES)
        r1 = min(level, first)
        return r1, min(level, r1 * second, n)

    def cost(self, m: int, n: int, level: int) -> Storage:
        return ring_storage((*balanced_divisors(m, MODES), n), (1, *self.ranks(m, n, level), 1))

    def full(self, m: int, n: int) -> int:
        return max(self.ranks(m, n, m * n))

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
        r1, r2 = self.ranks(m, n, self.kept(options[0]))
        work = padded_rows(weight, m1 * m2)
        first = leading_basis(weighting.times_root(work).reshape(m1, -1), r1)
        projected = (first.T @ work.reshape(m1, -1)).reshape(r1 * m2, n)
        second = weighted_subspace(projected, weighting)[0][:, :r2]  # (r_1 m_2, r_2)
        third = second.T @ projected
        cores = even_norms(first, second.reshape(r1, m2, r2), third)
        return self.fitted(weight, dict(zip(("first", "second", "third"), cores, strict=True)), weighting)


register(TensorTrain())
