"""How large packed numbers are: bits of indices and masks, widths that kernels read."""

from __future__ import annotations

BYTE = 8  # bits
INTEGER_BITS = (8, 4)  # that torch's kernels multiply by


def packed_bits(count: int, width: int) -> int:
    """Bits on disk of ``count`` whole numbers of ``width`` bits each: whole bytes."""
    return -(-count * width // BYTE) * BYTE


def index_width(length: int) -> int:
    """Bits of an index below ``length``: ⌈log₂ length⌉, at least 1."""
    return max(1, (length - 1).bit_length())


def row_support_bits(rows: int, columns: int, kept: int) -> int:
    """Bits of a support with ``kept`` of ``columns`` places in every row: the smaller of a bitmask and indices."""
    return min(packed_bits(rows * columns, 1), packed_bits(rows * kept, index_width(columns)))


def group_size(columns: int) -> int:
    """Inputs that share a scale in four bits: 64 where that leaves little to pad, else 32, as torch's kernel reads."""
    return 64 if columns % 64 == 0 or columns > 512 else 32


def padded_width(columns: int, bits: int) -> int:
    """``columns`` up to what torch's kernels read: sixteens in eight bits, whole groups in four."""
    step = 16 if bits == 8 else group_size(columns)
    return -(-columns // step) * step
