"""The sites of a model: every weight that can be treated, from the module tree."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfront.methods import InputError, Site
from rankfront.methods.layers import weight_of
from rankfront.search.inputs.joint_sites import joint_sites, runs_of_blocks, weight_at
from rankfront.search.names import Place

NUMBERED = re.compile(r"\.\d+\.")  # within a block: members of a list, such as experts, are of one kind
LINEAR = (nn.Linear, Conv1D)  # classes of dense linears; Conv1D is GPT-2's transposed one


def find_sites(model: nn.Module) -> dict[Site, Place]:
    """Every weight that can be treated, in the order of the module tree.

    Inside the blocks: each dense linear, named by its module path, and after those of a block what may be treated
    jointly there, or there and in the blocks before it (see `joint`). Outside: the output head and the embedding
    table; tied, they are one site under the head's name, for there is one matrix.
    """
    prefix, found = blocks(model)
    sites: dict[Site, Place] = {}
    within = [_linears(block) for block in found]
    for number, block in enumerate(found):
        path = f"{prefix}.{number}"
        linears = {f"{path}.{name}": module for name, module in within[number].items()}
        single = [_site(name, module) for name, module in linears.items()]
        for site in [*single, *joint_sites(model, path, block, linears)]:
            sites[site] = Place(number, NUMBERED.sub(".*.", site.name.removeprefix(f"{path}.")))
        for first, kind, site in runs_of_blocks(prefix, number, within):
            sites[site] = Place(first, kind)
    for site in _outer_sites(model):
        sites[site] = Place(None, site.name)
    return sites


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    """The dense linears of a block that its code calls as such, by their names in it."""
    modules: dict[str, Any] = dict(block.named_modules())
    found = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        kind: Any = type(modules[parent])
        if _is_linear(module) and own not in read_by_others(kind):
            found[name] = module
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's blocks: the longest ModuleList whose items hold linears.

    Raises `InputError` for a model without one.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(inner) for inner in module.modules())
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers: it cannot be searched")
    return max(lists, key=lambda item: len(item[1]))


def _is_linear(module: nn.Module) -> bool:
    """Whether factors can stand in for it: an instance with a forward of its own, or a class, may do something else."""
    kind: Any = type(module)
    return is_plain(kind) and "forward" not in vars(module)


@cache
def is_plain(kind: Any) -> bool:
    """Whether a class is a dense linear: one of `LINEAR`, or a subclass, such as Falcon's, that gives x Wᵀ + b too."""
    if kind in LINEAR or not issubclass(kind, nn.Linear):
        return kind in LINEAR
    try:
        with torch.random.fork_rng(devices=[]):
            module, x = kind(3, 2), torch.randn(4, 3)
        with torch.no_grad():
            return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # made of something else
        return False


READS = r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|numel|data_ptr))"


@cache
def read_by_others(kind: Any) -> frozenset[str]:
    """Names of the children whose weight or bias the code of a class reads itself, as Mamba's mixers do of ``dt_proj``:
    factors cannot stand in for what is not called."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(match[1] for match in re.finditer(READS, source))


def _site(path: str, module: nn.Module, **more: Any) -> Site:
    return Site(path, (weight_at("weight", path, module, **more),))


def _outer_sites(model: Any) -> Iterator[Site]:
    paths = {module: path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    if head is not None and _is_linear(head):
        yield _site(paths[head], head, tied=(paths[table],) if tied else ())
    if isinstance(table, nn.Embedding) and not tied:
        yield _site(paths[table], table, kind="embedding")


def weights_at(model: Any, site: Site) -> dict[str, Tensor]:
    """Role -> W of a site's weights; those of a joint site with their biases under ``ROLE.bias``."""
    modules = {weight.role: model.get_submodule(weight.path) for weight in site.weights}
    biases = {f"{w.role}.bias": modules[w.role].bias for w in site.weights if w.bias and len(site.weights) > 1}
    return {role: weight_of(module) for role, module in modules.items()} | biases
