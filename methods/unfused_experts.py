"""Experts of a mixture, fused in three-dimensional tensors, as one module of plain linears for each expert."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.unfused import Unfused, unfused_kind

TENSORS = {f"{name}_proj{more}" for name in ("gate_up", "up", "down") for more in ("", "_bias")}


def sides(own: nn.Module, transposed: int) -> tuple[int, int]:
    """H and I of fused experts."""
    down = cast(Tensor, own.down_proj).shape
    return (down[2], down[1]) if transposed else (down[1], down[2])


@dataclass(frozen=True)
class Routed:
    """What an expert is given in a forward pass.

    Attributes:
        tokens: which tokens, each once, (r,).
        weights: what the router multiplies its outputs by, (r,); None where it has multiplied the inputs already, or
            where that is not known.
    """

    tokens: Tensor
    weights: Tensor | None


class Expert(nn.Module):
    """y = W_down a(W_gate x, W_up x), or W_down a(W_up x), of the tokens that are routed to it.

    Attributes:
        routed: of the pass that runs, or ran last: hooks on the linears read it.
    """

    routed: Routed | None = None

    def forward(self, x: Tensor, activate: Callable[..., Tensor]) -> Tensor:
        """(r, H) -> (r, H)."""
        projections: Any = (self.gate_proj, self.up_proj) if "gate_proj" in self._modules else (self.up_proj,)
        hidden = activate(*(projection(x) for projection in projections))
        return cast(Tensor, cast(Any, self.down_proj)(hidden))


class Experts(Unfused):
    """One `Expert` for each of E, under its number.

    Fused they are gate_up_proj (E, 2I, H) or up_proj (E, I, H), and down_proj (E, H, I). The settings say whether each
    matrix is ``transposed``, and whether gates are ``interleaved``: every second of the 2I. The activation is the fused
    module's own. Gates and ups may be of more experts than downs: those after E give what they are given, and their
    rows are never read.

    Attributes:
        least: how many tokens each expert sees in a pass, for hooks on its linears: with fewer it runs on further ones,
            of which nothing comes. At 0 it runs on none if need be; None leaves out experts without tokens.
    """

    share = 1.0  # k / E, where whoever took the model apart knows k
    inputs: int  # how many the fused module's forward has
    least: int | None = None

    def __init__(self, own: nn.Module, settings: Mapping[str, int]) -> None:
        super().__init__(own, settings)
        for path, linear in self.linears().items():
            number, _, name = path.partition(".")
            if number not in self._modules:
                self.add_module(number, Expert())
            self.get_submodule(number).add_module(name, linear)
        self.count = sum(isinstance(module, Expert) for module in self.children())
        self._names = tuple(inspect.signature(own.forward).parameters)

    @classmethod
    def proposals(cls, own: nn.Module) -> Iterator[dict[str, int]]:
        named = {name: tensor.ndim for name, tensor in own.named_parameters(recurse=False)}
        gated, others = "gate_up_proj" in named, list(own.buffers(recurse=False))
        if named.get("down_proj") != 3 or not named.keys() <= TENSORS or gated == ("up_proj" in named) or others:
            return
        if len(inspect.signature(own.forward).parameters) != cls.inputs:
            return
        first = dict(own.named_parameters(recurse=False))["gate_up_proj" if gated else "up_proj"]
        more = len(first) - len(cast(Tensor, own.down_proj))
        for transposed in (0, 1):
            width, inner = sides(own, transposed)
            if list(first.shape[1:]) == [inner * (1 + gated), width][:: -1 if transposed else 1]:
                for interleaved in range(1 + gated):
                    yield {"transposed": transposed, "interleaved": interleaved, **({"idle": more} if more else {})}

    @classmethod
    def spare(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        if not settings.get("idle"):
            return {}
        held = {name: tensor.detach() for name, tensor in own.named_parameters(recurse=False)}
        count = len(held["down_proj"])
        return {f"idle_{name}": tensor[count:] for name, tensor in held.items() if len(tensor) > count}

    @classmethod
    def views(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        held = {name: tensor.detach() for name, tensor in own.named_parameters(recurse=False)}
        gated = "gate_up_proj" in held
        first, transposed = "gate_up_proj" if gated else "up_proj", settings["transposed"]
        found = {}
        for number in range(held["down_proj"].shape[0]):
            for kind in ("weight", "bias"):
                up, down = (held.get(name + "_bias" * (kind == "bias")) for name in (first, "down_proj"))
                if up is None or down is None:
                    continue
                up, down = (each[number].T if transposed and kind == "weight" else each[number] for each in (up, down))
                if gated:
                    gate, up = (up[::2], up[1::2]) if settings["interleaved"] else up.chunk(2)
                    found[f"{number}.gate_proj.{kind}"] = gate
                found[f"{number}.up_proj.{kind}"] = up
                found[f"{number}.down_proj.{kind}"] = down
        return found

    def activate(self, *projected: Tensor) -> Tensor:
        """a(gate, up), or a(up), (r, I)."""
        own: Any = self.own
        gate = getattr(type(own), "_apply_gate", None)
        if len(projected) == 1:
            return cast(Tensor, own.act_fn(*projected))
        if gate is None or gate.__name__ == "_default_apply_gate":
            return cast(Tensor, own.act_fn(projected[0]) * projected[1])
        joined = torch.stack(projected, -1).flatten(-2) if self.settings["interleaved"] else torch.cat(projected, -1)
        return cast(Tensor, own._apply_gate(joined))

    def run(self, number: int, x: Tensor, routed: Routed) -> Tensor:
        """What the expert makes of the inputs (r, H) of its tokens, before the router's weights."""
        expert = cast(Expert, self.get_submodule(str(number)))
        expert.routed = routed
        y = expert(x, self.activate)
        return cast(Tensor, self.own.post_expert_norm(y)) if hasattr(self.own, "post_expert_norm") else y  # type: ignore[operator]

    @torch.no_grad()
    def see_more(self, number: int, count: int, hidden: Tensor, weight: Tensor | None) -> None:
        """Show an expert that has ``count`` tokens as many of ``hidden`` (t, H) as it lacks to `least`."""
        more = min((self.least or 0) - count, len(hidden))
        if more > 0:
            tokens = torch.linspace(0, len(hidden) - 1, more, device=hidden.device).long()
            weights = None if weight is None else weight.expand(more)
            self.run(number, hidden[tokens], Routed(tokens, weights))

    def given(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call, in order."""
        return [*inputs, *(named[name] for name in self._names[len(inputs) :])]


@unfused_kind("experts")
class RoutedExperts(Experts):
    """Of each token's hidden state, the sum of what its experts make of it by their weights."""

    inputs = 3

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Hidden states (t, H), numbers of experts (t, k), weights (t, k) -> (t, H)."""
        hidden, chosen, weights = self.given(inputs, named)
        order = chosen.flatten().argsort(stable=True)
        tokens, scales = order // chosen.shape[1], weights.flatten()[order]
        out = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weights.dtype))
        start = 0
        for number, count in enumerate(torch.bincount(chosen.flatten(), minlength=self.count)[: self.count].tolist()):
            own = slice(start, start + count)
            start += count
            if count or self.least is not None:
                y = self.run(number, hidden[tokens[own]], Routed(tokens[own], scales[own]))
                out.index_add_(0, tokens[own], (y * scales[own, None]).to(out.dtype))
            self.see_more(number, count, hidden, weights.detach().float().square().mean().sqrt())
        if self.settings.get("idle"):
            out = out + hidden * (weights * (chosen >= self.count)).sum(1, keepdim=True)
        return cast(Tensor, out.to(hidden.dtype))


@unfused_kind("batched-experts")
class BatchedExperts(Experts):
    """Of E copies of the hidden states, multiplied by the router's weights beforehand, what each expert makes of its
    own. Those of tokens that are not routed to it are zeros, and stay so."""

    inputs = 1

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """(E t, H) -> (E t, H)."""
        (hidden,) = self.given(inputs, named)
        routed, out = hidden.detach().any(-1), []
        for number, x in enumerate(hidden.view(self.count, -1, hidden.shape[-1])):
            tokens, y = routed.view(self.count, -1)[number].nonzero()[:, 0], torch.zeros_like(x)
            if len(tokens) or self.least is not None:
                y.index_add_(0, tokens, self.run(number, x[tokens], Routed(tokens, None)).to(y.dtype))
            self.see_more(number, len(tokens), hidden[routed], None)
            out.append(y)
        return torch.stack(out).view(hidden.shape)


@contextmanager
def seeing(model: nn.Module, least: int) -> Iterator[None]:
    """Within, every expert of ``model`` runs in every pass, on at least so many of its tokens."""
    found = [module for module in model.modules() if isinstance(module, Experts)]
    try:
        for module in found:
            module.least = least
        yield
    finally:
        for module in found:
            module.least = None


def is_expert(model: nn.Module, path: str) -> bool:
    """Whether the linear at ``path`` is an expert's, which sees the tokens alone that are routed to it."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), Expert)


def routed_at(model: nn.Module, path: str) -> Routed | None:
    """What the expert was given last that has its linear at ``path``; None where that is no expert's, or never ran."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return parent.routed if isinstance(parent, Expert) else None
