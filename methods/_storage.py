"""What a factorised weight costs: stored values, index bits, bytes. Every formula for cost is here, and those for
what is packed in `_sizes`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rankfront.methods._sizes import group_size, index_width, packed_bits, padded_width, row_support_bits

INDEX_BITS_PER_PARAMETER = 16  # bits; sparse index bits count as bf16 values do, so that a mask is never free


@dataclass(frozen=True)
class Storage:
    """What one weight (or one plan) stores.

    Attributes:
        values: numbers in the dtype of the model.
        index_bits: of supports.
        integers: numbers that are packed into fewer bits.
        integer_bits: what these take together.
    """

    values: int
    index_bits: int = 0
    integers: int = 0
    integer_bits: int = 0

    @property
    def parameters(self) -> int:
        """values + integers + ⌈index_bits / 16⌉, in stored values, however few bits they have."""
        return self.values + self.integers - (-self.index_bits // INDEX_BITS_PER_PARAMETER)

    @property
    def buffers(self) -> int:
        """What of `parameters` is held in tensors that are not floating."""
        return self.parameters - self.values

    def bytes(self, value_bytes: int) -> int:
        """Bytes on disk when each value takes ``value_bytes`` bytes."""
        return self.values * value_bytes - (-self.index_bits // 8) - (-self.integer_bits // 8)

    def __add__(self, other: Storage) -> Storage:
        return Storage(
            self.values + other.values,
            self.index_bits + other.index_bits,
            self.integers + other.integers,
            self.integer_bits + other.integer_bits,
        )

    def __sub__(self, other: Storage) -> Storage:
        return self + Storage(-other.values, -other.index_bits, -other.integers, -other.integer_bits)


def dense_storage(out_features: int, in_features: int) -> Storage:
    """mn values."""
    return Storage(out_features * in_features)


def low_rank_storage(out_features: int, in_features: int, rank: int) -> Storage:
    """r(m + n) values: left (m, r) and right (r, n)."""
    return Storage(rank * (out_features + in_features))


def wavelet_storage(out_features: int, in_features: int, components: int, ordered: bool) -> Storage:
    """k(⌈m/2⌉ + ⌈n/2⌉) values for k components of bands, and the order of n inputs where it is learned."""
    values = components * (-(-out_features // 2) - (-in_features // 2))
    return Storage(values, packed_bits(in_features, index_width(in_features)) if ordered else 0)


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank that stores less than the dense weight: the largest r with r(m + n) < mn."""
    return (out_features * in_features - 1) // (out_features + in_features)


def kronecker_storage(rows: tuple[int, ...], columns: tuple[int, ...], terms: int) -> Storage:
    """R Σ m_k n_k values: R terms ⊗_k A_k with A_k (m_k, n_k), two modes for Kronecker, more for CP of paired modes."""
    return Storage(terms * sum(m * n for m, n in zip(rows, columns, strict=True)))


def ring_storage(modes: tuple[int, ...], ranks: tuple[int, ...]) -> Storage:
    """Σ r_{k−1} I_k r_k values, ranks (r_0, …, r_d) with r_d = r_0: a tensor train where r_0 = 1."""
    return Storage(sum(before * mode * after for before, mode, after in zip(ranks, modes, ranks[1:], strict=False)))


def tucker_storage(modes: tuple[int, ...], ranks: tuple[int, ...], blocks: int = 1) -> Storage:
    """N (∏ R_k + Σ R_k I_k) values: N cores, each with its factors (I_k, R_k)."""
    factors = sum(mode * rank for mode, rank in zip(modes, ranks, strict=True))
    return Storage(blocks * (math.prod(ranks) + factors))


def dictionary_storage(out_features: int, in_features: int, atoms: int, nonzeros: int) -> Storage:
    """kn + ms values and mk bits: atoms (k, n), s coefficients an output, and the mask of their places (m, k)."""
    return Storage(atoms * in_features + out_features * nonzeros, packed_bits(out_features * atoms, 1))


def low_rank_sparse_storage(out_features: int, in_features: int, rank: int, nonzeros: int, seeded: bool) -> Storage:
    """r(m + n) + sm values, s ``nonzeros`` a row; the bits of their support, none where a seed draws it."""
    bits = 0 if seeded else row_support_bits(out_features, in_features, nonzeros)
    return Storage(rank * (out_features + in_features) + nonzeros * out_features, bits)


def block_dictionary_storage(
    out_features: int, in_features: int, atoms: int, group: int, nonzeros: int, block: int
) -> Storage:
    """kn + mBs values for B = ⌈n / block⌉ blocks, s = Nk / M, N ``nonzeros`` of every M atoms, and the support's bits.

    For 2:4 the smaller of mask and indices is 2 bits a nonzero, as hardware stores it.
    """
    groups = -(-in_features // block) * atoms // group  # in each row
    support = row_support_bits(out_features * groups, group, nonzeros)
    return Storage(atoms * in_features + out_features * groups * nonzeros, support)


def integer_storage(rows: int, columns: int, bits: int) -> Storage:
    """mn' integers, n' the padded width, and a scale a row; in four bits a scale and a zero for every group."""
    integers = rows * padded_width(columns, bits)
    scales = rows if bits == 8 else 2 * integers // group_size(columns)
    return Storage(scales, integers=integers, integer_bits=bits * integers)


def integer_low_rank_storage(rows: int, columns: int, rank: int, bits: int) -> Storage:
    """The two factors of a low rank, left (m, r) and right (r, n), as `integer_storage` says."""
    return integer_storage(rows, rank, bits) + integer_storage(rank, columns, bits)


@dataclass(frozen=True)
class Cost:
    """What a whole plan costs, exactly.

    Attributes:
        values: stored parameters of the whole model, index bits counted at 16 bits a value.
        dense_values: the same of the dense model.
        block_values: those of the matrices in the blocks alone, and of the biases of what can be treated (embeddings
            and head left out).
        dense_block_values: the same of the dense model.
        bytes: tensor bytes on disk in the dtype the plan is exported in.
        active_parameters: kept fraction of the values that one token reads, those of k of E experts and all else.
    """

    values: int
    dense_values: int
    block_values: int
    dense_block_values: int
    bytes: int
    active_parameters: float = 1.0

    @property
    def parameters(self) -> float:
        """Kept fraction of the whole model's parameters, 1.0 = dense."""
        return self.values / self.dense_values

    @property
    def block_parameters(self) -> float:
        """Kept fraction of the parameters of the blocks' matrices, the figure papers quote."""
        return self.block_values / self.dense_block_values if self.dense_block_values else 1.0
