"""What factorised weights cost, against closed forms."""

import math

import pytest

from rankfront.methods import Cost, Storage, Weight
from rankfront.methods._sizes import row_support_bits
from rankfront.methods._storage import (
    block_dictionary_storage,
    break_even_rank,
    dense_storage,
    dictionary_storage,
    kronecker_storage,
    low_rank_sparse_storage,
    low_rank_storage,
    ring_storage,
    tucker_storage,
    wavelet_storage,
)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 4), (7, 3), (576, 1536), (49152, 576)])
def test_break_even_is_the_last_rank_cheaper_than_dense(m, n):
    r = break_even_rank(m, n)
    assert low_rank_storage(m, n, r).values < dense_storage(m, n).values
    assert low_rank_storage(m, n, r + 1).values >= dense_storage(m, n).values


def test_square_break_even_is_below_half():
    """r · 2n < n² gives r < n/2: at n = 64 exactly half costs as much as dense."""
    assert break_even_rank(64, 64) == 31
    assert break_even_rank(65, 65) == 32


def test_low_rank_values():
    assert low_rank_storage(5, 7, 2) == Storage(2 * 5 + 2 * 7)


def test_kronecker_values():
    assert kronecker_storage((2, 3), (5, 7), 4) == Storage(4 * (2 * 5 + 3 * 7))
    assert kronecker_storage((2, 3, 4), (5, 7, 2), 9) == Storage(9 * (10 + 21 + 8))


def test_ring_values():
    assert ring_storage((6, 7, 8), (2, 3, 4, 2)) == Storage(2 * 6 * 3 + 3 * 7 * 4 + 4 * 8 * 2)
    assert ring_storage((6, 7), (1, 3, 1)) == low_rank_storage(6, 7, 3)  # two cores of a train


def test_tucker_values():
    assert tucker_storage((6, 7, 8), (2, 3, 4)) == Storage(24 + 12 + 21 + 32)
    assert tucker_storage((6, 7, 8), (2, 3, 4), 5) == Storage(5 * (24 + 12 + 21 + 32))


def test_dictionary_counts_its_mask():
    """CoSpaDi's true storage in 16-bit words: d₁k + s d₂ + k d₂ / 16, d₁ in and d₂ out."""
    assert dictionary_storage(32, 48, 16, 8) == Storage(48 * 16 + 32 * 8, 32 * 16)
    assert dictionary_storage(32, 48, 16, 8).parameters == 48 * 16 + 8 * 32 + 16 * 32 // 16
    assert dictionary_storage(3, 5, 3, 1).index_bits == 16  # nine bits take two bytes


def test_dense_values():
    assert dense_storage(5, 7) == Storage(35)
    assert Weight("weight", "w", 5, 7).storage == Storage(35)


@pytest.mark.parametrize("bits", [0, 1, 8, 15, 16, 17, 1000])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_index_bits_count_as_sixteenths_and_are_stored_as_bytes(bits, width):
    storage = Storage(100, bits)
    assert storage.parameters == 100 + math.ceil(bits / 16)
    assert storage.bytes(width) == 100 * width + math.ceil(bits / 8)


@pytest.mark.parametrize(("m", "n"), [(8, 12), (7, 13), (576, 1536)])
def test_bands_hold_half_of_rows_and_columns(m, n):
    """An odd size is padded by one; the order of n inputs takes ⌈log₂ n⌉ bits each, in whole bytes."""
    assert wavelet_storage(m, n, 6, ordered=False) == Storage(6 * (math.ceil(m / 2) + math.ceil(n / 2)))
    bits = 8 * math.ceil(n * math.ceil(math.log2(n)) / 8)
    assert wavelet_storage(m, n, 6, ordered=True) - wavelet_storage(m, n, 6, ordered=False) == Storage(0, bits)


def test_storage_adds():
    assert Storage(3, 5) + Storage(4, 11) == Storage(7, 16)


@pytest.mark.parametrize(
    ("rows", "columns", "kept", "bits"),
    [(4, 16, 1, 16), (4, 16, 4, 64), (4, 16, 16, 64), (3, 5, 1, 16), (3, 5, 2, 16), (576, 1536, 100, 576 * 100 * 11)],
)
def test_a_support_takes_a_mask_or_indices_in_whole_bytes(rows, columns, kept, bits):
    assert row_support_bits(rows, columns, kept) == bits


def test_low_rank_plus_sparse_pays_for_a_chosen_support_and_not_for_a_drawn_one():
    assert low_rank_sparse_storage(5, 7, 2, 3, seeded=True) == Storage(2 * 12 + 5 * 3)
    assert low_rank_sparse_storage(5, 7, 2, 3, seeded=False) == Storage(2 * 12 + 5 * 3, 40)


def test_a_block_dictionary_pays_for_every_blocks_coefficients():
    """Two blocks of 8 inputs; 3 of 6 atoms are a 6-bit mask, 2 of 4 a pair of 2-bit indices: 2 bits a nonzero."""
    assert block_dictionary_storage(5, 13, atoms=6, group=6, nonzeros=3, block=8) == Storage(6 * 13 + 5 * 2 * 3, 64)
    assert block_dictionary_storage(5, 16, atoms=8, group=4, nonzeros=2, block=8) == Storage(8 * 16 + 5 * 2 * 4, 80)


def test_kept_fractions():
    cost = Cost(values=60, dense_values=80, block_values=10, dense_block_values=40, bytes=120)
    assert cost.parameters == 0.75
    assert cost.block_parameters == 0.25


def test_a_model_without_block_linears_keeps_them_all():
    cost = Cost(values=60, dense_values=80, block_values=0, dense_block_values=0, bytes=120)
    assert cost.block_parameters == 1.0
