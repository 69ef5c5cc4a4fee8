"""The low-rank family under any metric: W ≈ left · right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._algebra import eigh_descending, fix_signs
from rankfront.methods._errors import InputError
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site
from rankfront.methods._metric import Metric
from rankfront.methods._nested import Nested
from rankfront.methods._statistics import Statistics, narrow_outputs
from rankfront.methods._storage import Storage, break_even_rank, low_rank_storage
from rankfront.methods._training import balance_scale
from rankfront.methods._weighting import Weighting


def weighted_subspace(weight: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """U (m, k) and σ² (k,) of W S = U Σ Vᵀ, k = min(m, n), for W (m, n), in fp64.

    The best rank-r approximation under ‖(W − Ŵ) S‖_F is U_r Σ_r V_rᵀ S⁻¹ = U_r (U_rᵀ W), so U is all that is
    needed: no inverse, and a singular S does no harm. U comes from eigh(W S Sᵀ Wᵀ) where m ≤ n and otherwise
    from W S V with V of eigh(Sᵀ Wᵀ W S), made orthonormal by QR, which keeps small directions apart.

    Source: SVD-LLM (2403.07378) Theorem 3.2 gives the optimum; the projection form is Eckart-Young applied to W S.
    """
    work = weight.double()
    out_features, in_features = work.shape
    if out_features <= in_features:
        energy, basis = eigh_descending(weighting.sandwich(work))
    else:
        scaled = weighting.times_root(work)
        energy, right = eigh_descending(scaled.T @ scaled)
        basis = torch.linalg.qr(scaled @ right).Q
    return fix_signs(basis), energy


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(m, r) and (r, n) with the same product, the norm of each component shared equally between its two sides."""
    scale = balance_scale(left, right)
    return left * scale, right / scale[:, None]


@dataclass(frozen=True)
class LowRank(Nested):
    """Ŵ = left · right with left (m, r) and right (r, n), the rank-r minimiser of ‖R (W − Ŵ) S‖_F.

    Nested: the first r components of one preparation are the optimum at rank r. Preparing keeps components up
    to break-even rank (or up to the largest rank asked for), with the norm of each component shared equally
    between its two sides, so that factors survive narrow float formats.
    """

    name: str
    paper: str
    weighting: Metric
    version: int = 1
    level = "rank"

    @property
    def family(self) -> str:
        return "weighted subspace" if self.needs else "subspace"

    @property
    def geometry(self) -> str:
        return f"outputs projected on r directions, {self.weighting.geometry}"

    @property
    def metric(self) -> str:
        return self.weighting.name

    @property
    def formula(self) -> str:
        if self.weighting.left is None:
            return f"Ŵ = U_r U_rᵀ W, W S = U Σ Vᵀ, {self.weighting.formula}"
        return f"Ŵ = R⁻¹ U_r U_rᵀ R W, R W S = U Σ Vᵀ, {self.weighting.formula}"

    @property
    def needs(self) -> tuple[str, ...]:
        return self.weighting.needs

    def refuses(self, site: Site) -> str | None:
        if len(site.weights) != 1:
            return "it treats one weight at a time"
        if site.weights[0].kind == "embedding" and self.needs:
            return f"an embedding table's inputs are token ids, which have no {', '.join(self.needs)} statistics"
        if "gradient" in self.needs and not narrow_outputs(site.weights[0].out_features, site.weights[0].in_features):
            return "the Gram of its output gradients would be far larger than the weight"
        if break_even_rank(site.weights[0].out_features, site.weights[0].in_features) == 0:
            return "no rank stores less than the dense weight"
        return None

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        weight = site.weights[0]
        m, n, step = weight.out_features, weight.in_features, grid.rank_multiple
        largest = break_even_rank(m, n) // step * step
        if largest == 0:
            return {}
        ranks = {keep: step * round(keep * m * n / (m + n) / step) for keep in grid.keep}
        return {keep: Option.of(self.name, rank=min(max(rank, step), largest)) for keep, rank in ranks.items()}

    def storage(self, site: Site, option: Option) -> Storage:
        weight = site.weights[0]
        return low_rank_storage(weight.out_features, weight.in_features, self.kept(option))

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: left (m, r) and right (r, n)."""
        weight, rank = site.weights[0], self.kept(option)
        return [(weight.out_features, rank), (rank, weight.in_features)]

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (weight,) = weights.values()
        weighting = self.weighting.weigh(statistics["weight"]) if self.needs else self.weighting.weigh(Statistics(0))
        work = weight.double()
        rows = self.weighting.left and self.weighting.left(statistics["weight"])
        work = work if rows is None else rows.times(work)
        basis, energy = weighted_subspace(work, weighting)
        kept = max([break_even_rank(*weight.shape), *(self.kept(option) for option in options)])
        left = basis[:, :kept]  # (m, k)
        right = left.T @ work  # (k, n)
        left = left if rows is None else rows.undone(left)
        left, right = balanced(left, right)
        return {
            "left": left.T.float().contiguous(),  # (k, m): slicing a level reads one run of memory
            "right": right.float().contiguous(),
            "energy": energy.clamp_max(torch.finfo(torch.float32).max).float(),
        }

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        rank = self.kept(option)
        available = len(prepared["right"])
        if rank > available:
            raise InputError(f"rank {rank} was asked of {available} prepared components: rebuild the factor store")
        left, right = prepared["left"][:rank].T, prepared["right"][:rank]
        storage = low_rank_storage(left.shape[0], right.shape[1], rank)
        return {"weight": Factors("low-rank", {"left": left, "right": right}, {"rank": rank}, storage)}

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        return self.truncate(prepared, option)["weight"]

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        largest = max(map(self.kept, options))
        left, right = (prepared[name][:largest].to(g.device) for name in ("left", "right"))
        components = (g.to(left.dtype) @ left.T).float() * (x.to(right.dtype) @ right.T).float()  # (tokens, r)
        return self.running(components, options)
