"""Low rank with a wavelet adapter beside it: what healing adds where a plan's size may grow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._training import balance_pair
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter
from rankfront.methods.layers_wavelet import analyse, even, filters, pad, synthesise


@layer("low-rank-adapted")
class AdaptedLinear(nn.Module):
    """y = left (right x) + T_mᵀ (I₂ ⊗ up down) T_n x + bias: left (m, r), right (r, n), up (⌈m/2⌉, k), down (k, ⌈n/2⌉).

    T is one level of an orthonormal wavelet transform, whose low and high band share the adapter; odd sizes are padded
    by a zero. Source: WaRA (2506.24092), its adapter shared by subbands, of one dimension here.
    """

    factors = ("left", "right", "up", "down")

    def __init__(
        self, left: Tensor, right: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, moments: int
    ) -> None:
        super().__init__()
        self.left, self.right = parameter(left), parameter(right)
        self.up, self.down = parameter(up), parameter(down)
        self.bias = optional_parameter(bias)
        self.out_features, self.in_features, self.rank = left.shape[0], right.shape[1], right.shape[0]
        self.moments, self.filters = moments, filters(moments)

    def balance(self) -> None:
        balance_pair(self.left, self.right)
        balance_pair(self.up, self.down)

    def adapted(self, x: Tensor) -> Tensor:
        """What the adapter adds, (..., m) for x (..., n)."""
        low, high = (band @ self.down.T @ self.up.T for band in analyse(pad(x), self.filters))
        return synthesise(low, high, self.filters)[..., : self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias) + self.adapted(x)

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "left @ right + (transform(m, moments).T @ torch.block_diag(up @ down, up @ down)"
            " @ transform(n, moments))[:m, :n]"
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            raise ValueError("an embedding table has no inputs to transform")
        return AdaptedLinear(**tensors, bias=bias, moments=settings["moments"])

    def matrix(self) -> Tensor:
        with torch.no_grad():
            columns = self.adapted(torch.eye(self.in_features, device=self.up.device, dtype=self.up.dtype))
        return self.left.float() @ self.right.float() + columns.T.float()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        """The transforms, a few additions a feature, are not counted; the adapter runs on both bands."""
        return self.left.numel() + self.right.numel() + 2 * (self.up.numel() + self.down.numel())

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        rank, adapter = settings["rank"], settings["adapter"]
        return {
            "left": ((rows, rank), None),
            "right": ((rank, columns), None),
            "up": ((even(rows) // 2, adapter), None),
            "down": ((adapter, even(columns) // 2), None),
        }

    def extra_repr(self) -> str:
        adapter = f"adapter={self.up.shape[1]}, moments={self.moments}"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, {adapter}, bias={self.bias is not None}"
