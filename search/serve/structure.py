"""A compressed decoder as engines see it: blocks, which of their halves there are, widths of MLPs, dense weights.

Engines know none of our layers. What they know is a block without its attention or its MLP, and an MLP of fewer
neurons. Everything else is multiplied out: to W (m, n) of the dense model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rankfront.methods import Site
from rankfront.methods.dense import multiplied_out
from rankfront.methods.factored import dense_config
from rankfront.methods.layers import Factored
from rankfront.methods.layers_joint import AbsentLinear, PlainLinear
from rankfront.methods.unfused import described, unfuse, unfused_in
from rankfront.search.inputs.sites import blocks, find_sites

ATTENTION = ("query", "key", "value", "output")
MLP = (("gate", "up", "down"), ("up", "down"))


@dataclass(frozen=True)
class Block:
    """One block of the decoder.

    Attributes:
        number: in the dense model.
        attention: whether it has one.
        width: neurons of its MLP, none where it was left out.
        attention_site, mlp_site: what plans call its halves; "" where they are not known by the names of modules.
    """

    number: int
    attention: bool
    width: int
    attention_site: str
    mlp_site: str

    @property
    def empty(self) -> bool:
        """Whether the residual stream passes it by."""
        return not self.attention and not self.width


class Structure:
    """A causal language model, dense or compressed, in the terms of engines.

    Attributes:
        model: as it runs, with modules of factors in the place of dense ones.
        config: of the dense model, an object of its own.
        skeleton: the dense model without weights.
        prefix: path of its list of blocks.
        width: neurons of a dense MLP; 0 where MLPs are not known by the names of modules.
        every: its blocks.
        blocks: those that do something, in order. Blocks are numbered by their place here.
        sites: all attentions and MLPs.
    """

    def __init__(self, model: Any, whole: bool = False) -> None:
        """``whole`` leaves every block and every MLP as large as it was: what is not there is zeros."""
        self.model = model
        self.config = dense_config(model.config)
        with torch.device("meta"):
            self.skeleton: Any = AutoModelForCausalLM.from_config(self.config)
            unfuse(self.skeleton, described(unfused_in(model)))
        self.prefix, found = blocks(self.skeleton)
        halves: list[dict[str, Site]] = [{} for _ in found]
        known = {s: place for s, place in find_sites(self.skeleton).items() if s.roles == ATTENTION or s.roles in MLP}
        self.sites = list(known)
        for site, place in known.items():
            if not whole and place.block is not None:
                halves[place.block]["attention" if site.roles == ATTENTION else "mlp"] = site
        widths = {site.anchor.in_features for half in halves for role, site in half.items() if role == "mlp"}
        self.width = max(widths, default=0)
        self.every = tuple(self._block(number, half) for number, half in enumerate(halves))
        self.blocks = tuple(block for block in self.every if not block.empty)
        self._mlps = {  # path of a weight of an MLP -> (role, neurons that are left)
            weight.path: (weight.role, block.width)
            for block, half in zip(self.every, halves, strict=True)
            for weight in (half["mlp"].weights if "mlp" in half else ())
        }
        self.dtype: torch.dtype = next(model.parameters()).dtype

    def _block(self, number: int, half: dict[str, Site]) -> Block:
        attention, mlp = half.get("attention"), half.get("mlp")
        return Block(
            number,
            attention is None or self._read(attention) > 0,
            self.width or 1 if mlp is None else self._read(mlp),
            "" if attention is None else attention.name,
            "" if mlp is None else mlp.name,
        )

    def _read(self, site: Site) -> int:
        """How many inputs the projection that writes to the residual stream reads; it comes last.

        Whatever else a joint site made smaller, the others add nothing.
        """
        module = self.model.get_submodule(site.anchor.path)
        if isinstance(module, AbsentLinear):
            return 0
        return module.in_features if isinstance(module, PlainLinear) else site.anchor.in_features

    def tensor(self, name: str) -> Tensor:
        """The tensor that the dense model calls ``name``, blocks numbered by their place among `blocks`.

        Weights are dense, of the shape that the dense model's has; those of an MLP have its neurons alone.
        """
        path, _, own = self.original(name).rpartition(".")
        module, dense = self.model.get_submodule(path), self.skeleton.get_submodule(path)
        if hasattr(module, "matrix"):
            found = multiplied_out(cast(Factored, module), dense, own).to(self.dtype)
        else:
            found = getattr(module, own).detach()
        for dimension, size in self._narrowed(path, dense, own).items():
            found = found.narrow(dimension, 0, size)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the `tensor` of this ``name``."""
        path, _, own = self.original(name).rpartition(".")
        dense = self.skeleton.get_submodule(path)
        narrowed = self._narrowed(path, dense, own)
        return tuple(narrowed.get(dimension, size) for dimension, size in enumerate(getattr(dense, own).shape))

    def _narrowed(self, path: str, dense: nn.Module, own: str) -> dict[int, int]:
        """Dimension of a tensor of an MLP -> its neurons; of others nothing."""
        role, width = self._mlps.get(path, ("", 0))
        if not role or (role == "down" and own == "bias"):
            return {}
        inputs_first = type(dense).__name__ == "Conv1D"
        return {int((role == "down") != inputs_first) if own == "weight" else 0: width}

    def original(self, name: str) -> str:
        """What the dense model calls the tensor ``name``."""
        if not name.startswith(f"{self.prefix}."):
            return name
        number, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
        return f"{self.prefix}.{self.blocks[int(number)].number}.{rest}"
