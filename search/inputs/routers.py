"""The router of a layer's experts, and the site of it and all of them: found beside them, accepted by numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods import Site, Weight
from rankfront.methods._scatter import packed_columns
from rankfront.methods.expert_prune import ROUTER
from rankfront.methods.layers import replacement
from rankfront.methods.unfused_experts import RoutedExperts
from rankfront.search.inputs.calls import looked_into

TOKENS = 64  # that the router is tried on: most leave some expert out
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def routed_sites(model: Any, path: str, experts: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[Site]:
    """The site of the router and the experts at ``path``, where one beside them can choose among fewer."""
    parent, _, own = path.rpartition(".")
    block = model.get_submodule(parent)
    if not isinstance(experts, RoutedExperts) or experts.count < 2:
        return
    name = next((name for name, module in block.named_children() if _routes(block, name, module, experts.count)), None)
    if name is None:
        return
    rows = cast(Any, block.get_submodule(name))
    biased = rows._parameters.get("bias") is not None
    weights = [Weight(ROUTER, f"{parent}.{name}", experts.count, rows.weight.shape[1], bias=biased)]
    for number in range(experts.count):
        for role, projection in PROJECTIONS.items():
            place = f"{path}.{number}.{projection}"
            if place in linears:
                m, n = cast(Tensor, linears[place].weight).shape
                bias = getattr(linears[place], "bias", None) is not None
                weights.append(Weight(f"{number}.{role}", place, m, n, bias=bias))
    places = tuple(weight.role for weight in weights if weight.role.endswith(".down"))
    if len(places) == experts.count:
        yield Site(f"{parent}.{name}+{own}", tuple(weights), separate=True, places=places)


def _routes(block: nn.Module, name: str, module: nn.Module, count: int) -> bool:
    """Whether ``module`` gives experts and weights for each token by the rows of its matrix, one for each expert: with
    one left out, the choices of tokens that were not given to it stay the same."""
    weight = module._parameters.get("weight")
    others = module._parameters.keys() - {"weight", "bias"}
    if weight is None or weight.ndim != 2 or len(weight) != count or others or list(module.children()):
        return False
    kind: Any = type(block)
    looked = looked_into(kind)
    if isinstance(module, nn.Linear) or looked is None or name in looked:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            router = random_copy(module, generator)
            x = torch.randn(TOKENS, weight.shape[1], generator=generator)
            before = router(x)
            chosen = _chosen(before, count)
            gone = int(torch.bincount(chosen.flatten(), minlength=count).argmin())
            kept = torch.tensor([number for number in range(count) if number != gone])
            tensors = {"weight": cast(Tensor, router.weight)[kept], "support": packed_columns(kept[None], count)}
            if "bias" in router._parameters and router.bias is not None:
                tensors["bias"] = cast(Tensor, router.bias)[kept]
            after = _chosen(replacement(router, "router", tensors, {"experts": count - 1})(x), count)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, StopIteration):
        return False
    free = (chosen != gone).all(1)
    same = chosen[free].sort(1).values.equal(after[free].sort(1).values)
    return bool(free.any()) and same and not bool((after == gone).any())


def random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in fp32 on the processor, with random values."""
    found = copy.deepcopy(module).to_empty(device="cpu").float()
    for tensor in (*found.parameters(), *found.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1:].numel() ** 0.5)
    return found


def _chosen(given: Any, count: int) -> Tensor:
    """The numbers of experts (t, k) among what a router gives; StopIteration where there are none."""
    tensors = [each for each in given if isinstance(each, Tensor)]
    found = next(each for each in tensors if not each.is_floating_point() and each.ndim == 2)
    if not 0 <= int(found.min()) <= int(found.max()) < count:
        raise ValueError("numbers of something else")
    return found
