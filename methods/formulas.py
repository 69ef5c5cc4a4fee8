"""What the layers' formulas call: a model card shows the source of those that it needs."""

# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch


def numbers(packed, width, count):
    """Whole numbers of so many bits each, lowest bit first."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (bits.flatten()[: count * width].long().view(count, width) << torch.arange(width)).sum(1)


def columns(packed, rows, width, kept):
    """Where the kept entries of each row are: a mask where its size is that of one, else their places."""
    if len(packed) == -(-rows * width // 8):
        return numbers(packed, 1, rows * width).view(rows, width).nonzero()[:, 1].view(rows, kept)
    return numbers(packed, max(1, (width - 1).bit_length()), rows * kept).view(rows, kept).sort(1).values


def drawn(seed, rows, width, kept):
    """Places that a seed draws: those of the smallest words of PCG64."""
    words = np.asarray(np.random.PCG64(seed).random_raw(rows * width)).reshape(rows, width)
    return torch.from_numpy(np.sort(np.argpartition(words, kept - 1, axis=1)[:, :kept], axis=1))


def codes(values, support, width, group, kept):
    """Coefficients (rows, width), some kept in every group of columns."""
    rows, groups = len(values), width // group
    inside = columns(support, rows * groups, group, kept).view(rows, groups, kept)
    places = inside + group * torch.arange(groups)[:, None]
    return torch.zeros(rows, width).scatter(1, places.flatten(1), values)


def whole(part, columns):
    """Integers times scales: of 8 bits a scale a row; of 4, two in a byte, a scale and a zero for each group."""
    q, scales = part.integers, part.scales
    if q.dtype == torch.int8:
        return q[:, :columns] * scales[:, None]
    q = torch.stack([q & 15, q >> 4], -1).flatten(1).float() - 8
    scale, zero = scales.permute(2, 1, 0)[..., None]
    return (q.unflatten(1, (len(scales), -1)) * scale + zero).flatten(1)[:, :columns]


def transform(size, moments):
    """One level of a Daubechies wavelet transform, periodised, as a matrix; an odd size is padded by a zero."""
    taps = {1: [0.5**0.5] * 2, 2: [-0.12940952255126037, 0.2241438680420134, 0.8365163037378079, 0.48296291314453416]}
    low = taps[moments]
    high = [tap if k % 2 else -tap for k, tap in enumerate(reversed(low))]
    even = size + size % 2
    matrix = torch.zeros(even, even)
    for band, row in enumerate((low, high)):
        for i in range(even // 2):
            for k, tap in enumerate(row):
                matrix[band * even // 2 + i, (2 * i + len(row) // 2 - k) % even] += tap
    return matrix


def banded(left, right, ranks):
    """The four bands of a transformed weight, each a low rank; their order is ll, hl, lh, hh, outputs first."""
    ll, hl, lh, hh = (a @ b for a, b in zip(left.split(ranks, 1), right.split(ranks, 0), strict=True))
    return torch.cat([torch.cat([ll, lh], 1), torch.cat([hl, hh], 1)])
