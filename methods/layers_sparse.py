"""Layers with a sparse factor: a dictionary's atoms, picked by few coefficients for each output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfront.methods._sizes import packed_bits
from rankfront.methods._sparse import SparseRows, gather_rows, pack_mask, scatter_rows
from rankfront.methods._training import unit_rows
from rankfront.methods.adaptable import multiply
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("dictionary")
class DictionaryLinear(SparseRows):
    """y = A (right x) + bias: right (k, n) the atoms, A (m, k) sparse, x (..., n) to y (..., m).

    A is stored as ``values`` (m, s) and packed ``support`` (see `_sparse`): m·s nonzeros, s in every row or, where a
    method shares them among rows, s on average. It runs as two dense products, with A made dense and kept, or where
    they are no cheaper than one, as the product of both.
    """

    factors = ("right", "values")
    matrices: ClassVar = {"right": "n"}

    def __init__(self, right: Tensor, values: Tensor, support: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(values, support, len(right))
        self.right = parameter(right)
        self.bias = optional_parameter(bias)
        self.out_features, self.in_features = len(values), right.shape[1]
        whole = self.out_features * self.in_features
        self.multiplied_out = self.columns * (self.out_features + self.in_features) >= whole
        self.products = () if self.multiplied_out else ("right",)

    def balance(self) -> None:
        """Atoms of norm 1, their scales in the coefficients."""
        mask = self.mask()
        scales = unit_rows(self.right).expand(mask.shape)
        with torch.no_grad():
            self.values.mul_(gather_rows(scales, mask))

    normalise = balance

    def codes(self) -> Tensor:
        """A (m, k), dense."""
        return scatter_rows(self.values, self.mask())

    def coded(self, codes: Tensor, x: Tensor) -> Tensor:
        """What the module makes of x (..., n) with ``codes`` (m, k) in the place of A."""
        return nn.functional.linear(multiply(self, "right", x), codes, self.bias)

    def largest(self, codes: Tensor) -> Tensor:
        """The places of the entries of ``codes`` of largest size, as many in each row as are stored: bool (m, k)."""
        order = codes.abs().argsort(dim=1, descending=True).argsort(dim=1)
        places: Tensor = order < self.mask().sum(dim=1, keepdim=True)
        return places

    @torch.no_grad()
    def keep_codes(self, codes: Tensor, places: Tensor) -> None:
        """Store the entries of ``codes`` at ``places``, which `largest` gave."""
        self.values.copy_(gather_rows(codes, places))
        self.support = pack_mask(places)

    def forward(self, x: Tensor) -> Tensor:
        if self.multiplied_out:
            weight = self.kept(lambda: self.matrix().to(self.values.dtype), *self.stored("values", "support", "right"))
            return nn.functional.linear(x, weight, self.bias)
        hidden = multiply(self, "right", x)  # (..., k)
        return nn.functional.linear(hidden, self.sparse_matrix(), self.bias)  # (..., m)

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "torch.zeros(m, atoms).masked_scatter(numbers(support, 1, m * atoms).view(m, atoms).bool(), values) @ right"
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return DictionaryLinear(**tensors, bias=bias)

    def matrix(self) -> Tensor:
        return scatter_rows(self.values.float(), self.mask()) @ self.whole("right")

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        apart, whole = self.columns * (self.out_features + self.in_features), self.out_features * self.in_features
        return whole if self.multiplied_out else apart

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
