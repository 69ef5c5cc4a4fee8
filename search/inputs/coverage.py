"""How much of a model's blocks a search can treat, and what it leaves alone: said before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from rankfront.methods import InputError, Site
from rankfront.methods.unfused import Unfused
from rankfront.search.config import SpaceConfig
from rankfront.search.inputs.reached import UNREACHED
from rankfront.search.inputs.sites import blocks, is_plain, lists_beside
from rankfront.search.names import Place

LEAST = 0.5  # share of the blocks' weights below which a study has to say that it is meant so; guess


@dataclass(frozen=True)
class Left:
    """Weights that are no site: their name within a block, numbers as ``*``, how many values, and why."""

    name: str
    values: int
    why: str


@dataclass(frozen=True)
class Coverage:
    """Values of the matrices inside a model's blocks, norms and biases left out. Other lists of blocks, towers
    aside, count too.

    Attributes:
        values: all of them, each once.
        left: what is no site, the largest first.
        biases: values of the biases that go with sites.
    """

    values: int
    left: tuple[Left, ...]
    biases: int = 0

    @property
    def block_values(self) -> int:
        """What ``block_parameters`` is a fraction of: every matrix, site or not, and the biases of sites."""
        return self.values + self.biases

    @property
    def share(self) -> float:
        """Of the blocks' weights, those that are sites."""
        return 1 - sum(each.values for each in self.left) / self.values if self.values else 1.0

    @property
    def reached_share(self) -> float:
        """Of the blocks' weights that text reaches, those that are sites."""
        unreached = sum(each.values for each in self.left if each.why == UNREACHED)
        return self.share * self.values / (self.values - unreached) if unreached < self.values else 1.0

    def without(self, sites: Mapping[Site, Place], refused: Mapping[str, str]) -> Coverage:
        """The same where those of ``sites`` that are single weights and ``refused``, by name with a reason, are left
        out."""
        left, biases = {(each.name, each.why): each.values for each in self.left}, self.biases
        for site, place in sites.items():
            if len(site.weights) == 1 and site.name in refused and place.block is not None:
                key = f"{place.kind}.weight", refused[site.name]
                left[key] = left.get(key, 0) + site.anchor.storage.parameters
                biases -= site.anchor.biases.parameters
        return replace(self, left=_ordered(left), biases=biases)

    def lines(self) -> Iterator[str]:
        """What a launch says first; nothing where every weight is a site."""
        if self.left:
            yield f"{self.share:.1%} of the blocks' weights can be treated; the rest stays dense:"
        for each in self.left:
            yield f"  {each.name}: {each.values / self.values:.1%}, {each.why}"

    def check(self, space: SpaceConfig) -> None:
        """Raise `InputError` where less than `LEAST` can be treated, and the study neither allows it nor has a rule."""
        if self.share < LEAST and not (space.allow_partial or space.rule):
            most = self.left[0]
            raise InputError(
                f"only {self.share:.1%} of the blocks' weights can be treated, for {most.name} ({most.why}) is"
                f" {most.values / self.values:.1%} of them: set space.allow_partial = true to search the rest"
            )


def coverage_of(model: nn.Module, sites: Mapping[Site, Place]) -> Coverage:
    """Of a model, or of its skeleton."""
    prefix, found = blocks(model)
    inside: dict[str, Any] = {
        f"{prefix}.{number}.{path}": module
        for number, block in enumerate(found)
        for path, module in block.named_modules()
    }
    inside |= {
        f"{path}.{inner}": module
        for path, others in lists_beside(model, prefix).items()
        for inner, module in others.named_modules()
    }
    treated = {id(parameter) for parameter in _treated(inside, sites)}
    values, left = 0, dict[tuple[str, str], int]()
    seen: set[int] = set()
    for path, module in inside.items():
        for name, parameter in module.named_parameters(recurse=False):
            if sum(side > 1 for side in parameter.shape) < 2 or name.endswith("bias") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            values += parameter.numel()
            if id(parameter) not in treated:
                kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{path}.{name}.")[:-1].removeprefix(f"{prefix}.*.")
                key = kind, _why(module, parameter)
                left[key] = left.get(key, 0) + parameter.numel()
    weights = {weight.path: weight for site in sites for weight in site.weights if weight.path in inside}
    biases = sum(weight.biases.parameters for weight in weights.values())
    return Coverage(values, _ordered(left), biases)


def _ordered(left: Mapping[tuple[str, str], int]) -> tuple[Left, ...]:
    """The largest first."""
    ordered = sorted(left.items(), key=lambda item: -item[1])
    return tuple(Left(kind, count, why) for (kind, why), count in ordered)


def _treated(modules: Mapping[str, Any], sites: Mapping[Site, Place]) -> Iterator[nn.Parameter]:
    for site in sites:
        for weight in site.weights:
            if weight.path in modules:
                yield modules[weight.path].weight


def _why(module: nn.Module, parameter: nn.Parameter) -> str:
    own: Any = type(module)
    kind = own.__name__
    if isinstance(module, Unfused):  # rows of experts that give what they are given
        return UNREACHED
    if isinstance(module, _ConvNd):
        return "a convolution"
    if parameter.ndim > 2:
        return "one tensor that holds several matrices"
    if is_plain(own):
        return "a linear with a forward of its own" if "forward" in vars(module) else "read by other code than its own"
    if isinstance(module, nn.Linear):
        return f"of class {kind}, which is no plain linear"
    return f"of class {kind}, which is no linear"
