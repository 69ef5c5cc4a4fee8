"""Low rank plus sparse: two thin products and a sparse matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfront.methods._scatter import columns_of, dense_of, support_bytes
from rankfront.methods._support import seeded_support
from rankfront.methods._training import balance_pair
from rankfront.methods._unpacked import Unpacked
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("low-rank-sparse")
class LowRankSparseLinear(Unpacked):
    """y = left (right x) + S x + bias: left (m, r), right (r, n), S with ``values`` (m, s) in every row.

    Where S's columns are: ``support``, packed uint8, or nothing where ``seed`` draws them. No kernel for such supports
    beats a dense product on a CPU, so the sum of both parts is made at the first use and kept, a dense (m, n) of the
    values' dtype beside what is stored: as fast as the weight itself, and more memory than it.
    """

    support: Tensor | None
    factors = ("left", "right", "values")
    matrices: ClassVar = {"left": "rank", "right": "n"}

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        support: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.left = parameter(left)
        self.right = parameter(right)
        self.values = parameter(values)
        self.bias = optional_parameter(bias)
        self.register_buffer("support", support)
        self.seed = seed
        self.out_features, self.in_features, self.rank = left.shape[0], right.shape[1], right.shape[0]

    def balance(self) -> None:
        balance_pair(self.left, self.right)

    def columns(self) -> Tensor:
        """Where the values stand, (m, s); what is stored has no values before a model is loaded."""
        rows, kept = self.values.shape
        if self.support is None:
            return self.places(self._drawn)
        support = self.support
        return self.places(lambda: columns_of(support, rows, self.in_features, kept), support)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _drawn(self) -> Tensor:
        assert self.seed is not None
        rows, kept = self.values.shape
        return seeded_support(self.seed, rows, self.in_features, kept).to(self.values.device)

    def forward(self, x: Tensor) -> Tensor:
        own = self.stored("left", "right", "values")
        sources = own if self.support is None else (*own, self.support)
        weight = self.kept(lambda: self.matrix().to(self.values.dtype), *sources)
        return nn.functional.linear(x, weight, self.bias)

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "left @ right + torch.zeros(m, n).scatter(1, drawn(seed, m, n, nonzeros), values)"
            if "seed" in settings
            else "left @ right + torch.zeros(m, n).scatter(1, columns(support, m, n, nonzeros), values)"
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return LowRankSparseLinear(**tensors, bias=bias, seed=settings.get("seed"))

    def matrix(self) -> Tensor:
        sparse = dense_of(self.values.float(), self.columns(), self.in_features)
        return self.whole("left") @ self.whole("right") + sparse

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.out_features * self.in_features

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        rank, kept = settings["rank"], settings["nonzeros"]
        found: Shapes = {
            "left": ((rows, rank), None),
            "right": ((rank, columns), None),
            "values": ((rows, kept), None),
        }
        if "seed" not in settings:
            found["support"] = ((support_bytes(rows, columns, kept),), torch.uint8)
        return found

    def extra_repr(self) -> str:
        kept, drawn = self.values.shape[1], "drawn" if self.support is None else "stored"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, {kept} {drawn} a row"
