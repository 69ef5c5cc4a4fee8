"""The grid of ranks that a device likes: what ``space.rank_multiple = "device"`` comes to.

Two thin products at a rank rounded up to a multiple of 16, 32 or 64 may take less time than at the next multiple of 8,
though they store more. For every distinct shape of the blocks' linears and every kept fraction of the study the two are
timed in turns, for the tokens of a prompt and for one token of decoding; the multiple is the one of least mean ratio,
each shape counted by its weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from rankfront.methods import Site
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.objectives.latency import Latency, Timed
from rankfront.search.config import FINEST
from rankfront.search.inputs.device import DTYPES
from rankfront.search.measure.timing import Stopwatches
from rankfront.search.names import Place

MULTIPLES = (FINEST, 16, 32, 64)
GAIN = 0.01  # of the time; for less than that no coarser grid is worth its larger ranks

Shapes = Mapping[tuple[int, int], int]  # (out_features, in_features) -> how many


def shapes_of(sites: Mapping[Site, Place]) -> Shapes:
    """The linears of a model's blocks by shape."""
    weights = {w.path: w for site, place in sites.items() if place.block is not None for w in site.weights}
    return Counter((w.out_features, w.in_features) for w in weights.values() if w.kind == "linear")


def measured_multiple(
    shapes: Shapes, keep: Sequence[float], timed: Timed | None, device: str, dtype: str, cache: Path
) -> int:
    """The multiple that ``device`` likes for a study with these levels, at the lengths of its latency."""
    lengths = timed or Latency()
    watches = Stopwatches(cache, device, DTYPES[dtype], lengths.prepack)

    def ratio(shape: tuple[int, int], rank: int, least: int, tokens: int) -> float:
        rows, columns = shape
        x = torch.ones(lengths.batch, tokens, columns, dtype=DTYPES[dtype], device=device)

        def made(r: int) -> nn.Module:
            left, right = (torch.full(size, 0.01, dtype=x.dtype, device=device) for size in ((rows, r), (r, columns)))
            return LowRankLinear(left, right)

        key = f"rank {rank} over rank {least} for {rows}x{columns}"
        return watches.ratio(key, lambda: made(least), x, lambda: made(rank))

    found = liked(shapes, keep, (1, lengths.prompt), ratio)
    watches.save()
    return found


def liked(
    shapes: Shapes,
    keep: Sequence[float],
    tokens: Sequence[int],
    ratio: Callable[[tuple[int, int], int, int, int], float],
) -> int:
    """The multiple of least mean ``ratio`` (shape, rank, least rank, tokens); the finest of those within `GAIN`."""
    total = dict.fromkeys(MULTIPLES, 0.0)
    weight = 0.0
    for (rows, columns), count in shapes.items():
        for kept in keep:
            rank = kept * rows * columns / (rows + columns)
            ranks = {step: step * math.ceil(rank / step) for step in MULTIPLES}
            for length in tokens:
                weight += count * rows * columns
                for step, own in ranks.items():
                    one = 1.0 if own == ranks[FINEST] else ratio((rows, columns), own, ranks[FINEST], length)
                    total[step] += count * rows * columns * one
    best = min(total.values())
    return next(step for step in MULTIPLES if total[step] <= best + GAIN * weight)
