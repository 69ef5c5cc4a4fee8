"""Matrices in 8 or 4 bits: one, or one with a low rank beside it; by torch's packed kernels where those are fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods.integer_matrix import IntegerMatrix, IntegerTable
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, row_scale, weight_of

CORRECTION_BITS = 8  # of a low rank beside a matrix in fewer


@layer("integer")
class IntegerLinear(nn.Module):
    """y = W x + bias, W (m, n) an `IntegerMatrix`."""

    def __init__(self, stored: IntegerMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stored(x, self.bias)
        return y

    @staticmethod
    def formula(settings: Settings) -> str:
        return "whole(stored, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        columns = weight_of(dense).shape[1]
        if isinstance(dense, nn.Embedding):
            table = IntegerTable.of("stored", tensors, settings["bits"], columns)
            return IntegerEmbedding(table, settings.get("scale", row_scale(dense)))
        return IntegerLinear(IntegerMatrix.of("stored", tensors, settings["bits"], columns), bias)

    def matrix(self) -> Tensor:
        return self.stored.matrix()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return len(self.stored.integers) * self.stored.columns

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return IntegerMatrix.shapes("stored", rows, columns, settings["bits"])


class IntegerEmbedding(nn.Module):
    """Rows of E (vocabulary, width), an `IntegerTable`: ids (...) to (..., width), times ``scale`` if there is one."""

    def __init__(self, stored: IntegerTable, scale: float | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.num_embeddings, self.embedding_dim = len(stored.integers), stored.columns
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.stored(ids)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def matrix(self) -> Tensor:
        return self.stored.matrix()

    def full_bias(self) -> Tensor | None:
        return None

    def multiplications(self) -> int:
        return 0


@layer("integer-corrected")
class CorrectedLinear(nn.Module):
    """y = W x + left (right x) + bias: W (m, n) in few bits, left (m, r) and right (r, n) in `CORRECTION_BITS`."""

    def __init__(
        self, stored: IntegerMatrix, left: IntegerMatrix, right: IntegerMatrix, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.stored, self.left, self.right = stored, left, right
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stored(x, self.bias) + self.left(self.right(x))
        return y

    @staticmethod
    def formula(settings: Settings) -> str:
        return "whole(stored, n) + whole(left, rank) @ whole(right, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        columns = weight_of(dense).shape[1]
        stored = IntegerMatrix.of("stored", tensors, settings["bits"], columns)
        left = IntegerMatrix.of("left", tensors, CORRECTION_BITS, settings["rank"])
        return CorrectedLinear(stored, left, IntegerMatrix.of("right", tensors, CORRECTION_BITS, columns), bias)

    def matrix(self) -> Tensor:
        return self.stored.matrix() + self.left.matrix() @ self.right.matrix()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        rows, columns = len(self.stored.integers), self.stored.columns
        return rows * columns + self.left.columns * (rows + columns)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        rank = settings["rank"]
        found = IntegerMatrix.shapes("stored", rows, columns, settings["bits"])
        found |= IntegerMatrix.shapes("left", rows, rank, CORRECTION_BITS)
        return found | IntegerMatrix.shapes("right", rank, columns, CORRECTION_BITS)
