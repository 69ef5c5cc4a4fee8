"""Sparse matrices with the same number of nonzeros in every row: packed support, columns, dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfront.methods._sizes import BYTE, index_width, packed_bits, row_support_bits
from rankfront.methods._sparse import pack_mask, unpack_mask
from rankfront.methods._support import pack, unpack


def dense_of(values: Tensor, columns: Tensor, width: int) -> Tensor:
    """(rows, width) with ``values`` (rows, s) at ``columns`` (rows, s) and zeros elsewhere; gradients reach values."""
    return values.new_zeros(len(values), width).scatter(1, columns.long(), values)


def packed_columns(columns: Tensor, width: int) -> Tensor:
    """Distinct ``columns`` (rows, s) below ``width`` as uint8: bitmask or indices, whichever is smaller."""
    rows, kept = columns.shape
    if _masked(rows, width, kept):
        return pack_mask(torch.zeros(rows, width, dtype=torch.int64).scatter(1, columns, 1))
    return pack(columns, index_width(width))


def columns_of(packed: Tensor, rows: int, width: int, kept: int) -> Tensor:
    """What `packed_columns` was given, each row rising, (rows, kept) int64."""
    if _masked(rows, width, kept):
        mask = unpack_mask(packed, rows, width)
        if not torch.compiler.is_compiling():  # a graph wants shapes that follow from shapes
            found = mask.nonzero()[:, 1]
            if len(found) == rows * kept:  # not so where nothing was loaded
                return found.view(rows, kept)
        order: Tensor = mask.byte().argsort(dim=1, descending=True, stable=True)
        return order[:, :kept]
    return unpack(packed, index_width(width), rows * kept).view(rows, kept).sort(1).values


def support_bytes(rows: int, width: int, kept: int) -> int:
    """The length of what `packed_columns` gives."""
    return row_support_bits(rows, width, kept) // BYTE


def _masked(rows: int, width: int, kept: int) -> bool:
    return row_support_bits(rows, width, kept) == packed_bits(rows * width, 1)
