"""Weightings R and S of ‖R (W − Ŵ) S‖_F, as families use them.

Of S they need W S, W S Sᵀ and W S Sᵀ Wᵀ, never an inverse; of R, which a family has to undo, R W and R⁻¹ W.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from torch import Tensor

from rankfront.methods._algebra import floor_diagonal, regularise, regularised_root, root_and_inverse


class Weighting(Protocol):
    """S as the families use it."""

    def times_root(self, weight: Tensor) -> Tensor:
        """W S, (m, n)."""

    def sandwich(self, weight: Tensor) -> Tensor:
        """W S Sᵀ Wᵀ, (m, m)."""

    def times_gram(self, weight: Tensor) -> Tensor:
        """W S Sᵀ, (m, n)."""


class Unweighted:
    """S = I."""

    def times_root(self, weight: Tensor) -> Tensor:
        return weight

    def sandwich(self, weight: Tensor) -> Tensor:
        return weight @ weight.T

    def times_gram(self, weight: Tensor) -> Tensor:
        return weight


class Diagonal:
    """S = diag(√d), d (n,) floored so that no input weighs nothing."""

    def __init__(self, squares: Tensor) -> None:
        self.squares = floor_diagonal(squares)

    def times_root(self, weight: Tensor) -> Tensor:
        return weight * self.squares.sqrt()

    def sandwich(self, weight: Tensor) -> Tensor:
        return (weight * self.squares) @ weight.T

    def times_gram(self, weight: Tensor) -> Tensor:
        return weight * self.squares


class Gram:
    """S = C^{1/2} for a Gram C (n, n), regularised once; its root is computed only if a family asks for it."""

    def __init__(self, gram: Tensor) -> None:
        self.raw = gram

    @cached_property
    def root(self) -> Tensor:
        """C^{1/2} with its ridge, fp64."""
        return regularised_root(self.raw)

    @cached_property
    def matrix(self) -> Tensor:
        """C with its ridge, fp64."""
        return regularise(self.raw)

    @cached_property
    def single(self) -> Tensor:
        """The same in fp32, for what needs no more."""
        return self.matrix.float()

    def times_root(self, weight: Tensor) -> Tensor:
        return weight @ self.root

    def sandwich(self, weight: Tensor) -> Tensor:
        return weight @ self.matrix @ weight.T

    def times_gram(self, weight: Tensor) -> Tensor:
        return weight @ self.matrix


class LeftWeighting(Protocol):
    """R as the families use it."""

    def times(self, weight: Tensor) -> Tensor:
        """R W, (m, n)."""

    def undone(self, weight: Tensor) -> Tensor:
        """R⁻¹ W, (m, n)."""


class LeftGram:
    """R = Γ^{1/2} for a positive definite Γ (m, m)."""

    def __init__(self, gram: Tensor) -> None:
        self.root, self.inverse = root_and_inverse(gram)

    def times(self, weight: Tensor) -> Tensor:
        return self.root @ weight

    def undone(self, weight: Tensor) -> Tensor:
        return self.inverse @ weight


class LeftDiagonal:
    """R = diag(√d), d (m,) positive: a vocabulary's rows, of which no (m, m) matrix could be held."""

    def __init__(self, squares: Tensor) -> None:
        self.roots = squares.double().sqrt()[:, None]

    def times(self, weight: Tensor) -> Tensor:
        return self.roots * weight

    def undone(self, weight: Tensor) -> Tensor:
        return weight / self.roots
