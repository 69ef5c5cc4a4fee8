"""What joint treatments leave behind: thinner heads, smaller dense matrices, nothing at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter, weight_of


@layer("heads")
class HeadsLinear(nn.Module):
    """A projection to heads that keeps ``kept`` of the ``width`` outputs of each, the others zero.

    weight (heads · kept, n), bias (heads · kept,), x (..., n) to (..., heads · width). ``place`` (heads, kept) says
    which of a head's outputs they are; without it they are the first.
    """

    place: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, heads: int, kept: int, width: int, place: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.register_buffer("place", place)
        self.heads, self.kept, self.width = heads, kept, width

    def _spread(self, kept: Tensor) -> Tensor:
        """(..., heads · kept) to (..., heads · width)."""
        by_head = kept.unflatten(-1, (self.heads, self.kept))
        if self.place is None:
            return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)
        zeros = by_head.new_zeros(*by_head.shape[:-1], self.width)
        spread: Tensor = zeros.scatter(-1, self.place.long().expand_as(by_head), by_head)
        return spread.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self._spread(nn.functional.linear(x, self.weight, self.bias))

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return HeadsLinear(
            tensors["weight"], bias, settings["heads"], settings["kept"], settings["width"], tensors.get("place")
        )

    def matrix(self) -> Tensor:
        return self._spread(self.weight.float().T).T

    def full_bias(self) -> Tensor | None:
        return None if self.bias is None else self._spread(self.bias)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        heads, kept = settings["heads"], settings["kept"]
        found: Shapes = {"weight": ((heads * kept, columns), None)}
        if settings["placed"]:
            found["place"] = ((heads, kept), torch.uint8)
        if bias:
            found["bias"] = ((heads * kept,), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.heads} heads, {self.kept} of {self.width} each"


@layer("from-heads")
class FromHeadsLinear(nn.Module):
    """A projection of heads that reads the first ``kept`` of each one's ``width`` inputs.

    weight (m, heads · kept), x (..., heads · width) to (..., m).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, heads: int, kept: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.heads, self.kept, self.width = heads, kept, width

    def forward(self, x: Tensor) -> Tensor:
        kept = x.unflatten(-1, (self.heads, self.width))[..., : self.kept].flatten(-2)
        return nn.functional.linear(kept, self.weight, self.bias)

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return FromHeadsLinear(tensors["weight"], bias, settings["heads"], settings["kept"], settings["width"])

    def matrix(self) -> Tensor:
        by_head = self.weight.float().unflatten(-1, (self.heads, self.kept))
        return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)

    def full_bias(self) -> Tensor | None:
        return self.bias

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return {"weight": ((rows, settings["heads"] * settings["kept"]), None)}

    def extra_repr(self) -> str:
        return f"{self.heads} heads, {self.kept} of {self.width} each, {self.weight.shape[0]}"


@layer("plain")
class PlainLinear(nn.Module):
    """y = W x + bias with a dense W (rows, columns) of its own size: fewer neurons than the model had."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return PlainLinear(tensors["weight"], bias)

    def matrix(self) -> Tensor:
        return self.weight.float()

    def full_bias(self) -> Tensor | None:
        return self.bias

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        found: Shapes = {"weight": ((settings["rows"], settings["columns"]), None)}
        if bias and settings["rows"] != rows:
            found["bias"] = ((settings["rows"],), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


@layer("absent")
class AbsentLinear(nn.Module):
    """y = 0 (..., rows): a projection that was left out, with its bias."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.rows)

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return AbsentLinear(weight_of(dense).shape[0])

    def matrix(self) -> Tensor:
        return torch.zeros(self.rows, 0)

    def full_bias(self) -> Tensor | None:
        return torch.zeros(self.rows)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return {}

    def extra_repr(self) -> str:
        return f"{self.rows}"
