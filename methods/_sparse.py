"""Sparse matrices: packed for storage, dense to run.

Stored are ``values`` (m, s), the nonzeros row after row and in each row from the lowest column to the highest, and
``support``, one bit a place of (m, k) in the same order, packed to uint8 (⌈mk/8⌉,), with m·s bits set: s in every row,
or s on average where a method shares them among rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods._support import pack, unpack
from rankfront.methods.layers import parameter


def pack_mask(mask: Tensor) -> Tensor:
    """A mask (m, k) to its packed bits, uint8 (⌈mk/8⌉,)."""
    return pack(mask, 1)


def unpack_mask(support: Tensor, rows: int, columns: int) -> Tensor:
    """What `pack_mask` was given, bool (rows, columns)."""
    return unpack(support, 1, rows * columns).view(rows, columns).bool()


def scatter_rows(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` (m, s) in the m·s places of ``mask`` (m, k), and zeros; gradients reach them."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def gather_rows(matrix: Tensor, mask: Tensor) -> Tensor:
    """The entries of ``matrix`` (m, k) in the m·s places of ``mask``, (m, s)."""
    values: Tensor = matrix[mask].unflatten(0, (len(matrix), -1))
    return values


class SparseRows(nn.Module):
    """A module that stores a sparse matrix (m, k) as above and runs it dense, by `sparse_matrix`.

    Where gradients are wanted for the values, and while a graph is compiled, the dense matrix is rebuilt at every call.
    Otherwise it is kept until values or support change or move. What is kept is neither saved nor copied. Writing
    through ``.data``, which leaves no trace, is the one change that goes unnoticed.
    """

    values: nn.Parameter
    support: Tensor

    def __init__(self, values: Tensor, support: Tensor, columns: int) -> None:
        super().__init__()
        self.values = parameter(values)
        self.register_buffer("support", support)
        self.columns = columns
        self._kept: tuple[tuple[Tensor, ...], list[tuple[int, int]], Tensor] | None = None

    def mask(self) -> Tensor:
        """The places of the values, bool (m, k)."""
        return unpack_mask(self.support, len(self.values), self.columns)

    def sparse_matrix(self) -> Tensor:
        """The sparse matrix (m, k), dense, in the dtype of the values."""
        values, support = self.values, self.support
        wanted = torch.is_grad_enabled() and values.requires_grad
        if wanted or torch.compiler.is_compiling() or values.is_inference() or support.is_inference():
            return scatter_rows(values, self.mask())
        versions = [(tensor._version, tensor.data_ptr()) for tensor in (values, support)]
        if self._kept is not None:
            sources, stamps, dense = self._kept
            if sources[0] is values and sources[1] is support and stamps == versions:
                return dense
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a backward pass later
            dense = scatter_rows(values, self.mask())
        self._kept = ((values, support), versions, dense)
        return dense

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
