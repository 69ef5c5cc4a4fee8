"""Supports: packed bits come back, a seed always draws the same."""

import pytest
import torch

from rankfront.methods._scatter import columns_of, dense_of, packed_columns, support_bytes
from rankfront.methods._sizes import index_width, packed_bits
from rankfront.methods._support import pack, seeded_support, unpack


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


@pytest.mark.parametrize(("rows", "width", "kept"), [(5, 64, 2), (5, 64, 40), (3, 7, 7), (1, 1, 1), (4, 13, 3)])
def test_columns_come_back_rising_whichever_way_they_are_stored(rows, width, kept):
    columns = seeded_support(1, rows, width, kept)
    packed = packed_columns(columns, width)
    assert packed.dtype == torch.uint8
    assert len(packed) == support_bytes(rows, width, kept)
    assert torch.equal(columns_of(packed, rows, width, kept), columns)
    shuffled = columns[:, torch.randperm(kept, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(columns_of(packed_columns(shuffled, width), rows, width, kept), columns)


def test_a_scattered_matrix_holds_each_value_at_its_column():
    columns, values = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]], requires_grad=True)
    dense = dense_of(values, columns, 4)
    assert dense.tolist() == [[6.0, 0.0, 5.0, 0.0], [0.0, 7.0, 0.0, 8.0]]
    (dense * torch.arange(8.0).view(2, 4)).sum().backward()
    assert values.grad.tolist() == [[2.0, 0.0], [5.0, 7.0]]
