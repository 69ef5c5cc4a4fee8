"""A matrix in 8 or 4 bits, as torch's packed kernels read it.

Eight bits: q (m, n) in −127 … 127 with one scale a row, w = q s. Four bits: q (m, n) in 0 … 15 with a scale and a zero
for every group of inputs of a row, w = (q − 8) s + z, two to a byte. Zeros fill the width that the kernels want.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIDDLE = 8  # of sixteen steps
ALIGNMENT = 64  # bytes


class Integers(NamedTuple):
    """A rounded matrix (m, n).

    Attributes:
        integers: int8 (m, n'), n' the padded width; or for four bits uint8 (m, n' / 2), even columns in the low half.
        scales: (m,); or (n' / g, m, 2) for four bits, scale and zero.
    """

    integers: Tensor
    scales: Tensor


def named(**parts: Integers) -> dict[str, Tensor]:
    """What parts are stored as, and what a module finds them by: ``part.integers`` and ``part.scales``."""
    return {f"{part}.{name}": tensor for part, each in parts.items() for name, tensor in each._asdict().items()}


def restored(rounded: Integers, bits: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the integers stand for, (m, n)."""
    if bits == 8:
        return rounded.integers[:, :columns].to(dtype) * rounded.scales.to(dtype)[:, None]
    scale, zero = rounded.scales.to(dtype).movedim(0, 1).split(1, -1)  # (m, n' / g, 1) each
    values = torch.empty(*rounded.integers.shape, 2, dtype=dtype, device=rounded.integers.device)
    for half, q in enumerate((rounded.integers & 15, rounded.integers >> 4)):
        values[..., half] = q.view(torch.int8) - MIDDLE  # written where it is multiplied, which halves the time
    whole: Tensor = values.view(*scale.shape[:2], -1).mul_(scale).add_(zero).flatten(1)[:, :columns]
    return whole


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its memory does not begin as torch's own does: what was mapped from a file.

    torch's kernel for 8 bits loads whole vectors, from four tokens on in bf16, and faults where they are not aligned.
    """
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def halves(integers: Tensor) -> Tensor:
    """The two numbers in every byte (m, k), (m, 2k) uint8."""
    return torch.stack([integers & 15, integers >> 4], -1).flatten(1)
