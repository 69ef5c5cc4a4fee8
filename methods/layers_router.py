"""A router that chooses among some of the experts that it had."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods._scatter import columns_of, support_bytes
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("router")
class RestrictedRouter(nn.Module):
    """The model's own router of K experts, whose choices are given by their numbers among the E that there were.

    What the router has for each expert, such as its rows (E, H), it has of K. ``support`` holds packed which they are.
    A token is given to at most K.

    Attributes:
        undense: why it has no dense form of the model's shape.
    """

    weight: Tensor
    support: Tensor
    undense = "a router of fewer experts than the model has is no weight of the model's shape: export it factored"

    def __init__(self, dense: nn.Module, weight: Tensor, bias: Tensor | None, support: Tensor, kept: int) -> None:
        super().__init__()
        self.of, self.kept = cast(Tensor, dense.weight).shape[0], kept
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.register_buffer("support", support)
        for name, held in dense._buffers.items():
            if held is not None and held.shape[:1] == (self.of,):
                held = held[self.experts().to(held.device)]
            self.register_buffer(name, held, name not in dense._non_persistent_buffers_set)
        router = copy.copy(dense)
        for name, value in vars(dense).items():
            if type(value) is int and value == self.of and "experts" in name:
                setattr(router, name, kept)
            elif type(value) is int and name in ("top_k", "topk"):
                setattr(router, name, min(value, kept))
        router._parameters, router._buffers = dict(dense._parameters), dict(dense._buffers)
        vars(self)["router"] = router  # its tensors are ours

    def experts(self) -> Tensor:
        """Their numbers among all, rising, (K,); any where nothing was loaded yet."""
        if self.support.is_meta:
            return torch.arange(self.kept)
        return columns_of(self.support, 1, self.of, self.kept)[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        router, numbers = cast(nn.Module, self.router), self.experts()
        router._parameters.update({name: self._parameters[name] for name in router._parameters})
        router._buffers.update({name: self._buffers[name] for name in router._buffers})
        return tuple(each if each.is_floating_point() else numbers[each] for each in router(*inputs, **named))

    @staticmethod
    def formula(settings: Settings) -> str:
        return "torch.zeros(m, n).index_copy(0, columns(support, 1, m, experts)[0], weight.float())"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return RestrictedRouter(dense, tensors["weight"], bias, tensors["support"], settings["experts"])

    def matrix(self) -> Tensor:
        rows = self.weight.float()
        return rows.new_zeros(self.of, rows.shape[1]).index_copy(0, self.experts(), rows)

    def full_bias(self) -> Tensor | None:
        bias = self.bias
        return None if bias is None else bias.new_zeros(self.of).index_copy(0, self.experts(), bias)

    def multiplications(self) -> int:
        return self.weight.numel()

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        kept = settings["experts"]
        if not 0 < kept < rows:
            raise ValueError(f"{kept} of {rows} experts")
        found: Shapes = {
            "weight": ((kept, columns), None),
            "support": ((support_bytes(1, rows, kept),), torch.uint8),
        }
        return found | ({"bias": ((kept,), None)} if bias else {})

    def extra_repr(self) -> str:
        return f"{self.kept} of {self.of} experts"
