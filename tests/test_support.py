"""Supports: packed bits come back, a seed always draws the same."""

import pytest
import torch

from rankfront.methods._support import index_width, pack, packed_bits, seeded_support, unpack


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 11, 16])
@pytest.mark.parametrize("count", [1, 5, 8, 63])
def test_packed_numbers_come_back(width, count):
    numbers = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(width))
    packed = pack(numbers, width)
    assert packed.dtype == torch.uint8
    assert 8 * packed.nbytes == packed_bits(count, width)
    assert torch.equal(unpack(packed, width, count), numbers)


@pytest.mark.parametrize(
    ("length", "width"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (576, 10), (1024, 10), (1025, 11)]
)
def test_an_index_takes_as_many_bits_as_it_needs(length, width):
    assert index_width(length) == width


def test_a_seeded_support_is_pinned():
    """Exports store the seed alone, so these must never change."""
    assert seeded_support(7, 2, 8, 3).tolist() == [[3, 4, 6], [2, 3, 4]]
    drawn = seeded_support(0, 200, 10, 4)
    assert all(len(set(row)) == 4 and row == sorted(row) for row in drawn.tolist())
    assert torch.bincount(drawn.flatten(), minlength=10).min() > 50
