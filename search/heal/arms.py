"""What trains while a model heals, by the name that a user chooses: the factors themselves, gains of theirs, updates.

An arm that trains something else than what is stored puts it beside the stored tensor as a parametrisation of torch's,
and merges it when a stage ends: what is stored keeps its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankfront.search.heal.trainable import Parameter, normalise, normalised

LORA_RANK = 16  # LEMS's


class Arm:
    """Factors, smaller dense weights, norms and biases, as they are stored."""

    name: ClassVar[str] = "factors"

    def __init__(self, model: nn.Module, parameters: Sequence[Parameter], seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.beside: list[tuple[nn.Module, str]] = []
        self.parameters = self.chosen(parameters)
        names = {id(parameter.tensor) for parameter in self.parameters}
        self.projected = [
            module
            for module in normalised(model)
            if any(id(tensor) in names for tensor in cast(nn.Module, module).parameters())
        ]

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What trains of what may train."""
        return list(parameters)

    def before(self, step: int, steps: int) -> None:
        """Called before the forward pass of each step."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
        return None

    def after(self, step: int, steps: int) -> None:
        """Called after each step of the optimiser."""
        normalise(self.projected)

    def finish(self) -> None:
        """Merge what was added into what is stored."""


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

    def __init__(self, model: nn.Module, parameters: Sequence[Parameter], seed: int = 0) -> None:
        holders = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
        alone = [parameter for parameter in parameters if holders[id(parameter.tensor)] == 1]
        super().__init__(model, alone, seed)
        self.projected = []

    def put(self, parameter: Parameter, made: nn.Module) -> list[Parameter]:
        """Let ``made`` change what is stored where the model holds ``parameter``; what trains of it."""
        path, _, name = parameter.name.rpartition(".")
        module = self.model.get_submodule(path)
        parametrize.register_parametrization(module, name, made, unsafe=True)
        self.beside.append((module, name))
        return [
            Parameter(f"{path}.parametrizations.{name}.0.{own}", tensor, "factor")
            for own, tensor in made.named_parameters()
        ]

    def finish(self) -> None:
        for module, name in self.beside:
            stored = getattr(module.parametrizations, name).original  # type: ignore[union-attr]
            with torch.no_grad():
                stored.copy_(getattr(module, name))
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        self.beside.clear()


class Scales(Beside):
    """Gains of every factor's components, and norms and biases: the fewest parameters of all.

    Of a low rank L diag(g) R, r gains; source: Tiny-WaRA (2506.24092), and PERP (2312.15230) for norms and biases.
    """

    name = "scales"

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        found = []
        for parameter in parameters:
            if parameter.kind == "small":
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
            if parameter.kind == "small" or tensor.ndim != 2 or min(tensor.shape) <= LORA_RANK:
                found.append(parameter)  # as small as an update of it would be
            else:
                found += self.put(parameter, _Update(tensor, LORA_RANK, generator))
        return found


ARMS: dict[str, type[Arm]] = {arm.name: arm for arm in (Arm, Scales, Lora)}
