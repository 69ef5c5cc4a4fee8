"""The sites of a model: every weight that can be treated, from the module tree."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankfront.methods import InputError, Site
from rankfront.methods.layers import row_scale, weight_of
from rankfront.methods.unfused import unfused_in
from rankfront.methods.unfused_experts import Experts
from rankfront.search.inputs.calls import read_below, unlike_calls
from rankfront.search.inputs.joint_sites import joint_sites, runs_of_blocks, weight_at
from rankfront.search.inputs.routers import random_copy
from rankfront.search.names import Place

NUMBERED = re.compile(r"\.\d+\.")  # within a block: members of a list, such as experts, are of one kind
ROWS = 16  # of a table's copy by which it is seen what it does
LINEAR = (nn.Linear, Conv1D)  # classes of dense linears; Conv1D is GPT-2's transposed one


def find_sites(model: nn.Module) -> dict[Site, Place]:
    """Every weight that can be treated, in the order of the module tree.

    Inside the blocks: each dense linear, named by its module path, and after those of a block what may be treated
    jointly there, or there and in the blocks before it (see `joint`). In other lists of blocks: each dense linear.
    Outside: the output head and the embedding table; tied, they are one site under the head's name, for there is one
    matrix.
    """
    prefix, found = blocks(model)
    within = [_linears(block) for block in found]
    others = {path: [_linears(block) for block in own] for path, own in lists_beside(model, prefix).items()}
    shared = _take_shared({prefix: within, **others})
    sites: dict[Site, Place] = {}
    for number, block in enumerate(found):
        path = f"{prefix}.{number}"
        linears = {f"{path}.{name}": module for name, module in within[number].items()}
        single = [_site(name, module) for name, module in linears.items()]
        for site in [*single, *joint_sites(model, path, block, linears)]:
            kind = NUMBERED.sub(".*.", site.name.removeprefix(f"{path}."))
            sites[_everywhere(site, shared)] = Place(number, kind)
        for first, kind, site in runs_of_blocks(prefix, number, within):
            sites[_everywhere(site, shared)] = Place(first, kind)
    for path, own in others.items():
        for number, linears in enumerate(own):
            for name, module in linears.items():
                kind = NUMBERED.sub(".*.", f"{path}.{name}")
                sites[_everywhere(_site(f"{path}.{number}.{name}", module), shared)] = Place(number, kind)
    for site in _outer_sites(model):
        sites[site] = Place(None, site.name)
    shares = {path: module.share for path, module in unfused_in(model).items() if isinstance(module, Experts)}
    return {_routed(site, shares): place for site, place in sites.items()} if shares else sites


def _routed(site: Site, shares: Mapping[str, float]) -> Site:
    """``site`` with the shares of tokens that its weights are given, those of experts by the path of their module."""
    weights = (replace(weight, share=shares.get(weight.path.rsplit(".", 2)[0], 1.0)) for weight in site.weights)
    return replace(site, weights=tuple(weights))


def _take_shared(lists: Mapping[str, list[dict[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """Path of a linear -> those of later linears that have the very same weight, which are taken out of ``lists``, the
    linears of every block by name, of every list by its path."""
    first: dict[int, str] = {}
    shared: dict[str, tuple[str, ...]] = {}
    for prefix, within in lists.items():
        for number, linears in enumerate(within):
            for name, module in list(linears.items()):
                path = f"{prefix}.{number}.{name}"
                known = first.setdefault(id(module.weight), path)
                if known != path:
                    shared[known] = (*shared.get(known, ()), path)
                    del linears[name]
    return shared


def _everywhere(site: Site, shared: dict[str, tuple[str, ...]]) -> Site:
    if not any(weight.path in shared for weight in site.weights):
        return site
    return replace(site, weights=tuple(replace(w, shared=shared.get(w.path, ())) for w in site.weights))


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    """The dense linears of a block that its code calls as such, by their names in it."""
    modules: dict[str, Any] = dict(block.named_modules())
    found = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        kind: Any = type(modules[parent])
        if is_linear(module) and own not in unlike_calls(kind):
            found[name] = module
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's blocks: of the ModuleLists that the text passes, the one whose linears hold most.

    Towers of images and sound, which are models of their own with a configuration of another kind, are passed over.
    Raises `InputError` for a model without such a list.
    """
    beside = towers(model)
    lists = {
        path: sum(weight_of(inner).numel() for inner in set(module.modules()) if is_linear(inner))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not path.startswith(beside)
    }
    path = max(lists, key=lists.__getitem__, default="")  # of equals the first, which is the outer one
    if not lists.get(path):
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers: it cannot be searched")
    return path, cast(nn.ModuleList, model.get_submodule(path))


def lists_beside(model: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """Path -> list of the blocks that are in neither a tower nor the list at ``prefix``: HRM's second stack, XLM's
    attentions. Blocks are what has linears and is none."""
    out = (*towers(model), f"{prefix}.")
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or f"{path}.".startswith(out) or prefix.startswith(f"{path}."):
            continue
        linears = [inner for block in module for inner in block.modules() if inner is not block and is_linear(inner)]
        if linears and not path.startswith(tuple(f"{known}." for known in found)):
            found[path] = module
    return found


def towers(model: Any) -> tuple[str, ...]:
    """Prefixes of the paths in the models within ``model`` that read something else than its text."""
    config = getattr(model, "config", None)
    if config is None:
        return ()
    ours = {type(config), type(config.get_text_config(decoder=True))}
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in ours
    )


def is_linear(module: nn.Module) -> bool:
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


@torch.no_grad()
def scales_rows(table: nn.Embedding) -> bool:
    """Whether a table gives its rows or multiples of them, rather than a norm of them as Inkling's does: looked at in a
    copy of few rows with random values, for a skeleton has none."""
    few = copy.copy(table)
    few._parameters = {"weight": nn.Parameter(torch.empty(ROWS, table.embedding_dim, device="meta"))}
    few.num_embeddings, few.padding_idx = ROWS, None
    try:
        row_scale(cast(nn.Embedding, random_copy(few, torch.Generator().manual_seed(0))))
    except InputError:
        return False
    return True


def _site(path: str, module: nn.Module, **more: Any) -> Site:
    return Site(path, (weight_at("weight", path, module, **more),))


def _outer_sites(model: Any) -> Iterator[Site]:
    paths = {module: path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    scales = isinstance(table, nn.Embedding) and scales_rows(table)
    if tied and not scales:
        return
    if any(_read_elsewhere(model, paths[module]) for module in ((head, table) if tied else ())):
        return
    if head is not None and is_linear(head) and not _read_elsewhere(model, paths[head]):
        yield _site(paths[head], head, tied=(paths[table],) if tied else ())
    if scales and not tied and not _read_elsewhere(model, paths[table]):
        yield _site(paths[table], table, kind="embedding")


def _read_elsewhere(model: nn.Module, path: str) -> bool:
    """Whether code above the linear or table at ``path`` reads its weight."""
    *above, own = path.split(".")
    kinds: list[Any] = [type(model.get_submodule(".".join(above[:depth]))) for depth in range(len(above) + 1)]
    return own in unlike_calls(kinds[-1]) or any(own in read_below(kind) for kind in kinds)


def weights_at(model: Any, site: Site) -> dict[str, Tensor]:
    """Role -> W of a site's weights; those of a joint site with their biases under ``ROLE.bias``."""
    modules = {weight.role: model.get_submodule(weight.path) for weight in site.weights}
    biases = {f"{w.role}.bias": modules[w.role].bias for w in site.weights if w.bias and len(site.weights) > 1}
    return {role: weight_of(module) for role, module in modules.items()} | biases
