"""What joint treatments leave behind: thinner heads, smaller dense matrices, nothing at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfront.methods.adaptable import multiply
from rankfront.methods.integer_matrix import FactorModule
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter, weight_of

CACHED = {"key": 1, "value": 2}  # role -> the setting ``cached`` of a projection whose outputs are cached


@layer("heads")
class HeadsLinear(FactorModule):
    """A projection to heads that keeps ``kept`` of the ``width`` outputs of each, the others zero.

    weight (heads · kept, n), bias (heads · kept,), x (..., n) to (..., heads · width). ``place`` (heads, kept) says
    which of a head's outputs they are; without it they are the first. Where its outputs are the keys or values that an
    attention caches (`CACHED`), the cache holds the kept ones alone: see `ThinCache`.
    """

    products = weights = ("weight",)
    matrices: ClassVar = {"weight": "n"}
    place: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        heads: int,
        kept: int,
        width: int,
        place: Tensor | None = None,
        cached: int = 0,
    ) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.register_buffer("place", place)
        self.heads, self.kept, self.width, self.cached = heads, kept, width, cached

    def attached(self, parent: nn.Module) -> None:
        """Called when the module is put in place."""
        if self.cached and not getattr(parent, "caches_thinly", False):
            parent.register_forward_pre_hook(_thinly, with_kwargs=True)
            parent.caches_thinly = True  # type: ignore[assignment]

    def thinned(self, states: Tensor) -> Tensor:
        """(batch, heads, tokens, width) to the kept ones, (batch, heads, tokens, kept)."""
        if self.place is None:
            return states[..., : self.kept]
        return states.gather(-1, self.place.long()[None, :, None, :].expand(*states.shape[:-1], self.kept))

    def widened(self, states: Tensor) -> Tensor:
        """What `thinned` was given: the others are zeros."""
        if self.place is None:
            return nn.functional.pad(states, (0, self.width - self.kept))
        zeros = states.new_zeros(*states.shape[:-1], self.width)
        return zeros.scatter(-1, self.place.long()[None, :, None, :].expand_as(states), states)

    def _spread(self, kept: Tensor) -> Tensor:
        """(..., heads · kept) to (..., heads · width)."""
        by_head = kept.unflatten(-1, (self.heads, self.kept))
        if self.place is None:
            return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)
        zeros = by_head.new_zeros(*by_head.shape[:-1], self.width)
        spread: Tensor = zeros.scatter(-1, self.place.long().expand_as(by_head), by_head)
        return spread.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self._spread(multiply(self, "weight", x, self.bias))

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "torch.zeros(heads, width, n).scatter(1, place.long()[..., None].expand(-1, -1, n),"
            " weight.unflatten(0, (heads, kept))).flatten(0, 1)"
            if settings["placed"]
            else "torch.nn.functional.pad(weight.unflatten(0, (heads, kept)), (0, 0, 0, width - kept)).flatten(0, 1)"
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        sizes = {name: settings[name] for name in ("heads", "kept", "width", "cached")}
        return HeadsLinear(tensors["weight"], bias, place=tensors.get("place"), **sizes)

    def matrix(self) -> Tensor:
        return self._spread(self.whole("weight").T).T

    def full_bias(self) -> Tensor | None:
        return None if self.bias is None else self._spread(self.bias)

    def multiplications(self) -> int:
        return self.weight.numel()

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        heads, kept = _split(rows, settings)
        found: Shapes = {"weight": ((heads * kept, columns), None)}
        if settings["placed"]:
            found["place"] = ((heads, kept), torch.uint8)
        if bias:
            found["bias"] = ((heads * kept,), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.heads} heads, {self.kept} of {self.width} each"


def _split(features: int, settings: Settings) -> tuple[int, int]:
    """(heads, what is kept of each) of ``features`` that are heads; ValueError where ``settings`` say otherwise."""
    heads, kept, width = (settings[name] for name in ("heads", "kept", "width"))
    if heads * width != features or not 0 <= kept <= width:
        raise ValueError(f"{heads} heads of {width}, {kept} kept, are not {features} features")
    return heads, kept


class ThinCache:
    """A cache of keys and values as one attention sees it: it takes and gives whole heads, and stores what was kept.

    Dimensions that a projection leaves out are zero before and after rotary positions, so nothing is lost. The whole
    keys and values of one attention exist while it runs. A cache that was allocated before, for whole heads, stores
    whole heads.
    """

    def __init__(self, cache: Any, keys: HeadsLinear | None, values: HeadsLinear | None) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Store new states (batch, heads, tokens, width); all that are stored, of the same form."""
        by_keys, by_values = self._thin("keys", self.keys, layer_idx), self._thin("values", self.values, layer_idx)
        thin_keys = keys if by_keys is None else by_keys.thinned(keys)
        thin_values = values if by_values is None else by_values.thinned(values)
        keys, values = self.cache.update(thin_keys, thin_values, layer_idx, *more, **named)
        return (
            keys if by_keys is None else by_keys.widened(keys),
            values if by_values is None else by_values.widened(values),
        )

    def _thin(self, states: str, projection: HeadsLinear | None, layer_idx: int) -> HeadsLinear | None:
        """``projection``, unless what the layer of the cache has for its ``states`` is as wide as whole heads."""
        layers = getattr(self.cache, "layers", ())
        if projection is None or layer_idx >= len(layers) or not getattr(layers[layer_idx], "is_initialized", False):
            return projection
        return None if getattr(layers[layer_idx], states).shape[-1] == projection.width else projection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _thinly(
    attention: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward hook of an attention: its cache as a `ThinCache`, where some projection of it is thin now."""
    thin = {child.cached: child for child in attention.modules() if isinstance(child, HeadsLinear) and child.cached}
    name = next((name for name in ("past_key_values", "layer_past") if named.get(name) is not None), None)
    if not thin or name is None:
        return None
    return given, named | {name: ThinCache(named[name], thin.get(CACHED["key"]), thin.get(CACHED["value"]))}


@layer("from-heads")
class FromHeadsLinear(FactorModule):
    """A projection of heads that reads the first ``kept`` of each one's ``width`` inputs.

    weight (m, heads · kept), x (..., heads · width) to (..., m).
    """

    products = weights = ("weight",)
    matrices: ClassVar = {"weight": "heads * kept"}

    def __init__(self, weight: Tensor, bias: Tensor | None, heads: int, kept: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.heads, self.kept, self.width = heads, kept, width

    def forward(self, x: Tensor) -> Tensor:
        kept = x.unflatten(-1, (self.heads, self.width))[..., : self.kept].flatten(-2)
        return multiply(self, "weight", kept, self.bias)

    @staticmethod
    def formula(settings: Settings) -> str:
        return "torch.nn.functional.pad(weight.unflatten(1, (heads, kept)), (0, width - kept)).flatten(1)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return FromHeadsLinear(tensors["weight"], bias, settings["heads"], settings["kept"], settings["width"])

    def matrix(self) -> Tensor:
        by_head = self.whole("weight").unflatten(-1, (self.heads, self.kept))
        return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.weight.numel()

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        heads, kept = _split(columns, settings)
        return {"weight": ((rows, heads * kept), None)}

    def extra_repr(self) -> str:
        return f"{self.heads} heads, {self.kept} of {self.width} each, {self.weight.shape[0]}"


@layer("plain")
class PlainLinear(FactorModule):
    """y = W x + bias with a dense W (rows, columns) of its own size: fewer neurons than the model had."""

    products = weights = ("weight",)
    matrices: ClassVar = {"weight": "columns"}

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.bias = optional_parameter(bias)
        self.in_features = weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, "weight", x, self.bias)

    @staticmethod
    def formula(settings: Settings) -> str:
        return "torch.nn.functional.pad(weight, (0, n - columns, 0, m - rows))"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return PlainLinear(tensors["weight"], bias)

    def matrix(self) -> Tensor:
        return self.whole("weight")

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.weight.numel()

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        found: Shapes = {"weight": ((settings["rows"], settings["columns"]), None)}
        if bias and settings["rows"] != rows:
            found["bias"] = ((settings["rows"],), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


@layer("absent")
class AbsentLinear(nn.Module):
    """y = 0 (..., rows): a projection that was left out, with its bias."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.rows)

    @staticmethod
    def formula(settings: Settings) -> str:
        return "torch.zeros(m, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return AbsentLinear(weight_of(dense).shape[0])

    def matrix(self) -> Tensor:
        return torch.zeros(self.rows, 0)

    def full_bias(self) -> Tensor | None:
        return torch.zeros(self.rows)

    def multiplications(self) -> int:
        return 0

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return {}

    def extra_repr(self) -> str:
        return f"{self.rows}"
