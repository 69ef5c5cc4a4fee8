"""What trains while a model heals, by the name that a user chooses: the factors themselves, gains of theirs, updates.

An arm that trains something else than what is stored puts it beside the stored tensor, and merges it when a stage ends:
what is stored keeps its shape.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.layers import weight_of
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.ordered import Ordered, OrderedTogether
from rankfront.search.heal.trainable import NothingToHeal, Parameter, normalise, trainable
from rankfront.search.heal.trp import RankPruning

LORA_RANK = 16  # LEMS's
NEXT = 0.9  # times the least coefficient of a row that is used: where the best of the others starts; guess
PULL = 2e-4  # of the squares of coefficients that are not used, SR-STE's; there for weights of another task


def _holders(model: nn.Module) -> Counter[int]:
    """Id of every tensor -> how many modules hold it."""
    return Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))


class _Gain(nn.Module):
    """T diag(g) of a stored tensor T, g (last dimension,), which starts at ones."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(stored.shape[-1], device=stored.device))

    def forward(self, stored: Tensor) -> Tensor:
        return stored * self.gain


class _Update(nn.Module):
    """T + B A of a stored matrix T (m, n): B (m, r) starts at zero, A (r, n) uniform, as in LoRA."""

    def __init__(self, stored: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        m, n = stored.shape
        self.up = nn.Parameter(torch.zeros(m, rank, device=stored.device))
        bound = n**-0.5
        down = torch.rand(rank, n, generator=generator) * 2 * bound - bound
        self.down = nn.Parameter(down.to(stored.device))

    def forward(self, stored: Tensor) -> Tensor:
        return stored + self.up @ self.down


class Beside(Arm):
    """An arm that trains something beside the stored tensors; those that several modules share stay as they are."""

    def __init__(self, model: nn.Module, dense: nn.Module, parameters: Sequence[Parameter], seed: int = 0) -> None:
        holders = _holders(model)
        alone = [parameter for parameter in parameters if holders[id(parameter.tensor)] == 1]
        self.beside: list[_Put] = []
        super().__init__(model, dense, alone, seed)
        self.projected = []

    def put(self, parameter: Parameter, made: nn.Module) -> list[Parameter]:
        """Let ``made`` change what is stored wherever the module that has ``parameter`` runs; what trains of it."""
        path, _, name = parameter.name.rpartition(".")
        module = self.model.get_submodule(path)
        beside = _Put(module, name, made)
        self.beside.append(beside)
        return [Parameter(f"{path}.{beside.place}.{own}", tensor, "factor") for own, tensor in made.named_parameters()]

    def finish(self) -> None:
        for beside in reversed(self.beside):
            beside.merge()
        self.beside.clear()


class _Put:
    """``made`` of the parameter ``name`` in its place: worked out before every forward pass of the module.

    torch's own parametrisations know no tensor called ``values``.
    """

    def __init__(self, module: nn.Module, name: str, made: nn.Module) -> None:
        self.module, self.name, self.made, self.place = module, name, made, f"{name}_beside"
        self.order = list(module._parameters)
        self.stored = cast(nn.Parameter, module._parameters.pop(name))
        module.add_module(self.place, made)
        self.handle = module.register_forward_pre_hook(self._refresh)
        with torch.no_grad():
            self._refresh()

    def _refresh(self, *_: Any) -> None:
        vars(self.module)[self.name] = self.made(self.stored)

    @torch.no_grad()
    def merge(self) -> None:
        """Change what is stored, for good, and leave the module as it was."""
        self.handle.remove()
        del vars(self.module)[self.name]
        delattr(self.module, self.place)
        self.stored.copy_(self.made(self.stored))
        found = {**self.module._parameters, self.name: self.stored}
        self.module._parameters.clear()
        self.module._parameters.update({name: found[name] for name in self.order})


class Scales(Beside):
    """Gains of every factor's components, scales of integers, norms and biases: the fewest parameters of all.

    Of a low rank L diag(g) R, r gains; source: Tiny-WaRA (2506.24092), and PERP (2312.15230) for norms and biases.
    """

    name = "scales"

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        found = []
        for parameter in parameters:
            if parameter.kind in ("small", "scale"):
                found.append(parameter)
            elif self.gains(parameter):
                found += self.put(parameter, _Gain(parameter.tensor))
        return found

    @staticmethod
    def gains(parameter: Parameter) -> bool:
        """Whether its last dimension gets gains: of two factors, the first alone."""
        return parameter.name.rpartition(".")[2] in ("left", "weight", "values", "basis")


class Lora(Beside):
    """Low-rank updates of factors and smaller dense weights, merged into them. Source: LoRA, as SVD-LLM and LEMS do."""

    name = "lora"

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for parameter in parameters:
            tensor = parameter.tensor
            if parameter.kind in ("small", "scale") or tensor.ndim != 2 or min(tensor.shape) <= LORA_RANK:
                found.append(parameter)  # as small as an update of it would be
            else:
                found += self.put(parameter, _Update(tensor, LORA_RANK, generator))
        return found


class Coefficients(Arm):
    """Coefficients on frozen shared bases for the first half of the steps, then both. Source: HOLa (2507.15542), whose
    task gradient reaches the coefficients alone; a block in which nothing is shared trains as `Arm` does."""

    name = "hola"

    @classmethod
    def check(cls, model: nn.Module) -> None:
        shared = _holders(model)
        if not any(parameter.kind == "factor" and shared[id(parameter.tensor)] > 1 for parameter in trainable(model)):
            raise NothingToHeal("heal method hola freezes shared bases and the plan has none: use --method factors")

    def before(self, step: int, steps: int) -> None:
        holders = _holders(self.model)
        for parameter in self.parameters:
            if parameter.kind == "factor" and holders[id(parameter.tensor)] > 1:
                parameter.tensor.requires_grad_(2 * step >= steps)


class StraightThrough(Arm):
    """DSFormer's straight-through factoriser: the support of sparse coefficients trains with their values.

    Ŵ = Z D with Z = T(Z̃), the entries of the dense latent Z̃ (m, k) of largest size, as many as are stored. The gradient
    of Z goes to all entries of Z̃, used or not, so that entries enter and leave the support. It stays where it is for
    the last third of the steps: then what is stored is what trains.

    Source: DSFormer (2312.13211). The start of entries that are not used, the pull that keeps them small, and the third
    are ours: the paper leaves them open. They start at what the atoms would take of the residual W − Ŵ, scaled to
    `NEXT` times the least used one of the row: zeros would enter no support for long.
    """

    name = "stf"

    @classmethod
    def check(cls, model: nn.Module) -> None:
        if not any(hasattr(module, "keep_codes") for module in model.modules()):
            raise NothingToHeal(
                "heal method stf moves supports of sparse coefficients and the plan has none: use --method factors"
            )

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        self.latents: list[tuple[Any, nn.Parameter]] = []
        self.frozen: list[Tensor] = []  # places of the values, once they stay
        found, names = [], {parameter.name: parameter for parameter in parameters}
        for path, module in self.model.named_modules():
            values = names.pop(f"{path}.values", None)
            if values is None or not hasattr(module, "keep_codes"):
                if values is not None:
                    names[values.name] = values
                continue
            latent = nn.Parameter(self._start(module, self.dense.get_submodule(path)))
            module.register_parameter("latent", latent)
            self.latents.append((module, latent))
            vars(module)["forward"] = partial(self._forward, len(self.latents) - 1)
            found.append(Parameter(f"{path}.latent", latent, "sparse"))
        return [*names.values(), *found]

    @staticmethod
    @torch.no_grad()
    def _start(stored: Any, dense: nn.Module) -> Tensor:
        module = copy.deepcopy(stored).float()
        codes = module.codes()
        left = weight_of(dense).float() - module.matrix()
        with torch.enable_grad():
            codes.requires_grad_(True)
            outputs = module.coded(codes, torch.eye(left.shape[1], device=left.device))  # Ŵᵀ, and the bias
            (wanted,) = torch.autograd.grad((outputs * left.T).sum(), codes)
        codes = codes.detach()
        used = module.largest(codes)
        least = codes.abs().where(used, torch.inf).amin(dim=1, keepdim=True)
        most = wanted.abs().where(~used, 0.0).amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        started: Tensor = torch.where(used, codes, NEXT * least * wanted / most)
        return started

    def _forward(self, number: int, x: Tensor) -> Tensor:
        module, latent = self.latents[number]
        if self.frozen:
            passed = latent * self.frozen[number]
        else:
            passed = latent + (latent * module.largest(latent.detach()) - latent).detach()
        found: Tensor = module.coded(passed, x)
        return found

    def before(self, step: int, steps: int) -> None:
        if not self.frozen and 3 * step >= 2 * steps:
            self.frozen = [module.largest(latent.detach()) for module, latent in self.latents]
            self._drop()

    def penalty(self) -> Tensor | None:
        if self.frozen or not self.latents:
            return None
        unused = [(latent * ~module.largest(latent.detach())).square().sum() for module, latent in self.latents]
        return 0.5 * PULL * torch.stack(unused).sum()

    def after(self, step: int, steps: int) -> None:
        if self.frozen:
            self._drop()
        normalise([module for module in self.projected if not hasattr(module, "latent")])

    @torch.no_grad()
    def _drop(self) -> None:
        """Zero what is not used: the frozen support is where the latents are not zero."""
        for (_, latent), places in zip(self.latents, self.frozen, strict=True):
            latent.mul_(places)

    def finish(self) -> None:
        for module, latent in self.latents:
            del vars(module)["forward"], module._parameters["latent"]
            module.keep_codes(latent.detach(), module.largest(latent.detach()))
        self.latents = []


ALL = (Arm, Scales, Lora, Coefficients, StraightThrough, RankPruning, Ordered, OrderedTogether)
ARMS: dict[str, type[Arm]] = {arm.name: arm for arm in ALL}
