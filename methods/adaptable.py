"""Where adapters such as LoRA go in a layer that stores factors: linears that PEFT finds, wraps and merges into.

A layer multiplies by some of its parameters and does nothing else with them. Each of these is offered as a linear of
its own, so an adapter stands beside the factor, inside the layer, and merging it changes the factor. A layer without
such a parameter, of integers say, is offered a linear beside it that adds nothing by itself and has nothing to merge
into. None of them holds a tensor: what is stored stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from torch import Tensor, nn

from rankfront.methods._errors import InputError

BESIDE = "beside"
CANNOT_MERGE = (
    "an adapter beside integers or sparse factors cannot be merged into them: keep it beside, or call"
    " model.dequantize() before adapters are put on the model"
)


def multiply(layer: nn.Module, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n) to x Wᵀ + bias, W (m, n) the parameter ``name`` of ``layer``, with the adapter that it has."""
    place = layer._modules.get(f"{name}_proj")
    held = layer._modules.get(name)  # in integers
    if place is not None and type(place) is not FactorLinear:
        y: Tensor = place(x)
    elif held is not None:
        y = held(x)
    else:
        return nn.functional.linear(x, getattr(layer, name), bias)
    return y if bias is None else y + bias


def adapted(layer: nn.Module, name: str) -> bool:
    """Whether the product with the parameter ``name`` of ``layer`` has an adapter."""
    return type(layer._modules.get(f"{name}_proj")) not in (type(None), FactorLinear)


def make_adaptable(layer: nn.Module, size: Sequence[int], shared: Collection[str]) -> None:
    """Offer places for adapters in a ``layer`` that runs for a dense weight of ``size`` (m, n).

    Parameters called as in ``shared`` have none: merged for one of the layers that share it, an adapter would change
    the others.
    """
    free = [name for name in getattr(layer, "products", ()) if name in layer._parameters and name not in shared]
    names = [name for name in free if getattr(layer, name).numel()]
    for name in names:
        layer.add_module(f"{name}_proj", FactorLinear(layer, name))
    if not names and cast(Any, layer).multiplications():
        layer.add_module(BESIDE, BesideLinear(layer, size))
        layer.register_forward_hook(_add_adapter)


def check_unadapted(model: nn.Module) -> None:
    """Raise `InputError` where an adapter stands at one of those places."""
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            ours = name == BESIDE or name in [f"{each}_proj" for each in getattr(module, "products", ())]
            if hasattr(module, "matrix") and ours and not isinstance(child, _Place):
                raise InputError(f"{path!r} has an adapter: merge_and_unload() or unload() it first")


class _Place(nn.Linear):
    """A linear of a ``layer``, without tensors of its own."""

    layer: Callable[[], Any]  # no cycle of references, which would keep a model's memory

    def __init__(self, layer: nn.Module, size: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = size
        self.register_parameter("bias", None)
        self.layer = weakref.ref(layer)
        self._is_hf_initialized = True  # a model's own initialisation, which goes by names, has nothing to do here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "layer": weakref.ref(state["layer"])})

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, a place for an adapter"


class FactorLinear(_Place):
    """y = W x with the parameter W (m, n) of a layer that is called ``name``."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, getattr(layer, name).shape)
        self.name = name

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W, to read and to merge into."""
        return cast(Tensor, getattr(self.layer(), self.name))


class BesideLinear(_Place):
    """y = 0 (..., m), of a layer that stores nothing which an adapter could be merged into."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Nothing, on the layer's device, in its dtype."""
        tensors = [*self.layer().parameters(), *self.layer().buffers()]
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])
        nothing: Tensor = like.detach().new_empty(0).as_subclass(NothingToMergeInto)
        return nothing

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class NothingToMergeInto(Tensor):
    """In the place of a weight: reading ``data``, as merging does, raises `InputError`."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise InputError(CANNOT_MERGE)


class Unmergeable(str):
    """The method of quantisation of a model with an adapter beside the layer at this path.

    PEFT compares it with one that cannot be merged into, "gptq", before it merges anything, and is told so here: by an
    `InputError`. Transformers compares it with members of an enumeration, which are no plain strings.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is str and other == "gptq":
            raise InputError(f"at {str.__str__(self)!r}, {CANNOT_MERGE}")
        return False

    __hash__ = str.__hash__


def unmergeable(model: nn.Module) -> Unmergeable | None:
    """That of ``model``; None where no adapter stands beside a layer."""
    for path, module in model.named_modules():
        if hasattr(module, "matrix") and type(module._modules.get(BESIDE)) not in (type(None), BesideLinear):
            return Unmergeable(path)
    return None


def _add_adapter(layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
    """A forward hook: what an adapter beside the layer adds."""
    place = layer._modules[BESIDE]
    return None if place is None or type(place) is BesideLinear else y + place(given[0])
