"""The modules that compressed weights run as: always their factors, never a rebuilt dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from rankfront.methods._errors import check_choice


class Factored(Protocol):
    """What every module here offers beside ``forward``."""

    def matrix(self) -> Tensor:
        """Ŵ (out_features, in_features), rebuilt in fp32 from the stored factors."""


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

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter already, so that tied modules and biases stay shared."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


LAYERS: dict[str, type[nn.Module]] = {"low-rank": LowRankLinear}


def weight_of(module: nn.Module) -> Tensor:
    """W (out_features, in_features) of a dense linear; transposes the (in, out) storage of GPT-2's Conv1D.

    An embedding table (vocabulary, width) is returned as it is stored.
    """
    weight = cast(Tensor, module.weight)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def replacement(dense: nn.Module, kind: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module that runs ``tensors`` in the place of ``dense``, keeping its bias and its embedding scale."""
    check_choice("layer kind", kind, LAYERS)
    if isinstance(dense, nn.Embedding):
        # A number, not the buffer beside it: a buffer that is not saved has no value while a model is being loaded.
        return LowRankEmbedding(tensors["left"], tensors["right"], getattr(dense, "scalar_embed_scale", None))
    return LAYERS[kind](**tensors, bias=getattr(dense, "bias", None))


def empty_replacement(dense: nn.Module, kind: str, settings: Mapping[str, int]) -> nn.Module:
    """Like `replacement`, with factors of the right shape and no values yet: what loading fills.

    A low-rank matrix needs only its rank beside the shape (m, n) of the dense weight.
    """
    check_choice("layer kind", kind, LAYERS)
    weight, rank = weight_of(dense), settings["rank"]
    rows, columns = weight.shape
    shapes = {"left": (rows, rank), "right": (rank, columns)}
    return replacement(
        dense,
        kind,
        {name: torch.empty(shape, dtype=weight.dtype, device=weight.device) for name, shape in shapes.items()},
    )


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``path`` under ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
