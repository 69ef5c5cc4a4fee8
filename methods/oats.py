"""OATS: low rank plus the largest entries of what is left, inputs weighed by their second moment.

    minimise ‖(W − L − S) D^{1/2}‖_F, D = diag(Σ_t x_t²), L of rank r, S with s entries in each row

by alternation: L is the SVD of W − S cut at r, S the s entries of each row of W − L that are largest under D. The
metric is diagonal, so the least-squares values on a support are those of W − L themselves.

Source: OATS (2409.13652), which gives r = κ ρ mn / (m + n) and s = (1 − κ) ρ n with κ = 0.25 for the kept fraction ρ
after 80 alternations, and counts no bits for S's support. Here they are counted, so s is what the rest of the
budget pays for.

`oats-published` is the published alternation: 4 to 13 s of one core for a weight of SmolLM2-135M at a kept fraction of
0.4, so about an hour and a half for the model at four levels. `oats` takes 10 alternations with momentum from a
warm-started subspace, 0.15 to 0.35 s. On the three weights compared there its error was 0.995 to 1.012 times that of
the published setting; where little is left to gain (0.8 kept of a 48 x 48 weight with an outlying input) it was 1.14.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._fitted import measured
from rankfront.methods._low_rank import balanced, weighted_subspace
from rankfront.methods._low_rank_sparse import LowRankSparse, alternate
from rankfront.methods._method import Option, Prepared, Site, register, whole_level
from rankfront.methods._scatter import dense_of, packed_columns
from rankfront.methods._sizes import index_width
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import INDEX_BITS_PER_PARAMETER
from rankfront.methods._weighting import Diagonal, Unweighted

LOW_RANK_SHARE = 0.25  # κ, published


def second_moment(statistics: Statistics) -> Diagonal:
    """S = diag(√d), d_j = Σ_t x_tj²: the Gram's diagonal."""
    return Diagonal(collected(statistics.gram, "gram").raw.diagonal())


def largest(matrix: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` entries of largest magnitude in each row: values and columns in no order, (m, kept) each."""
    columns = matrix.abs().topk(kept, dim=1, sorted=False).indices
    return matrix.gather(1, columns), columns


@dataclass(frozen=True)
class OATS(LowRankSparse):
    """Ŵ = left · right + S, S the largest entries of each row.

    Attributes:
        alternations: of L and S.
        momentum: see `_low_rank_sparse.alternate`.
        exact: whether every alternation takes the whole SVD, in fp64, instead of a warm-started subspace, in fp32.
    """

    name: str
    alternations: int
    momentum: float
    exact: bool
    paper = "2409.13652"
    geometry = "a subspace plus the entries that stand out of it, inputs weighed by their second moment"
    metric = "second moment"
    needs = ("gram",)
    seeded = False

    @property
    def formula(self) -> str:
        steps = f"{self.alternations} alternations of SVD_r and row-wise thresholds"
        return f"Ŵ = L + S, least ‖(W − Ŵ) diag(√Σ_t x_t²)‖_F by {steps}"

    def split(self, site: Site, keep: float, step: int) -> tuple[int, int]:
        m, n = site.weights[0].out_features, site.weights[0].in_features
        rank = max(step, step * round(LOW_RANK_SHARE * keep * m * n / (m + n) / step))
        rest = keep * m * n - rank * (m + n)
        masked = (rest - m * n / INDEX_BITS_PER_PARAMETER) / m
        indexed = rest / m / (1 + index_width(n) / INDEX_BITS_PER_PARAMETER)
        return rank, round(max(masked, indexed))

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (option,), weight = options, weights["weight"].double()
        weighting = second_moment(statistics["weight"])
        rank, nonzeros = whole_level(option, "rank"), whole_level(option, "nonzeros")
        left, right = self._subspace(weighting.times_root(weight), rank, nonzeros)
        left, right = balanced(left, right / weighting.squares.sqrt())
        left, right = left.float(), right.float()
        low_rank = left.double() @ right.double()
        _, columns = largest(weighting.times_root(weight - low_rank), nonzeros)
        columns = columns.sort(1).values
        values = (weight - low_rank).gather(1, columns).float()
        found = {"left": left, "right": right, "values": values, "support": packed_columns(columns, weight.shape[1])}
        return found | measured(weight, low_rank + dense_of(values.double(), columns, weight.shape[1]), weighting)

    def _subspace(self, weight: Tensor, rank: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """U (m, r) and V (r, n) in fp64 for W D^{1/2} (m, n)."""
        start, _ = weighted_subspace(weight, Unweighted())
        scale = weight.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # the squares of tiny ones leave fp32
        work = weight if self.exact else (weight / scale).float()

        def rest(product: Tensor) -> Tensor:
            values, columns = largest(work - product, nonzeros)
            return work - dense_of(values, columns, work.shape[1])

        def subspace(rest: Tensor) -> Tensor:
            return weighted_subspace(rest, Unweighted())[0][:, :rank]

        left, right, _ = alternate(
            work,
            start[:, :rank].to(work.dtype),
            lambda right: right,
            rest,
            subspace if self.exact else None,
            self.alternations,
            self.momentum,
        )
        return left.double(), right.double() * (1 if self.exact else scale)


register(OATS(name="oats", alternations=10, momentum=0.9, exact=False))
register(OATS(name="oats-published", alternations=80, momentum=0.0, exact=True))
