"""Low rank plus sparse: two thin products and a sparse matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._scatter import columns_of, dense_of, support_bytes
from rankfront.methods._support import seeded_support
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("low-rank-sparse")
class LowRankSparseLinear(nn.Module):
    """y = left (right x) + S x + bias: left (m, r), right (r, n), S with ``values`` (m, s) in every row.

    Where S's columns are: ``support``, packed uint8, or nothing where ``seed`` draws them. Either is decoded at the
    first use and kept as int32, 4 bytes an entry that stay resident beside the values; while running, S is
    scattered into a dense (m, n) of the values' dtype, which is let go of afterwards. So memory at rest falls, at its
    peak it does not, and the dense product takes as long as that of the weight itself.
    """

    support: Tensor | None
    columns: Tensor | None

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
        self.register_buffer("columns", None, persistent=False)
        self.seed = seed
        self.out_features, self.in_features, self.rank = left.shape[0], right.shape[1], right.shape[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decode(self) -> Tensor:
        """Columns (m, s); what is stored has no values before a model is loaded, so not when it is built."""
        rows, kept = self.values.shape
        if self.support is None:
            assert self.seed is not None
            found = seeded_support(self.seed, rows, self.in_features, kept).to(self.values.device)
        else:
            found = columns_of(self.support, rows, self.in_features, kept)
        return found.to(torch.int32)

    def _sparse(self, values: Tensor) -> Tensor:
        if self.columns is None:
            self.columns = self._decode()
        return dense_of(values, self.columns, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.right)  # (..., r)
        sparse = nn.functional.linear(x, self._sparse(self.values), self.bias)  # (..., m)
        return sparse + nn.functional.linear(hidden, self.left)

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return LowRankSparseLinear(**tensors, bias=bias, seed=settings.get("seed"))

    def matrix(self) -> Tensor:
        return self.left.float() @ self.right.float() + self._sparse(self.values.float())

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        """The sparse part runs dense."""
        return self.rank * (self.out_features + self.in_features) + self.out_features * self.in_features

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
