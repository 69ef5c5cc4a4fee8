"""Reshaping weights to tensors: balanced divisors, counted padding, paired modes and Van Loan's rearrangement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rankfront.methods._algebra import eigh_descending, fix_signs

LARGEST_RATIO = 4  # of a size's largest divisor to its smallest; beyond it the size is padded


def _splits(size: int, parts: int, smallest: int = 1) -> list[tuple[int, ...]]:
    """Every way to write ``size`` as a product of ``parts`` rising whole numbers from ``smallest`` on."""
    if parts == 1:
        return [(size,)] if size >= smallest else []
    found = []
    for first in range(smallest, math.isqrt(size) + 1):
        if size % first == 0:
            found += [(first, *rest) for rest in _splits(size // first, parts - 1, first)]
    return found


@cache
def balanced_divisors(size: int, parts: int) -> tuple[int, ...]:
    """Rising divisors, as alike as possible, of the least number from ``size`` on that has balanced ones.

    Balanced means that the largest is at most `LARGEST_RATIO` times the smallest: 576 = 24 · 24 and 1536 = 32 · 48
    stay as they are, 13 is padded to 14 = 2 · 7.
    """
    while True:
        ratio, split = min((split[-1] / split[0], split) for split in _splits(size, parts))
        if ratio <= LARGEST_RATIO:
            return split
        size += 1


@dataclass(frozen=True)
class Modes:
    """How W (m, n) is reshaped: m ≤ ∏ m_k and n ≤ ∏ n_k, zeros where they are less.

    Attributes:
        m, n: of W.
        rows: m_k.
        columns: n_k, as many as rows.
    """

    m: int
    n: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def pairs(self) -> tuple[int, ...]:
        """I_k = m_k n_k."""
        return tuple(m * n for m, n in zip(self.rows, self.columns, strict=True))

    @property
    def padded(self) -> bool:
        return (math.prod(self.rows), math.prod(self.columns)) != (self.m, self.n)

    def tensor(self, weight: Tensor) -> Tensor:
        """W (m, n) to T (I_1, …, I_d) in fp64, T[(i_1 j_1), …] = W[i_1 … i_d, j_1 … j_d].

        For d = 2 this is Van Loan's rearrangement: A ⊗ B becomes vec(A) vec(B)ᵀ. Raises ValueError where W is not
        finite.
        """
        folded = padded_rows(weight, math.prod(self.rows))
        folded = torch.nn.functional.pad(folded, (0, math.prod(self.columns) - self.n))
        count = len(self.rows)
        order = [axis for k in range(count) for axis in (k, count + k)]
        return folded.reshape(*self.rows, *self.columns).permute(order).reshape(self.pairs)


def padded_rows(weight: Tensor, rows: int) -> Tensor:
    """W (m, n) in fp64 with zero rows below, (rows, n); ValueError where it is not finite."""
    work = weight.double()
    if not torch.isfinite(work).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has values that are not finite")
    return torch.nn.functional.pad(work, (0, 0, 0, rows - len(work)))


@cache
def paired_modes(m: int, n: int, parts: int) -> Modes:
    """Balanced divisors of m with those of n, large ones paired with small ones, I_k = m_k n_k rising."""
    rows, columns = balanced_divisors(m, parts), balanced_divisors(n, parts)[::-1]
    order = sorted(range(parts), key=lambda k: (rows[k] * columns[k], rows[k]))
    return Modes(m, n, tuple(rows[k] for k in order), tuple(columns[k] for k in order))


def even_norms(*tensors: Tensor) -> list[Tensor]:
    """The tensors of a product, each scaled to the geometric mean of their norms; as they are where one is zero."""
    norms = torch.stack([tensor.norm() for tensor in tensors])
    if (norms == 0).any():
        return list(tensors)
    mean = norms.log().mean().exp()
    return [tensor * (mean / norm) for tensor, norm in zip(tensors, norms, strict=True)]


def leading_basis(unfolding: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors (k, rank) of an unfolding (k, ·), from its Gram in fp64."""
    return fix_signs(eigh_descending(unfolding @ unfolding.T)[1][:, :rank])


def even_terms(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (I_k, R) of a sum of R terms, each term's norm shared equally between them; a zero term is all zeros."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])  # (d, R)
    shares = norms.prod(0) ** (1 / len(factors))
    return [factor * (shares / torch.where(norm > 0, norm, 1)) for factor, norm in zip(factors, norms, strict=True)]
