"""The modules that compressed weights run as: always their factors, never a rebuilt dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from rankfront.methods._errors import check_choice

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # tensor -> shape, and dtype unless the model's


class Factored(Protocol):
    """What every module here offers beside ``forward``."""

    def matrix(self) -> Tensor:
        """Ŵ in fp32, rebuilt from what is stored. Where it is smaller than the dense weight, zeros follow."""

    def full_bias(self) -> Tensor | None:
        """The bias that goes with `matrix`."""

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        """The tensors that run in the place of a dense weight (rows, columns): what loading fills."""


class LowRankLinear(nn.Module):
    """y = left (right x) + bias: left (m, r), right (r, n), x (..., n) to y (..., m)."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.left = _parameter(left)
        self.right = _parameter(right)
        self.bias = None if bias is None else _parameter(bias)
        self.out_features, self.in_features, self.rank = left.shape[0], right.shape[1], right.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.right)  # (..., r)
        return nn.functional.linear(hidden, self.left, self.bias)  # (..., m)

    def matrix(self) -> Tensor:
        return self.left.float() @ self.right.float()

    def full_bias(self) -> Tensor | None:
        return self.bias

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        return {"left": ((rows, settings["rank"]), None), "right": ((settings["rank"], columns), None)}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(nn.Module):
    """Rows of E = left · right: left (vocabulary, r), right (r, width), ids (...) to (..., width).

    The table's rows are tokens, so here ``left`` is looked up and ``right`` is applied. ``scale`` multiplies
    the result for models that scale their embeddings (Gemma).
    """

    def __init__(self, left: Tensor, right: Tensor, scale: float | None = None) -> None:
        super().__init__()
        self.left = _parameter(left)
        self.right = _parameter(right)
        self.num_embeddings, self.embedding_dim, self.rank = left.shape[0], right.shape[1], right.shape[0]
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.left) @ self.right  # (..., width)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def matrix(self) -> Tensor:
        return self.left.float() @ self.right.float()

    def full_bias(self) -> Tensor | None:
        return None

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class HeadsLinear(nn.Module):
    """A projection to heads that keeps ``kept`` of the ``width`` outputs of each, the others zero.

    weight (heads · kept, n), bias (heads · kept,), x (..., n) to (..., heads · width). ``place`` (heads, kept) says
    which of a head's outputs they are; without it they are the first.
    """

    place: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, heads: int, kept: int, width: int, place: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.register_buffer("place", place)
        self.heads, self.kept, self.width = heads, kept, width

    def _spread(self, kept: Tensor) -> Tensor:
        """(..., heads · kept) to (..., heads · width)."""
        by_head = kept.unflatten(-1, (self.heads, self.kept))
        if self.place is None:
            return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)
        zeros = by_head.new_zeros(*by_head.shape[:-1], self.width)
        spread: Tensor = zeros.scatter(-1, self.place.long().expand_as(by_head), by_head)
        return spread.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self._spread(nn.functional.linear(x, self.weight, self.bias))

    def matrix(self) -> Tensor:
        return self._spread(self.weight.float().T).T

    def full_bias(self) -> Tensor | None:
        return None if self.bias is None else self._spread(self.bias)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        heads, kept = settings["heads"], settings["kept"]
        found: Shapes = {"weight": ((heads * kept, columns), None)}
        if settings["placed"]:
            found["place"] = ((heads, kept), torch.uint8)
        if bias:
            found["bias"] = ((heads * kept,), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.heads} heads, {self.kept} of {self.width} each"


class FromHeadsLinear(nn.Module):
    """A projection of heads that reads the first ``kept`` of each one's ``width`` inputs.

    weight (m, heads · kept), x (..., heads · width) to (..., m).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, heads: int, kept: int, width: int) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.heads, self.kept, self.width = heads, kept, width

    def forward(self, x: Tensor) -> Tensor:
        kept = x.unflatten(-1, (self.heads, self.width))[..., : self.kept].flatten(-2)
        return nn.functional.linear(kept, self.weight, self.bias)

    def matrix(self) -> Tensor:
        by_head = self.weight.float().unflatten(-1, (self.heads, self.kept))
        return nn.functional.pad(by_head, (0, self.width - self.kept)).flatten(-2)

    def full_bias(self) -> Tensor | None:
        return self.bias

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        return {"weight": ((rows, settings["heads"] * settings["kept"]), None)}

    def extra_repr(self) -> str:
        return f"{self.heads} heads, {self.kept} of {self.width} each, {self.weight.shape[0]}"


class PlainLinear(nn.Module):
    """y = W x + bias with a dense W (rows, columns) of its own size: fewer neurons than the model had."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        return self.weight.float()

    def full_bias(self) -> Tensor | None:
        return self.bias

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        found: Shapes = {"weight": ((settings["rows"], settings["columns"]), None)}
        if bias and settings["rows"] != rows:
            found["bias"] = ((settings["rows"],), None)
        return found

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class AbsentLinear(nn.Module):
    """y = 0 (..., rows): a projection that was left out, with its bias."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.rows)

    def matrix(self) -> Tensor:
        return torch.zeros(self.rows, 0)

    def full_bias(self) -> Tensor | None:
        return torch.zeros(self.rows)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Mapping[str, int], bias: bool) -> Shapes:
        return {}

    def extra_repr(self) -> str:
        return f"{self.rows}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied modules and biases stay shared."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


LAYERS: dict[str, type[nn.Module]] = {
    "low-rank": LowRankLinear,
    "heads": HeadsLinear,
    "from-heads": FromHeadsLinear,
    "plain": PlainLinear,
    "absent": AbsentLinear,
}


def weight_of(module: nn.Module) -> Tensor:
    """W (out_features, in_features) of a dense linear; transposes the (in, out) storage of GPT-2's Conv1D.

    An embedding table (vocabulary, width) is returned as it is stored.
    """
    weight = cast(Tensor, module.weight)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def replacement(
    dense: nn.Module, kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, int] | None = None
) -> nn.Module:
    """The module that runs ``tensors`` in the place of ``dense``, keeping its bias and its embedding scale."""
    check_choice("layer kind", kind, LAYERS)
    bias = {"bias": tensors.get("bias", getattr(dense, "bias", None))}
    match kind:
        case "low-rank" if isinstance(dense, nn.Embedding):
            # A number, not the buffer beside it: a buffer that is not saved has no value while a model is loaded.
            return LowRankEmbedding(tensors["left"], tensors["right"], getattr(dense, "scalar_embed_scale", None))
        case "low-rank" | "plain":
            return LAYERS[kind](**{**bias, **tensors})
        case "absent":
            return AbsentLinear(weight_of(dense).shape[0])
        case _:
            sizes = {name: value for name, value in (settings or {}).items() if name != "placed"}
            return LAYERS[kind](**{**bias, **tensors}, **sizes)


def empty_replacement(dense: nn.Module, kind: str, settings: Mapping[str, int]) -> nn.Module:
    """Like `replacement`, with tensors of the right shape and no values yet: what loading fills."""
    check_choice("layer kind", kind, LAYERS)
    weight = weight_of(dense)
    layer = cast(type[Factored], LAYERS[kind])
    rows, columns = weight.shape
    shapes = layer.shapes(rows, columns, settings, getattr(dense, "bias", None) is not None)
    tensors = {
        name: torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
        for name, (shape, dtype) in shapes.items()
    }
    return replacement(dense, kind, tensors, settings)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``path`` under ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
