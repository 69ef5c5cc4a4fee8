"""Layers with a sparse factor: a dictionary's atoms, picked by few coefficients for each output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._sparse import SparseRows
from rankfront.methods._support import packed_bits
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("dictionary")
class DictionaryLinear(SparseRows):
    """y = A (right x) + bias: right (k, n) the atoms, A (m, k) sparse, x (..., n) to y (..., m).

    A is stored as ``values`` (m, s) and packed ``support`` (see `_sparse`): m·s nonzeros, s in every row or, where a
    method shares them among rows, s on average.
    """

    def __init__(self, right: Tensor, values: Tensor, support: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(values, support, len(right))
        self.right = parameter(right)
        self.bias = optional_parameter(bias)
        self.out_features, self.in_features = len(values), right.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.right)  # (..., k)
        return nn.functional.linear(hidden, self.sparse_matrix(), self.bias)  # (..., m)

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return DictionaryLinear(**tensors, bias=bias)

    def matrix(self) -> Tensor:
        return self.sparse_matrix().float() @ self.right.float()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.columns * (self.out_features + self.in_features)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        atoms, nonzeros = settings["atoms"], settings["nonzeros"]
        return {
            "right": ((atoms, columns), None),
            "values": ((rows, nonzeros), None),
            "support": ((packed_bits(rows * atoms, 1) // 8,), torch.uint8),
        }

    def extra_repr(self) -> str:
        sizes = f"atoms={self.columns}, nonzeros={self.values.shape[1]}"
        return f"{self.in_features}, {self.out_features}, {sizes}, bias={self.bias is not None}"
