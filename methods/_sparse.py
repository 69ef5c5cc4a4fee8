"""Sparse matrices: packed for storage, dense to run.

Stored are ``values`` (m, s), the nonzeros row after row and in each row from the lowest column to the highest, and
``support``, one bit a place of (m, k) in the same order, packed to uint8 (⌈mk/8⌉,), with m·s bits set: s in every row,
or s on average where a method shares them among rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfront.methods._support import pack, unpack
from rankfront.methods._unpacked import Unpacked
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


class SparseRows(Unpacked):
    """A module that stores a sparse matrix (m, k) as above and runs it dense, by `sparse_matrix`."""

    values: nn.Parameter
    support: Tensor

    def __init__(self, values: Tensor, support: Tensor, columns: int) -> None:
        super().__init__()
        self.values = parameter(values)
        self.register_buffer("support", support)
        self.columns = columns

    def mask(self) -> Tensor:
        """The places of the values, bool (m, k)."""
        support = self.support
        return self.places(lambda: unpack_mask(support, len(self.values), self.columns), support)

    def sparse_matrix(self) -> Tensor:
        """The sparse matrix (m, k), dense, in the dtype of the values."""
        return self.kept(lambda: scatter_rows(self.values, self.mask()), self.values, self.support)
