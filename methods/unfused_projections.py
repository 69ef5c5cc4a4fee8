"""Projections that one linear holds, some rows each, as linears of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.layers import weight_of
from rankfront.methods.unfused import Unfused, unfused_kind


class Projections(Unfused):
    """W x as [W_1 x, W_2 x, …], in the order of the fused rows.

    The rows lie in ``groups``, as many as there are key heads, or one; settings have the rows of each of the `parts` in
    a group. In one group the parts are views of the fused weight, in several they are copies, and it is let go of.
    """

    parts: tuple[str, ...] = ()
    in_place_of_one = True  # what is attached to it is attached to the attention that it belongs to

    def __init__(self, own: nn.Module, settings: Mapping[str, int]) -> None:
        super().__init__(own, settings)
        for name, linear in self.linears().items():
            self.add_module(name, linear)
        if settings["groups"] > 1:
            self._apply(lambda tensor: tensor)

    @classmethod
    def proposals(cls, own: nn.Module) -> Iterator[dict[str, int]]:
        """None: which rows are whose is not seen from a linear alone."""
        return iter(())

    @classmethod
    def views(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        tensors = {"weight": weight_of(own)}
        if getattr(own, "bias", None) is not None:
            tensors["bias"] = cast(Tensor, own.bias)
        return {
            f"{name}.{kind}": part.flatten(0, 1)
            for kind, tensor in tensors.items()
            for name, part in cls._split(tensor, settings).items()
        }

    @classmethod
    def _split(cls, tensor: Tensor, settings: Mapping[str, int]) -> dict[str, Tensor]:
        """(rows, …) to the views (groups, rows of a group, …) of every part; ValueError where they do not fit."""
        groups, counts = settings["groups"], [settings[name] for name in cls.parts]
        if groups < 1 or min(counts) < 1 or groups * sum(counts) != len(tensor):
            raise ValueError(f"{groups} groups of {counts} rows are not {len(tensor)}")
        return dict(zip(cls.parts, tensor.unflatten(0, (groups, -1)).split(counts, dim=1), strict=True))

    def fused(self) -> nn.Module:
        own = super().fused()
        if self.settings["groups"] > 1:
            with torch.no_grad():
                for kind in ("weight", "bias"):
                    if getattr(own, kind) is not None:
                        tensor = weight_of(own) if kind == "weight" else cast(Tensor, own.bias)
                        for name, part in self._split(tensor, self.settings).items():
                            part.copy_(self.get_parameter(f"{name}.{kind}").unflatten(0, part.shape[:2]))
        return own

    def forward(self, x: Tensor) -> Tensor:
        """(…, n) to (…, rows)."""
        groups = self.settings["groups"]
        given: list[Any] = [cast(Any, self._modules[name])(x) for name in self.parts]
        if groups == 1:
            return torch.cat(given, dim=-1)
        return torch.cat([each.unflatten(-1, (groups, -1)) for each in given], dim=-1).flatten(-2)


@unfused_kind("query-key-value")
class QueryKeyValue(Projections):
    """Of an attention."""

    parts = ("q_proj", "k_proj", "v_proj")


@unfused_kind("query-value-key")
class QueryValueKey(Projections):
    """Of CodeGen's."""

    parts = ("q_proj", "v_proj", "k_proj")


@unfused_kind("gate-up")
class GateUp(Projections):
    """Of an MLP."""

    parts = ("gate_proj", "up_proj")


@unfused_kind("query-gate")
class QueryGate(Projections):
    """Of an attention whose outputs are gated, as Qwen3.5's."""

    parts = ("q_proj", "output_gate")
