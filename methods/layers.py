"""The modules that compressed weights run as: what each offers, their registry, and putting them in place.

The classes stand in ``layers_*.py`` by family and register themselves under their kind. They run what is stored, never
a dense matrix rebuilt ahead. Floating tensors are parameters, which gradients reach; supports are buffers.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from rankfront.methods._errors import InputError, check_choice
from rankfront.methods.integer_matrix import FactorModule, IntegerMatrix, IntegerTable, TensorShapes

Shapes = TensorShapes
Settings = Mapping[str, Any]  # whole numbers that shapes follow from, and the scale of a table's rows


class Factored(Protocol):
    """What every module here offers beside ``forward``.

    Those with parameters that multiply inputs, by ``linear``, and do nothing else name them in ``products``: they may
    be `prepack`ed.
    """

    def matrix(self) -> Tensor:
        """Ŵ in fp32, rebuilt from what is stored. Where it is smaller than the dense weight, zeros follow."""

    def full_bias(self) -> Tensor | None:
        """The bias that goes with `matrix`."""

    def multiplications(self) -> int:
        """Multiply-adds of its matrix products for one token, as it runs."""

    @staticmethod
    def formula(settings: Settings) -> str:
        """W (m, n), as `matrix` makes it, by an expression in torch of tensors, settings, m and n, by their names.

        It may call what `rankfront.methods.formulas` defines. Exports show it to people who have nothing of ours.
        """

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        """The module that runs ``tensors`` in the place of ``dense`` with ``bias``."""

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        """The tensors that run in the place of a dense weight (rows, columns): what loading fills."""


class Trained(Protocol):
    """What a module offers where training may change what it stores. Integers, supports and orders stay fixed.

    Attributes:
        factors: names of the parameters that multiply, or add up, to the weight.
        weights: names of those that are smaller dense weights, which train at a lower rate.
    """

    factors: tuple[str, ...]
    weights: tuple[str, ...]

    def balance(self) -> None:
        """Rescale the factors in place before training, see `_training`; what they multiply to stays."""

    def normalise(self) -> None:
        """The same after every step, for factors whose scale has to stay where it is."""


class Attached(Protocol):
    """What a module may offer that changes more than its own output."""

    def attached(self, parent: nn.Module) -> None:
        """Called whenever the module is put in place under ``parent``."""


RENAMED = {"integer-low-rank": "low-rank"}  # kinds in older exports
_LAYERS: dict[str, type[Factored]] = {}
Layer = TypeVar("Layer", bound=type)


def layer(kind: str) -> Callable[[Layer], Layer]:
    """A decorator: the class is what factors of ``kind`` run as."""

    def registered(cls: Layer) -> Layer:
        _LAYERS[kind] = cast(type[Factored], cls)
        return cls

    return registered


@cache
def layers() -> dict[str, type[Factored]]:
    """Kind -> class of every module, the files that define them imported."""
    import_files("layers_")
    return _LAYERS | {old: _LAYERS[kind] for old, kind in RENAMED.items() if kind in _LAYERS}


def import_files(beginning: str) -> None:
    """Import every file of this package whose name begins so: what it defines registers itself."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith(beginning):
            importlib.import_module(f"{__package__}.{module.name}")


def parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied modules and biases stay shared."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def optional_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """`parameter`, or None."""
    return None if tensor is None else parameter(tensor)


def weight_of(module: nn.Module) -> Tensor:
    """W (out_features, in_features) of a dense linear; transposes the (in, out) storage of GPT-2's Conv1D.

    An embedding table (vocabulary, width) is returned as it is stored.
    """
    weight = cast(Tensor, module.weight)
    return weight.T if type(module).__name__ == "Conv1D" else weight


MOST = 2  # times the values of a dense weight that what replaces it may hold: factors of full rank hold up to twice
LITTLE = 2**16  # values that any may hold: padding and scales outweigh tiny weights
PROBED_ROWS = 8  # of an embedding table, by which its scale is measured: a guess


def plain_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a ``module`` does what its ``base`` class does and nothing else."""
    return type(module).forward is base.forward and "forward" not in vars(module)


@torch.no_grad()
def row_scale(table: nn.Module) -> float | None:
    """s where an embedding table E gives s · E[id] for every id, as Gemma's and XGLM's do; None where it gives E[id].

    Measured by least squares on a few rows, so that no attribute's name has to be known; of numbers that the table
    has, one within the precision of its dtype is taken, for in 16 bits products are rounded. On the meta device, where
    nothing can be measured, it is what Gemma's tables call it.

    Raises `InputError` naming the class of a table that does anything else.
    """
    if not isinstance(table, nn.Embedding) or plain_forward(table, nn.Embedding):
        return None
    if table.weight.is_meta:
        return cast("float | None", getattr(table, "scalar_embed_scale", None))
    count = table.num_embeddings
    ids = torch.arange(0, count, max(1, count // PROBED_ROWS), device=table.weight.device)
    rows, given = table.weight[ids].double(), table.forward(ids).double()
    scale = float((rows * given).sum() / rows.square().sum())
    precision = torch.finfo(table.weight.dtype).eps
    if not torch.allclose(given, scale * rows, rtol=2 * precision, atol=precision * float(rows.abs().max())):
        raise InputError(
            f"the embedding table is a {type(table).__name__}, which does more than scale its rows, and cannot be"
            " treated: leave it out of space.include"
        )
    own = [float(value) for value in vars(table).values() if isinstance(value, int | float) and value]
    exact = min(own, key=lambda value: abs(value / scale - 1), default=scale)
    return exact if abs(exact / scale - 1) <= precision else scale


def replacement(
    dense: nn.Module, kind: str, tensors: Mapping[str, Tensor], settings: Settings | None = None
) -> nn.Module:
    """The module that runs ``tensors`` in the place of ``dense``, keeping its bias unless they bring their own."""
    check_choice("layer kind", kind, layers())
    own = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    cls, bias, settings = layers()[kind], tensors.get("bias", getattr(dense, "bias", None)), settings or {}
    if not rounds(cls, settings):
        return cls.build(dense, own, bias, settings)
    rows, columns = weight_of(dense).shape
    shapes = cls.shapes(rows, columns, settings, bias is not None)
    matrices = [name for name in cast(type[FactorModule], cls).matrices if name in shapes]
    rest = {name: tensor for name, tensor in own.items() if name.partition(".")[0] not in matrices}
    rest |= {name: torch.empty(shapes[name][0], device="meta") for name in matrices}  # for their sizes
    module = cast(FactorModule, cls.build(dense, rest, bias, settings))
    for place, name in enumerate(matrices):
        form = IntegerTable if isinstance(dense, nn.Embedding) and place == 0 else IntegerMatrix
        module.hold(name, form.of(name, own, settings["bits"], shapes[name][0][1]))
    return module


def formula(kind: str, settings: Settings) -> str:
    """`Factored.formula` of a kind, matrices that are held in integers written as such."""
    cls = layers()[kind]
    text = cls.formula(settings)
    if rounds(cls, settings):
        for name, columns in cast(type[FactorModule], cls).matrices.items():
            text = re.sub(rf"\b{name}\b", f"whole({name}, {columns})", text)
    return text


def rounds(cls: type[Factored], settings: Settings) -> bool:
    """Whether layers of ``cls`` with these ``settings`` hold their matrices in integers, ``bits`` each."""
    return "bits" in settings and bool(getattr(cls, "matrices", ()))


def empty_replacement(dense: nn.Module, kind: str, settings: Settings) -> nn.Module:
    """Like `replacement`, with tensors of the right shape and no values yet: what loading fills.

    Raises `InputError` where ``settings``, which may be a stranger's, make no such layer, or one that holds more than
    `MOST` of the dense weight: before anything is allocated.
    """
    check_choice("layer kind", kind, layers())
    weight = weight_of(dense)
    rows, columns = weight.shape
    try:
        cls = layers()[kind]
        shapes = cls.shapes(rows, columns, settings, getattr(dense, "bias", None) is not None)
        if rounds(cls, settings):
            for name in cast(type[FactorModule], cls).matrices:
                held, width = shapes.pop(name)[0]
                shapes |= IntegerMatrix.shapes(name, held, width, settings["bits"])
        return replacement(dense, kind, _empty_tensors(shapes, weight), settings)
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{kind} {dict(settings)} fits no weight {rows} x {columns}: {error}") from error


def _empty_tensors(shapes: Shapes, weight: Tensor) -> dict[str, Tensor]:
    """Tensors of ``shapes`` without values; ValueError where they are no shapes or far larger than ``weight``."""
    sizes = [size for shape, _ in shapes.values() for size in shape]
    held = sum(math.prod(shape) for shape, _ in shapes.values())
    if not all(type(size) is int and size >= 0 for size in sizes) or held > max(MOST * weight.numel(), LITTLE):
        raise ValueError(f"it would hold {held:,} values in the place of {weight.numel():,}")
    return {
        name: torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
        for name, (shape, dtype) in shapes.items()
    }


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``path`` under ``root``."""
    parent, _, name = path.rpartition(".")
    holder = root.get_submodule(parent)
    setattr(holder, name, module)
    if hasattr(module, "attached"):  # a layer that has something to say to what calls it
        caller = root.get_submodule(parent.rpartition(".")[0]) if getattr(holder, "in_place_of_one", False) else holder
        cast(Attached, module).attached(caller)
