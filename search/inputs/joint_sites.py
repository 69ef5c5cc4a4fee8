"""Joint sites: which weights of a block, or of adjacent blocks, belong together, by the names of modules and the shapes
of weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rankfront.methods import Heads, Site, Weight
from rankfront.methods.layers import weight_of
from rankfront.methods.unfused_experts import Experts
from rankfront.methods.unfused_projections import Projections
from rankfront.search.inputs.routers import routed_sites

# What the parts of an attention and of an MLP are called across architectures.
ATTENTION = {
    "query": ("q_proj", "query", "q_lin", "self.query"),
    "key": ("k_proj", "key", "k_lin", "self.key"),
    "value": ("v_proj", "value", "v_lin", "self.value"),
    "output": ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "Wo", "output.dense"),
}
MLP = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "w3", "lin1", "intermediate.dense"),
    "down": (
        "down_proj",
        "fc2",
        "c_proj",
        "dense_4h_to_h",
        "fc_out",
        "output_linear",
        "w2",
        "lin2",
        "Wo",
        "output.dense",
    ),
}
NORMS = re.compile(r"(^|_)(q|k|qk|query|key)_?(layer_?)?norm")  # of queries and keys, before they meet
# What is treated together, by role; the last one is the site's anchor.
TOGETHER = (("key", "query"), ("value", "output"), ("query", "key", "value", "output"))
# What reads the same input.
SIBLINGS = (("query", "key", "value"), ("gate", "up"))
ROTATES = ("rotate_half", "rotate_every_two")  # what models call the function that turns each pair by a right angle
DEPTH = 1  # modules between a block's part and its linears where there are any, as in BERT
RUNS = (2, 3, 4)  # adjacent blocks whose projections may share a basis


def joint_sites(model: Any, path: str, block: nn.Module, linears: dict[str, nn.Module]) -> Iterator[Site]:
    """The joint sites of the block at ``path``; ``linears`` are its dense linears by path."""
    below: dict[str, dict[str, str]] = {}  # path -> the linears `DEPTH` modules further down than its children
    for linear in linears:
        above = linear.rsplit(".", 1 + DEPTH)[0]
        below.setdefault(above, {})[linear.removeprefix(f"{above}.")] = linear
    for name, module in block.named_modules():
        if isinstance(module, Projections):  # its parent's
            continue
        parent = f"{path}.{name}" if name else path
        children = {child.rpartition(".")[2]: child for child in _children(parent, module) if child in linears}
        own = children | below.get(parent, {})
        if isinstance(module, Experts):
            yield from _of_all_experts(parent, module.count, linears)
            yield from routed_sites(model, parent, module, linears)
        attention = _weights(own, linears, ATTENTION)
        mlp = _weights(own, linears, MLP)
        found = _weights(children, linears, ATTENTION) | _weights(children, linears, MLP)
        for family in SIBLINGS:
            siblings = [weight for role, weight in found.items() if role in family]
            if len(siblings) == len(family) and len({weight.in_features for weight in siblings}) == 1:
                yield _site(parent, siblings, separate=True)
        if len(attention) == len(ATTENTION):
            heads = _heads(model, module, attention)
            if heads is not None:
                for roles in TOGETHER:
                    yield _site(parent, [attention[role] for role in roles], heads)
        if {"up", "down"} <= mlp.keys() and _fits(mlp):
            yield _site(parent, list(mlp.values()))


def _of_all_experts(parent: str, count: int, linears: dict[str, nn.Module]) -> Iterator[Site]:
    """Each projection of a layer's experts that reads the residual stream."""
    for name in (*MLP["gate"], *MLP["up"]):
        paths = [f"{parent}.{number}.{name}" for number in range(count)]
        if count > 1 and all(path in linears for path in paths):
            weights = tuple(weight_at(f"expert{number}", path, linears[path]) for number, path in enumerate(paths))
            yield Site(f"{parent}.0-{count - 1}.{name}", weights, separate=True)


def runs_of_blocks(prefix: str, number: int, found: Sequence[dict[str, nn.Module]]) -> Iterator[tuple[int, str, Site]]:
    """(first block, kind, site) of what ends with block ``number``: the same projection of a run of adjacent blocks.

    ``found`` are the dense linears of every block of the model, by name within it, under the path ``prefix``. Runs of
    one length follow each other without overlap. Projections that write to the residual stream are left out.
    """
    writes = (*ATTENTION["output"], *MLP["down"])
    for count in RUNS:
        first = number + 1 - count
        if first < 0 or first % count:
            continue
        for name, module in found[number].items():
            if re.search(r"\.\d+\.", name):  # experts of one number in several blocks have nothing in common
                continue
            members = [found[block].get(name) for block in range(first, number + 1)]
            if name.rpartition(".")[2] in writes or any(
                other is None or weight_of(other).shape != weight_of(module).shape for other in members
            ):
                continue
            weights = tuple(
                weight_at(str(place), f"{prefix}.{first + place}.{name}", other)
                for place, other in enumerate(members)
                if other is not None
            )
            yield first, f"{name} x {count}", Site(f"{prefix}.{first}-{number}.{name}", weights, separate=True)


def _children(parent: str, module: nn.Module) -> Iterator[str]:
    """Paths of the children of the ``module`` at ``parent``, and of the projections that one of them was fused of."""
    for name, child in module.named_children():
        yield f"{parent}.{name}"
        if isinstance(child, Projections):
            yield from (f"{parent}.{name}.{part}" for part, _ in child.named_children())


def _weights(
    own: dict[str, str], linears: dict[str, nn.Module], names: dict[str, tuple[str, ...]]
) -> dict[str, Weight]:
    """Role -> weight, for the roles that ``own`` children have."""
    found = {}
    for role, known in names.items():
        path = next((own[name] for name in known if name in own), None)
        if path is not None:
            found[role] = weight_at(role, path, linears[path])
    return found


def weight_at(role: str, path: str, module: nn.Module, **more: Any) -> Weight:
    """The weight of the dense linear or table ``module`` at ``path``."""
    rows, columns = weight_of(module).shape
    return Weight(role, path, rows, columns, bias=getattr(module, "bias", None) is not None, **more)


def _site(parent: str, weights: list[Weight], heads: Heads | None = None, separate: bool = False) -> Site:
    """Named after what it claims: ``model.layers.0.self_attn.v_proj+o_proj``."""
    children = "+".join(weight.path.removeprefix(f"{parent}.") for weight in weights)
    return Site(f"{parent}.{children}", tuple(weights), heads, separate)


def _fits(mlp: dict[str, Weight]) -> bool:
    """Whether every neuron is one row of the projections up and one column of the one down."""
    inner = mlp["down"].in_features
    return all(weight.out_features == inner for role, weight in mlp.items() if role != "down")


def _heads(model: Any, attention: nn.Module, weights: dict[str, Weight]) -> Heads | None:
    """How the projections split into heads; None where they do not do so evenly."""
    config = model.config
    count = getattr(config, "num_attention_heads", None)
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    if width is None and count:
        width = weights["query"].out_features // count
    if not isinstance(width, int):
        return None
    queries, keys = (weights[role].out_features // width for role in ("query", "key"))
    shapes = (queries * width, keys * width, keys * width, queries * width)
    found = (*(weights[role].out_features for role in ("query", "key", "value")), weights["output"].in_features)
    if shapes != found or not keys or queries % keys:
        return None
    planes, fixed = _rotary(model, attention, width)
    if any(NORMS.search(name) for name, _ in attention.named_children()):
        fixed = "queries and keys are normalised after their projections"
    return Heads(queries, keys, width, planes, fixed)


def _rotary(model: Any, attention: nn.Module, width: int) -> tuple[tuple[tuple[int, int], ...] | None, str | None]:
    """The pairs of dimensions that rotary positions turn, and why queries and keys cannot be changed, if so.

    Which dimensions go together is read from what the model's own function of `ROTATES` does to 1, 2, ..., r, where r
    of the ``width`` dimensions are turned. The others, which any two of may go together, pair up in order.
    """
    turned = _turned(model.config, width)
    if not any(path.rpartition(".")[2] == "rotary_emb" for path, _ in model.named_modules()) and turned == width:
        return None, None
    own = vars(sys.modules[type(attention).__module__])
    rotate = next((own[name] for name in ROTATES if name in own), None)
    if rotate is None:
        return None, "its rotary positions turn each head in a way that is not known"
    with torch.device("cpu"):
        partners = rotate(torch.arange(1.0, turned + 1)[None, None, None]).flatten().abs().long() - 1
    planes = [(i, int(j)) for i, j in enumerate(partners) if i < j]
    planes += [(i, i + 1) for i in range(turned, width - 1, 2)]
    if sorted(dimension for plane in planes for dimension in plane) != list(range(width)):
        return None, "its rotary positions do not turn dimensions in pairs"
    return tuple(planes), None


def _turned(config: Any, width: int) -> int:
    """How many of a head's ``width`` dimensions rotary positions turn, by what configurations call it."""
    count = getattr(config, "rotary_dim", None)
    if isinstance(count, int):
        return min(count, width)
    parameters = getattr(config, "rope_parameters", None) or {}
    shares = (getattr(config, "partial_rotary_factor", None), parameters.get("partial_rotary_factor"))
    return int(width * next((share for share in shares if share), 1.0))
