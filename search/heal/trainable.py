"""What of a compressed model trains: the factors as they are stored, smaller dense weights, scales of integers, norms
and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rankfront.methods import InputError
from rankfront.methods.integer_matrix import IntegerMatrix
from rankfront.methods.layers import Trained, layers
from rankfront.methods.layers_low_rank import LowRankEmbedding

Kind = Literal["factor", "sparse", "weight", "scale", "small"]
BUFFER = "buffer:"  # before the names of buffers in a snapshot
# Times the rate. Of factors with a sparse one among them a tenth closed 43% and 47% of the excess of `dsformer` and
# `oats` at keep 0.6, the whole rate nothing; of scales 5 closed 55% of that of `svd-llm-int4`, 20 closed 53% and 0, by
# norms and biases alone, 27% (studies/results/healing.md). The others are guesses.
RATES: dict[Kind, float] = {"factor": 1.0, "sparse": 0.1, "weight": 0.2, "scale": 5.0, "small": 1.0}
SPARSE = "values"  # the name of a sparse factor


class NothingToHeal(InputError):
    """A plan has no values that healing trains."""


@dataclass(frozen=True)
class Parameter:
    """One tensor that trains: its name in the model, itself, what it is, and the unit that steps of it are taken in."""

    name: str
    tensor: nn.Parameter
    kind: Kind
    unit: float = 1.0


def factored_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every weight that is stored compressed."""
    known: Any = (*layers().values(), LowRankEmbedding)
    return {path: module for path, module in model.named_modules() if isinstance(module, known)}


def trainable(model: nn.Module) -> list[Parameter]:
    """Every tensor of ``model`` that may train, each once, in the order of the module tree.

    Factors and smaller dense weights of compressed modules; of matrices in integers the scales, and the zeros of four
    bits, in units of a typical scale; norms and biases of all. Embedding tables and heads train where they are
    compressed. Untouched dense weights stay as they are. Raises `NothingToHeal` where nothing is left.
    """
    found: dict[int, Parameter] = {}
    modules = factored_modules(model)
    for path, module in modules.items():
        factors = _names(module, "factors")
        own = "sparse" if SPARSE in factors else "factor"
        for kind, names in ((own, factors), ("weight", _names(module, "weights"))):
            for name in names:
                tensor = cast(nn.Parameter, getattr(module, name))
                found.setdefault(id(tensor), Parameter(f"{path}.{name}", tensor, cast(Kind, kind)))
    for path, module in model.named_modules():
        if isinstance(module, IntegerMatrix):
            scales = module.scales if module.bits == 8 else module.scales[..., 0]
            unit = float(scales.abs().median())
            found.setdefault(id(module.scales), Parameter(f"{path}.scales", module.scales, "scale", unit))
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 and parameter.is_floating_point() and id(parameter) not in tables:
            found.setdefault(id(parameter), Parameter(name, parameter, "small"))
    if not any(parameter.kind != "small" for parameter in found.values()):
        raise NothingToHeal(
            "the plan has nothing to heal: no factors, no integers and no smaller dense weights (absent blocks stay"
            " absent); choose a plan with another method"
        )
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    return sorted(found.values(), key=lambda parameter: order.get(parameter.name, len(order)))


def _names(module: nn.Module, kind: str) -> tuple[str, ...]:
    return tuple(name for name in getattr(module, kind, ()) if name in module._parameters)


def within(parameters: Iterable[Parameter], module: nn.Module) -> list[Parameter]:
    """Those of ``parameters`` that ``module`` holds."""
    own = {id(tensor) for tensor in module.parameters()}
    return [parameter for parameter in parameters if id(parameter.tensor) in own]


def shared(model: nn.Module, blocks: Iterable[nn.Module]) -> set[int]:
    """Ids of the tensors that more than one of ``blocks``, or a block and the rest of the model, hold."""
    counts: Counter[int] = Counter()
    inside: set[nn.Module] = set()
    for block in blocks:
        counts.update({id(tensor) for tensor in block.parameters()})
        inside.update(block.modules())
    counts.update(
        {
            id(tensor)
            for module in model.modules()
            if module not in inside
            for tensor in module.parameters(recurse=False)
        }
    )
    return {number for number, count in counts.items() if count > 1}


def balance(model: nn.Module) -> None:
    """Bring every module's factors to the scale that they train in; those that modules share keep theirs."""
    for module in _unshared(model):
        if hasattr(module, "balance"):
            cast(Trained, module).balance()


def normalise(modules: Iterable[Trained]) -> None:
    """The same after a step, where a family asks for it."""
    for module in modules:
        module.normalise()


def normalised(model: nn.Module) -> list[Trained]:
    """Modules of ``model`` whose factors keep their scale, by a projection after every step."""
    return [cast(Trained, module) for module in _unshared(model) if hasattr(module, "normalise")]


def _unshared(model: nn.Module) -> Iterator[nn.Module]:
    modules = factored_modules(model).values()
    counts = Counter(id(tensor) for module in modules for tensor in module.parameters())
    for module in modules:
        factors = getattr(module, "factors", ())
        if all(name in module._parameters and counts[id(getattr(module, name))] == 1 for name in factors):
            yield module


@contextmanager
def training(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Within, ``parameters`` are fp32 and ask for gradients; after, neither, in the dtype that they had."""
    chosen = list(parameters)
    dtypes = [parameter.tensor.dtype for parameter in chosen]
    try:
        for parameter in chosen:
            parameter.tensor.data = parameter.tensor.data.float()
            parameter.tensor.requires_grad_(True)
        yield
    finally:
        for parameter, dtype in zip(chosen, dtypes, strict=True):
            parameter.tensor.requires_grad_(False)
            parameter.tensor.grad = None
            parameter.tensor.data = parameter.tensor.data.to(dtype)


def copied(parameters: Iterable[Parameter]) -> dict[str, Tensor]:
    """Name -> a copy of the values."""
    return {parameter.name: parameter.tensor.detach().clone() for parameter in parameters}


def snapshot(model: nn.Module, parameters: Iterable[Parameter]) -> dict[str, Tensor]:
    """`copied`, and the supports of sparse factors, which some ways of healing move."""
    buffers = {
        f"{BUFFER}{path}.{name}": tensor.clone()
        for path, module in factored_modules(model).items()
        for name, tensor in module.named_buffers(recurse=False)
        if name == "support"
    }
    return copied(parameters) | buffers


def put_back(model: nn.Module, parameters: Iterable[Parameter], values: Mapping[str, Tensor]) -> None:
    """Put what `snapshot` gave back in place."""
    restore(parameters, values)
    for name, tensor in values.items():
        if name.startswith(BUFFER):
            path, _, own = name.removeprefix(BUFFER).rpartition(".")
            module = model.get_submodule(path)
            setattr(module, own, tensor.to(module.get_buffer(own).device, copy=True))


@torch.no_grad()
def restore(parameters: Iterable[Parameter], values: Mapping[str, Tensor]) -> None:
    """Put what `copied` gave back in place."""
    for parameter in parameters:
        parameter.tensor.copy_(values[parameter.name])


def stored(model: Any) -> tuple[int, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Number of stored values, and the shape and dtype of every tensor: what healing must not change."""
    tensors = model.state_dict()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return sum(parameter.numel() for parameter in model.parameters()), shapes
