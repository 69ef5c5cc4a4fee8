"""Tensor rings: chains of cores whose two ends are joined, fitted by TR-SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import Modes, even_norms, paired_modes
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, ring_storage
from rankfront.methods._tensor import NestedFormat, level_errors, with_tensorly

MODES = 3


def ring_cores(modes: Modes, weight: Tensor, ranks: tuple[int, int, int]) -> list[Tensor]:
    """TR-SVD of W (m, n) with paired modes: cores (r_{k−1}, m_k, n_k, r_k) in fp64, ranks (r_0, r_1, r_2), r_3 = r_0.

    The first two are orthonormal, so what the third holds for each index of r_2 is the norm of an orthogonal component,
    largest first. Raises ValueError where W is not finite or r_0 r_1 > I_1.
    """
    ring = with_tensorly("tensor_ring", modes.tensor(weight), rank=[*ranks, ranks[0]])
    sizes = zip(ring, modes.rows, modes.columns, strict=True)
    return [core.unflatten(1, (m, n)) for core, m, n in sizes]


@dataclass(frozen=True)
class TensorRing(NestedFormat):
    """T[i_1 i_2 i_3] = tr(G_1[i_1] G_2[i_2] G_3[i_3]) for W with paired modes, G_k (r_{k−1}, m_k n_k, r_k), r_3 = r_0.

    Σ r_{k−1} I_k r_k values. Zhao et al. (1606.05535), TR-SVD [M]: the first unfolding is split into the ranks r_0 and
    r_1, the next one is truncated at r_2. The level is r_2; r_0 = ⌊√I_1⌋ and r_1 = ⌊I_1 / r_0⌋, for then the last
    unfolding (r_1 I_2, I_3 r_0) is near square, where a truncated SVD saves most, and the first loses nothing (less
    than r_0 of I_1 directions where I_1 has no such divisors). r_0 = 1 would be a tensor train. Nested in r_2.

    The metric is the identity, for S⁻¹ of whitening cannot be folded into such cores. TensorLy's solver: two SVDs are
    all there is to do. TR-ALS may have r_0 r_1 > I_1, but costs least squares over all of W for each core and sweep.
    """

    name: str = "tensor-ring"
    paper: str = "Zhao et al. 2016, 1606.05535"
    family: str = "tensor-product subspaces"
    geometry: str = "modes of the weight in a closed chain of subspaces, each joined to the next"
    metric: str = "identity"
    formula: str = "Ŵ = tr(G_1[i_1] G_2[i_2] G_3[i_3]), SVDs of two unfoldings"
    needs: tuple[str, ...] = ()
    kind = "tensor-ring"
    stepped = False  # what runs is r_k m_k wide, and a step of 8 would be a fifth of a small weight
    ranked = {"second": 3, "third": 0}  # noqa: RUF012 - a constant

    def ranks(self, m: int, n: int, level: int) -> tuple[int, int, int]:
        first, second, third = paired_modes(m, n, MODES).pairs
        r0 = math.isqrt(first)
        r1 = first // r0
        return r0, r1, min(level, r1 * second, third * r0)

    def cost(self, m: int, n: int, level: int) -> Storage:
        ranks = self.ranks(m, n, level)
        return ring_storage(paired_modes(m, n, MODES).pairs, (*ranks, ranks[0]))

    def full(self, m: int, n: int) -> int:
        return self.ranks(m, n, m * n)[2]

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
        cores = ring_cores(modes, weight, self.ranks(m, n, kept))
        energies = cores[2].square().sum((1, 2, 3))
        first, second, third = even_norms(*cores)

        def component(i: int) -> Tensor:
            part = torch.einsum("uxas,sybt,twcu->xywabc", first, second[..., i : i + 1], third[i : i + 1])
            return part.flatten(0, 2).flatten(1)[:m, :n]

        errors = level_errors(weight, energies, component if modes.padded else None)
        stored = {"first": first, "second": second, "third": third}
        return {name: tensor.float().contiguous() for name, tensor in stored.items()} | errors


register(TensorRing())
