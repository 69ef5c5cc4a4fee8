"""Trained rank pruning: the dense weight of every low-rank site trains, and is truncated again and again on the way.

    W ← U_e U_eᵀ W  every p steps,    e the least rank with Σ_{i≤e} σ_i² ≥ τ Σ σ_i²,    then    W ← W − η (G + λ U Vᵀ)

with σ the singular values of W C^{1/2}, C the Gram of what the site reads in that step, and U Vᵀ of the truncated
W = U Σ Vᵀ, a subgradient of its nuclear norm. τ falls so that e reaches the plan's rank.

Source: TRP (1812.02402), which starts from the dense weight, as here; λ. It keeps nine tenths of the energy of W itself
throughout. Ours: inputs weigh the energy, unless several processes train; 1 − τ rises in proportion to the steps; the
subgradient is a step of its own, as AdamW takes weight decay, so that no second moment rescales it; a share of the
steps for the factors at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rankfront.methods.layers import weight_of
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.methods.truncation import truncated
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.fit import NotFinite
from rankfront.search.heal.processes import Processes
from rankfront.search.heal.trainable import NothingToHeal, Parameter

ROUNDS = 5  # truncations, the one to the plan's rank included; guess
DENSE = 2 / 3  # of the steps, before that one; guess
NUCLEAR = 3e-4  # λ


@dataclass
class _Site:
    module: LowRankLinear
    weight: nn.Parameter
    due: float | None = None  # progress of the truncation that the next forward pass makes
    slope: Tensor | None = None  # U Vᵀ, until the step after a truncation is done
    factored: bool = False  # at the plan's rank: the factors train


class RankPruning(Arm):
    """Low-rank sites train dense and are truncated, and at the plan's rank their factors train; the rest trains too."""

    name = "trp"
    first_alone = True
    goes_back = False  # the best state so far may be the start, which is of no dense weight

    @classmethod
    def added(cls, model: nn.Module) -> int:
        return sum(
            m.out_features * m.in_features for m in model.modules() if isinstance(m, LowRankLinear) and m.in_full
        )

    @classmethod
    def check(cls, model: nn.Module) -> None:
        if not cls.added(model):
            raise NothingToHeal(
                "heal method trp truncates low-rank weights and the plan has none: use --method factors"
            )

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        holders = Counter(id(tensor) for module in self.model.modules() for tensor in module.parameters(recurse=False))
        names = {parameter.name for parameter in parameters}
        self.sites: list[_Site] = []
        self.several = Processes().count > 1
        found = list(parameters)
        for path, module in self.model.named_modules():
            if not isinstance(module, LowRankLinear) or not {f"{path}.left", f"{path}.right"} <= names:
                continue
            if holders[id(module.left)] > 1 or holders[id(module.right)] > 1:
                continue
            dense = weight_of(self.dense.get_submodule(path)).detach().float()
            site = _Site(module, nn.Parameter(dense.clone(memory_format=torch.contiguous_format)))
            module.register_parameter("dense", site.weight)
            vars(module)["forward"] = partial(self._forward, site)
            self.sites.append(site)
            found.append(Parameter(f"{path}.dense", site.weight, "weight"))
        return found

    def _forward(self, site: _Site, x: Tensor) -> Tensor:
        if site.due is not None:
            read = x.detach().flatten(0, -2).double()
            self._truncate(site, read.T @ read)
        if site.factored:
            return LowRankLinear.forward(site.module, x)
        return nn.functional.linear(x, site.weight, site.module.bias)

    @torch.no_grad()
    def _truncate(self, site: _Site, gram: Tensor | None) -> None:
        """What is due, with the Gram (n, n) of what the site reads, or none."""
        assert site.due is not None
        progress, site.due = site.due, None
        try:
            cut = truncated(site.weight, gram, site.module.rank, progress)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise NotFinite(f"a weight has no singular values ({error})") from error
        if progress >= 1:
            site.module.left.copy_(cut.left)
            site.module.right.copy_(cut.inner)
            site.module.balance()
            site.factored = True
            return
        site.weight.copy_(cut.weight)
        site.slope = cut.subgradient.to(site.weight.dtype)
        moment = self.fit.moment(site.weight)
        if moment is not None:
            moment.copy_(cut.projected(moment.double()))

    def before(self, step: int, steps: int) -> None:
        dense = int(DENSE * steps)
        every = max(1, dense // ROUNDS)
        self.rate = self.fit.rate_of("weight")
        for site in self.sites:
            if step > dense:
                site.factored = True  # of a healing that was interrupted since
            elif step == dense:
                site.due = 1.0
            elif step and step % every == 0:
                site.due = step / dense
            if site.due is not None and self.several:  # whose inputs differ: by the energy of the weight alone
                self._truncate(site, None)

    @torch.no_grad()
    def after(self, step: int, steps: int) -> None:
        for site in self.sites:
            if site.due is not None:  # of an expert that no token reached
                self._truncate(site, None)
            if site.slope is not None:
                site.weight.sub_(NUCLEAR * self.rate * site.slope)
                site.slope = None
        super().after(step, steps)

    @property
    def storable(self) -> bool:
        return all(site.factored for site in self.sites)

    def finish(self) -> None:
        for site in self.sites:
            del vars(site.module)["forward"], site.module._parameters["dense"]
        self.sites = []
