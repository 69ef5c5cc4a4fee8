"""Modules that hold several matrices in one tensor, taken apart where that computes the same: checked by numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.unfused import Unfused, unfuse, unfused_in, unfused_kinds
from rankfront.methods.unfused_experts import BatchedExperts, Experts, RoutedExperts, sides
from rankfront.methods.unfused_more_experts import FlatExperts, SplitExperts
from rankfront.search.inputs.projections import fused_projections
from rankfront.search.inputs.routers import random_copy

EXPERTS, TOKENS, CHOSEN = 3, 6, 2  # of the small copy of a mixture by which a kind is checked
CLOSE = 1e-4  # of the largest output: sums of the same terms in fp32 in another order
Settings = Mapping[str, int]
Probe = tuple[nn.Module, tuple[Any, ...]]
# What k is called, in routers and in configurations.
CHOSEN_NAMES = ("top_k", "num_experts_per_tok", "topk", "moe_top_k", "moe_k", "num_experts_per_token", "moe_topk")
UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def take_apart(model: nn.Module) -> None:
    """Unfuse whatever a kind of `unfused_kinds` is seen to compute the same for; leave everything else.

    Linears that hold several projections are cut whatever they are: that always computes the same.

    What is checked is a copy with random values and a few experts, so that a skeleton is taken apart as its model is.
    """
    known: dict[Any, dict[str, Any] | None] = {}
    taken: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        if isinstance(module, Unfused):
            taken += (f"{path}.",)
        tensors = dict(module.named_parameters(recurse=False)) or _of_children(module)
        if isinstance(module, Unfused) or path.startswith(taken) or not tensors:
            continue
        key = type(module), tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if key not in known:
            known[key] = how_apart(module)
        spec = known[key]
        if spec is not None:
            unfuse(model, {path: spec})
    unfuse(model, fused_projections(model))
    for path, module in unfused_in(model).items():
        if isinstance(module, Experts):
            module.share = min(1.0, _chosen(model, path, module) / (module.count + module.settings.get("idle", 0)))


def _of_children(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters one module further down."""
    children = module.named_children()
    return {f"{name}.{own}": each for name, child in children for own, each in child.named_parameters(recurse=False)}


def _chosen(model: Any, path: str, module: Experts) -> int:
    """How many of the experts at ``path`` a token is given to, as a router beside them or the configuration says; all
    where neither does."""
    parent = model.get_submodule(path.rpartition(".")[0])
    config = model.config.get_text_config()
    found = (getattr(each, name, None) for each in (parent, *parent.children(), config) for name in CHOSEN_NAMES)
    return next((value for value in found if type(value) is int), module.count)


def how_apart(module: nn.Module) -> dict[str, Any] | None:
    """Kind and settings by which ``module`` can be unfused; None where no kind computes the same."""
    for name, kind in unfused_kinds().items():
        for settings in kind.proposals(module):
            if _same(module, kind, settings):
                return {"kind": name, **settings}
    return None


def _same(module: nn.Module, kind: type[Unfused], settings: Settings) -> bool:
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            small, inputs = PROBES[kind](module, settings, generator)
            unfused = kind(small, settings)
            return _close(small(*inputs), unfused(*inputs)) and _paired(unfused, generator)
    except UNFIT:
        return False


def _close(wanted: Tensor, given: Tensor) -> bool:
    return bool(wanted.shape == given.shape and (wanted - given).abs().max() <= CLOSE * wanted.abs().max())


def _paired(unfused: Unfused, generator: torch.Generator) -> bool:
    """Whether a neuron of an expert is one row of each projection up: without the first one the others are as before.

    Halves that are cut where gates and ups alternate give the same whole."""
    if not isinstance(unfused, Experts):
        return True
    views = unfused.views(unfused.own, unfused.settings)
    rows = [len(view) for name, view in views.items() if name in ("0.gate_proj.weight", "0.up_proj.weight")]
    if not rows:
        return True
    projected = [torch.randn(TOKENS, count, generator=generator) for count in rows]
    return _close(unfused.activate(*projected)[:, 1:], unfused.activate(*(each[:, 1:] for each in projected)))


def _few_experts(module: nn.Module, count: int, generator: torch.Generator) -> nn.Module:
    """A copy in fp32 on the processor, with `EXPERTS` experts of random values instead of ``count``, and as many that
    have no down projection, if any has none."""
    held = dict(module.named_parameters(recurse=False))
    lengths = {len(tensor) for tensor in held.values()}
    few = {count: EXPERTS}
    for more in lengths - {count}:
        few |= {more: 2 * EXPERTS, more - count: EXPERTS}
    small = copy.copy(module)
    vars(small).update({name: few[value] for name, value in _counts(module).items() if value in few})
    small._parameters, small._modules = {}, {}
    if hasattr(small, "config"):  # kernels want strides that some widths do not have
        config: Any = copy.deepcopy(small.config)
        config._experts_implementation = "eager"
        small.config = config
    for name, tensor in held.items():
        shape = few[len(tensor)], *tensor.shape[1:]
        small._parameters[name] = nn.Parameter(_drawn(shape, generator), requires_grad=False)
    for name, child in module.named_children():
        small._modules[name] = random_copy(child, generator)
    return small


def _counts(module: nn.Module) -> dict[str, int]:
    """The numbers that a module has of its experts."""
    named = {name: value for name, value in vars(module).items() if "experts" in name or "expert_num" in name}
    return {name: value for name, value in named.items() if type(value) is int}


def _drawn(shape: Any, generator: torch.Generator) -> Tensor:
    """Normal values, of deviation 1 / √n in a matrix (m, n) whichever way it lies."""
    return torch.randn(shape, generator=generator) / (min(shape[-2:]) ** 0.5 if len(shape) > 1 else 1)


def _routed(module: nn.Module, settings: Settings, generator: torch.Generator) -> Probe:
    count, idle = len(cast(Tensor, module.down_proj)), EXPERTS * bool(settings.get("idle"))
    hidden = torch.randn(TOKENS, sides(module, settings["transposed"])[0], generator=generator)
    return _few_experts(module, count, generator), (hidden, *_choices(EXPERTS + idle, generator))


def _choices(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a router: numbers of experts and weights, both (t, k)."""
    chosen = torch.rand(TOKENS, count, generator=generator).topk(CHOSEN).indices
    return chosen, torch.rand(TOKENS, CHOSEN, generator=generator)


def _batched(module: nn.Module, settings: Settings, generator: torch.Generator) -> Probe:
    hidden = torch.randn(EXPERTS * TOKENS, sides(module, settings["transposed"])[0], generator=generator)
    hidden[torch.rand(len(hidden), generator=generator) < 0.5] = 0  # tokens that are not routed there
    return _few_experts(module, len(cast(Tensor, module.down_proj)), generator), (hidden,)


def _flat(module: nn.Module, settings: Settings, generator: torch.Generator) -> Probe:
    held, small = FlatExperts.holder(module), copy.copy(module)
    vars(small).update(dict.fromkeys(_counts(module), EXPERTS))
    few = copy.copy(held)
    vars(few).update(dict.fromkeys(_counts(held), EXPERTS))
    few._parameters = {}
    for name, tensor in held.named_parameters(recurse=False):
        shape = len(tensor) // cast(int, module.num_experts) * EXPERTS, tensor.shape[1]
        few._parameters[name] = nn.Parameter(_drawn(shape, generator), requires_grad=False)
    small._modules = {name: few if child is held else child for name, child in module.named_children()}
    hidden = torch.randn(1, TOKENS, tensor.shape[1], generator=generator)
    return small, (hidden, *_choices(EXPERTS, generator))


def _split(module: nn.Module, settings: Settings, generator: torch.Generator) -> Probe:
    weight = cast(Tensor, module.weight)
    counts = [TOKENS // 2, 0, TOKENS - TOKENS // 2]  # of the experts
    rows = torch.randn(TOKENS, weight.shape[2], generator=generator)
    return _few_experts(module, len(weight), generator), (rows, counts)


PROBES: dict[type[Unfused], Callable[[nn.Module, Settings, torch.Generator], Probe]] = {
    RoutedExperts: _routed,
    BatchedExperts: _batched,
    FlatExperts: _flat,
    SplitExperts: _split,
}
