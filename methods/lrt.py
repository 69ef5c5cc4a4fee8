"""``lrt`` and ``lrt-snmf``: the Low-Rank Transformer of Greenformers, each linear two thin ones, n -> r -> m.

    svd: minimise ‖W − Ŵ‖_F over rank r.    snmf: the same over Ŵ = G Fᵀ with G (m, r) ≥ 0.

The published rank rule holds exactly: r* = ⌊mn/(m + n)⌋, a fraction f gives r = ⌊f r*⌋, and a weight is skipped where
r is 0 or r ≥ r*. So ranks follow from the kept fraction alone (f is keep, up to rounding the fraction of dense storage)
and not from the space's ``rank_multiple``. Source: Greenformers (2108.10808); rule, solvers and 10 iterations as in its
code (`auto_fact`), which transposes W, so that the side that semi-NMF holds above zero is the outputs'. Its random
solver fits nothing and is left out; its svd is a randomised one, ours is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._fitted import Fitted, measured
from rankfront.methods._low_rank import LowRank, balanced, weighted_subspace
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, not_one_linear, register, whole_level
from rankfront.methods._metric import IDENTITY
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, low_rank_storage
from rankfront.methods._weighting import Unweighted

PAPER = "2108.10808"
ITERATIONS = 10  # of semi-NMF, the published default
RIDGE = 1e-12  # of the mean diagonal of Gᵀ G, in fp64


def limit_rank(site: Site) -> int:
    """r* = ⌊mn/(m + n)⌋; ranks lie below it."""
    m, n = site.anchor.out_features, site.anchor.in_features
    return m * n // (m + n)


def published_refusal(site: Site) -> str | None:
    """Why the published rule skips ``site`` at every fraction, or None."""
    reason = not_one_linear(site, (), looked_up=True)
    return reason if reason or limit_rank(site) > 1 else "no rank from 1 lies below ⌊mn/(m + n)⌋"


def published_ranks(site: Site, grid: Grid) -> dict[float, int]:
    """Kept fraction f -> ⌊f r*⌋ where that is at least 1."""
    ranks = {keep: int(limit_rank(site) * keep) for keep in grid.keep}
    return {keep: rank for keep, rank in ranks.items() if 1 <= rank < limit_rank(site)}


@dataclass(frozen=True)
class LowRankTransformer(LowRank):
    """Low rank under the published rule; the svd solver."""

    def refuses(self, site: Site) -> str | None:
        return published_refusal(site)

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        return {keep: Option.of(self.name, rank=rank) for keep, rank in published_ranks(site, grid).items()}


def semi_nmf(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """G (m, r) ≥ 0 and F (n, r) with W ≈ G Fᵀ, for W (m, n), in fp64; each of the iterations lowers ‖W − G Fᵀ‖_F.

    F is the least-squares answer to G; G is multiplied by √(((W F)⁺ + G (FᵀF)⁻) / ((W F)⁻ + G (FᵀF)⁺)) (Ding, Li &
    Jordan, TPAMI 2010, equations 10 and 11 [M]). G starts as U_{r−1} lifted above zero by a column of ones, which spans
    the best rank r − 1 (the manner of Gillis & Kumar, SIAM J. Matrix Anal. Appl. 2015 [M]): the outcome is never worse
    than svd at one rank less, and the same on every machine, where the published start is random.
    """
    work = weight.double()
    work = work / work.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    basis = weighted_subspace(work, Unweighted())[0][:, : rank - 1]  # (m, r − 1)
    basis = basis * torch.where(basis.amax(0) < -basis.amin(0), -1.0, 1.0).to(basis.dtype)
    ones = torch.full((len(work), 1), len(work) ** -0.5, dtype=work.dtype, device=work.device)
    g = torch.cat([basis - basis.amin(0).clamp_max(0), ones], dim=1)
    f = _least_squares(work, g)
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(ITERATIONS):
        cross, gram = work @ f, f.T @ f  # (m, r), (r, r)
        up = cross.clamp_min(0) + g @ (-gram).clamp_min(0)
        down = (-cross).clamp_min(0) + g @ gram.clamp_min(0)
        g = g * ((up + tiny) / (down + tiny)).sqrt()
        f = _least_squares(work, g)
    return g, f * weight.double().abs().max()


def _least_squares(work: Tensor, g: Tensor) -> Tensor:
    """F (n, r) = Wᵀ G (Gᵀ G)⁻¹."""
    gram = g.T @ g
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved: Tensor = torch.cholesky_solve(g.T @ work, torch.linalg.cholesky(gram))
    return solved.T


@dataclass(frozen=True)
class SemiNMF(Fitted):
    """Ŵ = left · right with left (m, r) ≥ 0 and right (r, n)."""

    name: str
    paper: str = PAPER
    family = "subspace"
    geometry = "outputs lie in a cone of r directions without negative entries, coordinates of either sign"
    metric = "identity"
    formula = f"Ŵ = G Fᵀ, G ≥ 0, {ITERATIONS} multiplicative steps"
    needs = ()

    def refuses(self, site: Site) -> str | None:
        return published_refusal(site)

    def check(self, option: Option) -> None:
        whole_level(option, "rank")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        return {keep: Option.of(self.name, rank=rank) for keep, rank in published_ranks(site, grid).items()}

    def storage(self, site: Site, option: Option) -> Storage:
        return low_rank_storage(site.anchor.out_features, site.anchor.in_features, whole_level(option, "rank"))

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (weight,), (option,) = weights.values(), options
        g, f = semi_nmf(weight, whole_level(option, "rank"))
        left, right = (side.float().contiguous() for side in balanced(g, f.T))
        return {"left": left, "right": right, **measured(weight, left.double() @ right.double(), Unweighted())}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        left, right = prepared["left"], prepared["right"]
        rank = right.shape[0]
        storage = low_rank_storage(left.shape[0], right.shape[1], rank)
        return {"weight": Factors("low-rank", {"left": left, "right": right}, {"rank": rank}, storage)}


register(LowRankTransformer("lrt", PAPER, IDENTITY))
register(SemiNMF("lrt-snmf"))
