"""The family of low rank plus sparse: Ŵ = left · right + S, as many nonzeros in every row of S."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankfront.methods._fitted import Fitted
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, not_one_linear, whole_level
from rankfront.methods._storage import Storage, low_rank_sparse_storage

Product = Callable[[Tensor], Tensor]


def alternate(
    weight: Tensor,
    basis: Tensor,
    times_gram: Product,
    rest_of: Product,
    subspace: Callable[[Tensor], Tensor] | None,
    alternations: int,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternation of the low-rank and the sparse part of ‖(W − U V − S) C^{1/2}‖_F.

    In turn: S from L C, then U (m, r) for R = W − S, then V = Uᵀ R. Given V, the best left factor spans the columns of
    R C Vᵀ, so a QR of that is the step for U: a warm-started subspace iteration, which never raises the error. With
    momentum β, S is taken at L + β (L − L₋₁) instead, which needs about a quarter of the alternations.

    Args:
        weight: W (m, n).
        basis: the first U (m, r), orthonormal.
        times_gram: V (r, n) to V C.
        rest_of: L C (m, n) to W − S (m, n) with the best S for that L.
        subspace: R (m, n) to U (m, r) where it is to be computed afresh; None for the subspace iteration.

    Returns:
        U (m, r), V (r, n) and their product's L C (m, n), to which S is still to be fitted.
    """
    right = basis.T @ weight
    known = times_gram(right)  # (r, n) V C
    before = product = basis @ known
    for _ in range(alternations):
        rest = rest_of(torch.lerp(before, product, 1 + momentum))
        basis = torch.linalg.qr(rest @ known.T).Q if subspace is None else subspace(rest)
        right = basis.T @ rest
        known = times_gram(right)
        before, product = product, basis @ known
    return basis, right, product


class LowRankSparse(Fitted):
    """Levels ``rank`` and ``nonzeros`` a row; ``seeded`` says that a seed draws the support, which then costs nothing.

    How the parts share what is kept is `split`.
    """

    name: str
    family = "subspace plus sparse"
    seeded: bool

    def split(self, site: Site, keep: float, step: int) -> tuple[int, int]:
        """(rank, nonzeros a row) for a kept fraction, ``rank`` a multiple of ``step``, before `options` sets bounds."""
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs)
        if reason or self._cost(site, 1, 1) < site.storage.parameters:
            return reason
        return "a single component and one entry a row store no less than the dense weight"

    def check(self, option: Option) -> None:
        whole_level(option, "rank")
        whole_level(option, "nonzeros")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        step = grid.rank_multiple
        if self.refuses(site) or self._cost(site, step, 1) >= site.storage.parameters:
            return {}
        found = {}
        for keep in grid.keep:
            rank, nonzeros = self.split(site, keep, step)
            rank, nonzeros = max(rank, step), min(max(nonzeros, 1), site.weights[0].in_features)
            while self._cost(site, rank, nonzeros) >= site.storage.parameters:
                rank, nonzeros = (rank, nonzeros - 1) if nonzeros > 1 else (rank - step, 1)
            found[keep] = Option.of(self.name, rank=rank, nonzeros=nonzeros)
        return found

    def _cost(self, site: Site, rank: int, nonzeros: int) -> int:
        weight = site.weights[0]
        storage = low_rank_sparse_storage(weight.out_features, weight.in_features, rank, nonzeros, self.seeded)
        return storage.parameters

    def storage(self, site: Site, option: Option) -> Storage:
        weight, rank, nonzeros = site.weights[0], whole_level(option, "rank"), whole_level(option, "nonzeros")
        return low_rank_sparse_storage(weight.out_features, weight.in_features, rank, nonzeros, self.seeded)

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: left (m, r) and right (r, n)."""
        weight, rank = site.weights[0], whole_level(option, "rank")
        return [(weight.out_features, rank), (rank, weight.in_features)]

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        tensors = {name: prepared[name] for name in ("left", "right", "values")}
        (m, rank), (_, n), nonzeros = tensors["left"].shape, tensors["right"].shape, tensors["values"].shape[1]
        settings = {"rank": rank, "nonzeros": nonzeros}
        if self.seeded:
            settings["seed"] = int(prepared["seed"])
        else:
            tensors["support"] = prepared["support"]
        storage = low_rank_sparse_storage(m, n, rank, nonzeros, self.seeded)
        return {"weight": Factors("low-rank-sparse", tensors, settings, storage)}
