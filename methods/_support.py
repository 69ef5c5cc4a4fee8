"""Supports of sparse factors as they are stored: packed bits, or nothing but a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rankfront.methods._sizes import BYTE


def pack(numbers: Tensor, width: int) -> Tensor:
    """Whole numbers in [0, 2^width), flattened, to uint8 (⌈count · width / 8⌉,), lowest bit first."""
    places = torch.arange(width, device=numbers.device)
    bits = ((numbers.flatten().long()[:, None] >> places) & 1).flatten()
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % BYTE)).unflatten(0, (-1, BYTE))
    packed: Tensor = (padded << torch.arange(BYTE, device=numbers.device)).sum(1).to(torch.uint8)
    return packed


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """What `pack` was given, (count,) int64."""
    places = torch.arange(BYTE, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, None] >> places) & 1).flatten()  # bytes until here: there may be one for every entry of a weight
    numbers = bits[: count * width].unflatten(0, (count, width)).long()
    shifted: Tensor = numbers << torch.arange(width, device=packed.device)
    return shifted.sum(1) if width > 1 else shifted[:, 0]


def seeded_support(seed: int, rows: int, columns: int, kept: int) -> Tensor:
    """``kept`` distinct columns for each of ``rows``, uniformly drawn, rising, (rows, kept) int64.

    From the raw words of PCG64, which NumPy promises not to change: a seed is all that needs to be stored.
    """
    words = np.asarray(np.random.PCG64(seed).random_raw(rows * columns)).reshape(rows, columns)
    chosen = np.argpartition(words, kept - 1, axis=1)[:, :kept]  # the smallest words; 64 bits leave no ties
    return torch.from_numpy(np.sort(chosen, axis=1))
