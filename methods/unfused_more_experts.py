"""Experts in other forms: the matrices of all one below the other (DBRX), one linear of every expert (JetMoE)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.unfused import unfused_kind
from rankfront.methods.unfused_experts import Expert, Experts, Routed, RoutedExperts

FLAT = ("w1", "v1", "w2")  # DBRX's gate, up and down


@unfused_kind("flat-experts")
class FlatExperts(RoutedExperts):
    """The same, of a module whose child has the matrices of all experts one below the other: w1 and v1 (E I, H) are
    gates and ups, w2 (E I, H) downs transposed."""

    @classmethod
    def holder(cls, own: nn.Module) -> nn.Module:
        found = [child for child in own.children() if tuple(dict(child.named_parameters(recurse=False))) == FLAT]
        return found[0] if len(found) == 1 else own

    @classmethod
    def proposals(cls, own: nn.Module) -> Iterator[dict[str, int]]:
        held, count = cls.holder(own), getattr(own, "num_experts", None)
        if held is own or type(count) is not int or list(own.parameters(recurse=False)):
            return
        shapes = {tuple(tensor.shape) for tensor in held.parameters(recurse=False)}
        fits = len(shapes) == 1 and next(iter(shapes))[0] % count == 0
        if fits and len(inspect.signature(own.forward).parameters) == cls.inputs:
            yield {}

    @classmethod
    def views(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        held, count = cls.holder(own), cast(int, own.num_experts)
        gate, up, down = (held.get_parameter(name).detach().unflatten(0, (count, -1)) for name in FLAT)
        found = {}
        for number in range(count):
            found[f"{number}.gate_proj.weight"], found[f"{number}.up_proj.weight"] = gate[number], up[number]
            found[f"{number}.down_proj.weight"] = down[number].T
        return found

    def activate(self, *projected: Tensor) -> Tensor:
        gate, up = projected
        return cast(Tensor, cast(Any, self.holder(self.own)).activation_fn(gate) * up)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Hidden states (B, L, H), numbers of experts (B L, k), weights (B L, k) -> (B, L, H)."""
        hidden, chosen, weights = self.given(inputs, named)
        return super().forward(hidden.flatten(0, -2), chosen, weights).view(hidden.shape)


@unfused_kind("split-experts")
class SplitExperts(Experts):
    """One linear of every expert, of weight (E, m, n), which gets its own rows of the input, after those of the expert
    before it. What is done with the outputs is others' to know, and so are the router's weights."""

    inputs = 2

    @classmethod
    def proposals(cls, own: nn.Module) -> Iterator[dict[str, int]]:
        held = dict(own.named_parameters(recurse=False))
        stacked = held.keys() == {"weight"} and held["weight"].ndim == 3
        if stacked and len(inspect.signature(own.forward).parameters) == cls.inputs:
            yield {}

    @classmethod
    def views(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        return {f"{number}.proj.weight": each for number, each in enumerate(own.get_parameter("weight").detach())}

    def run(self, number: int, x: Tensor, routed: Routed) -> Tensor:
        expert = cast(Expert, self.get_submodule(str(number)))
        expert.routed = routed
        return cast(Tensor, cast(Any, expert.proj)(x))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """(r, n) and a list of how many rows each expert has -> (r, m)."""
        rows, counts = self.given(inputs, named)
        found, places = [], torch.arange(len(rows), device=rows.device).split(counts)
        for number, own in enumerate(places):
            if len(own) or self.least is not None:
                found.append(self.run(number, rows[own], Routed(own, None)))
            self.see_more(number, len(own), rows, None)
        return torch.cat(found)
