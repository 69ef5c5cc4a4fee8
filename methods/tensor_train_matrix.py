"""Tensor trains of matrices (matrix product operators), fitted by TT-SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import Modes, even_norms, paired_modes
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, ring_storage
from rankfront.methods._tensor import TensorFormat, with_tensorly

MODES = 3


def train_cores(modes: Modes, weight: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """TT-SVD of W (m, n) with paired modes: cores (r_{k−1}, m_k, n_k, r_k) in fp64, ranks (1, r_1, …, 1).

    All but the last are orthonormal. Two cores are the truncated SVD of the rearranged weight. Raises ValueError where
    W is not finite.
    """
    train = with_tensorly("tensor_train", modes.tensor(weight), rank=list(ranks))
    sizes = zip(train, modes.rows, modes.columns, strict=True)
    return [core.unflatten(1, (m, n)) for core, m, n in sizes]


@dataclass(frozen=True)
class TensorTrainMatrix(TensorFormat):
    """T[i_1 i_2 i_3] = G_1[i_1] G_2[i_2] G_3[i_3] for W with paired modes, G_k (r_{k−1}, m_k n_k, r_k), r_0 = r_3 = 1.

    Σ r_{k−1} I_k r_k values; Novikov et al. (1509.06569), Section 3. From one level r follow r_1 = min(r, I_1) and
    r_2 = min(r, r_1 I_2, I_3): all ranks alike, capped by the unfoldings. Oseledets (2011), Algorithm 1, TT-SVD:
    ‖W − Ŵ‖² is at most the sum of what each unfolding's SVD drops, hence within √2 of the optimum. Three cores, for
    two are a sum of Kronecker products, which `kronecker` fits at its best.

    The metric is the identity, for S⁻¹ of whitening cannot be folded into such cores; `tensor-train` leaves inputs
    whole and has the metric. TensorLy's solver: two SVDs with a short side are all there is to do.
    """

    name: str = "tensor-train-matrix"
    paper: str = "Novikov et al. 2015, 1509.06569"
    family: str = "tensor-product subspaces"
    geometry: str = "modes of the weight in a chain of subspaces, each joined to the next"
    metric: str = "identity"
    formula: str = "Ŵ = G_1[i_1] G_2[i_2] G_3[i_3], SVDs of two unfoldings"
    needs: tuple[str, ...] = ()
    kind = "tensor-ring"
    stepped = False  # what runs is r_k m_k wide, and a step of 8 would be a fifth of a small weight

    def ranks(self, m: int, n: int, level: int) -> tuple[int, int, int, int]:
        first, second, third = paired_modes(m, n, MODES).pairs
        r1 = min(level, first)
        return 1, r1, min(level, r1 * second, third), 1

    def cost(self, m: int, n: int, level: int) -> Storage:
        return ring_storage(paired_modes(m, n, MODES).pairs, self.ranks(m, n, level))

    def full(self, m: int, n: int) -> int:
        return max(self.ranks(m, n, m * n))

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight = weights["weight"]
        m, n = weight.shape
        ranks = self.ranks(m, n, self.kept(options[0]))
        cores = even_norms(*train_cores(paired_modes(m, n, MODES), weight, ranks))
        return self.fitted(weight, dict(zip(("first", "second", "third"), cores, strict=True)))


register(TensorTrainMatrix())
