"""Low rank: two thin products, or rows looked up and one thin product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._training import balance_pair
from rankfront.methods.adaptable import adapted, multiply
from rankfront.methods.integer_matrix import FactorModule
from rankfront.methods.joined import Joined
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter, row_scale

MATRICES = {"left": "rank", "right": "n"}


@layer("low-rank")
class LowRankLinear(FactorModule):
    """y = left (right x) + bias: left (m, r), right (r, n), x (..., n) to y (..., m).

    Several that read the same input may have their right factors ``joined``.
    """

    products = factors = ("left", "right")
    matrices = MATRICES

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.left = parameter(left)
        self.right = parameter(right)
        self.bias = optional_parameter(bias)
        self.out_features, self.in_features, self.rank = left.shape[0], right.shape[1], right.shape[0]
        self.joined: Joined | None = None
        self.place = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = None if self.joined is None or adapted(self, "right") else self.joined.part(self, x)  # (..., r)
        if hidden is None:
            hidden = multiply(self, "right", x)
        return multiply(self, "left", hidden, self.bias)  # (..., m)

    def balance(self) -> None:
        balance_pair(self.left, self.right)

    @staticmethod
    def formula(settings: Settings) -> str:
        return "left @ right"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            return LowRankEmbedding(**tensors, scale=settings.get("scale", row_scale(dense)))
        return LowRankLinear(**tensors, bias=bias)

    def matrix(self) -> Tensor:
        return self.whole("left") @ self.whole("right")

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.rank * (self.out_features + self.in_features)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return {"left": ((rows, settings["rank"]), None), "right": ((settings["rank"], columns), None)}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(FactorModule):
    """Rows of E = left · right: left (vocabulary, r), right (r, width), ids (...) to (..., width).

    The table's rows are tokens, so here ``left`` is looked up and ``right`` is applied. ``scale`` multiplies
    the result for models that scale their embeddings (see `row_scale`).
    """

    factors = ("left", "right")
    matrices = MATRICES

    def __init__(self, left: Tensor, right: Tensor, scale: float | None = None) -> None:
        super().__init__()
        self.left = parameter(left)
        self.right = parameter(right)
        self.num_embeddings, self.embedding_dim, self.rank = left.shape[0], right.shape[1], right.shape[0]
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        coordinates, held = self.look_up("left", ids), self.held("right")
        rows = coordinates @ (self.right if held is None else held.matrix(coordinates.dtype))  # (..., width)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def balance(self) -> None:
        balance_pair(self.left, self.right)

    def matrix(self) -> Tensor:
        return self.whole("left") @ self.whole("right")

    def full_bias(self) -> Tensor | None:
        return None

    def multiplications(self) -> int:
        return self.rank * self.embedding_dim

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
