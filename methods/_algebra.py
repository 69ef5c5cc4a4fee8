"""Every numerical guard in one place: symmetric eigendecompositions, roots, signs."""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_RIDGE = 1e-8  # of the mean diagonal; keeps the null space of a singular Gram in a defined order
DIAGONAL_FLOOR = 1e-6  # of the mean weight; dead inputs keep a place (methods: FWSVD, ASVD)


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), largest first and clamped at zero, and eigenvectors (k, k) of a symmetric matrix.

    Computed in fp64 whatever comes in: a Gram squares the singular values, and fp32 would lose half of them.
    Raises ValueError where the matrix is not finite.
    """
    work = matrix.double()
    if not torch.isfinite(work).all():
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} has values that are not finite")
    values, vectors = torch.linalg.eigh((work + work.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _ridge(mean: Tensor) -> Tensor:
    """ε times a Gram's mean eigenvalue, ε = `GRAM_RIDGE`; one where the Gram is zero."""
    return torch.where(mean > 0, mean * GRAM_RIDGE, torch.ones_like(mean))


def regularise(gram: Tensor) -> Tensor:
    """C + ε(tr C / n) I in fp64, (n, n); the identity where C is zero.

    Directions that calibration never saw then weigh a little instead of nothing, so that among them the
    weight's own energy decides, as in plain SVD.
    """
    work = gram.double()
    return work + _ridge(work.diagonal().mean()) * torch.eye(len(work), dtype=work.dtype, device=work.device)


def floor_diagonal(weights: Tensor) -> Tensor:
    """d + ε·mean(d) in fp64, (n,), with ε = `DIAGONAL_FLOOR`; ones where d is zero."""
    work = weights.double()
    if not torch.isfinite(work).all() or (work < 0).any():
        raise ValueError(f"diagonal weights of length {len(work)} must be finite and not negative")
    mean = work.mean()
    return work + torch.where(mean > 0, mean * DIAGONAL_FLOOR, torch.ones_like(mean))


def regularised_root(gram: Tensor) -> Tensor:
    """S = Sᵀ with S Sᵀ = `regularise`(C), (n, n), by eigendecomposition: no Cholesky that a singular C could break.

    The ridge goes on top of the clamped eigenvalues: those of a Gram summed in fp32 may be as negative as the
    ridge is large.
    """
    vectors, roots = _rooted(gram)
    return (vectors * roots) @ vectors.T


def shrunk(gram: Tensor, share: float) -> Tensor:
    """(1 − s) C + s (tr C / n) I in fp64, (n, n), for a share s in (0, 1]; the identity where C is zero."""
    work = gram.double()
    if not torch.isfinite(work).all():
        raise ValueError(f"a Gram of shape {tuple(gram.shape)} has values that are not finite")
    mean = work.diagonal().mean()
    identity = torch.eye(len(work), dtype=work.dtype, device=work.device)
    return torch.where(mean > 0, (1 - share) * work + share * mean * identity, identity)


def lower_root(gram: Tensor, ridge: Tensor) -> Tensor:
    """Lower triangular L (n, n) with L Lᵀ = C + εI in fp64, for a Gram C (n, n) and a ridge ε above zero.

    A Gram summed in fp32 may have eigenvalues further below zero than a small ridge lifts them: where Cholesky finds
    that, negative ones are clamped first. Raises ValueError where the Gram is not finite.
    """
    work = gram.double()
    identity = torch.eye(len(work), dtype=work.dtype, device=work.device)
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(work + ridge * identity)
    if not failed:
        return lower
    values, vectors = eigh_descending(work)
    clamped: Tensor = torch.linalg.cholesky((vectors * values) @ vectors.T + ridge * identity)
    return clamped


def root_and_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R = Rᵀ with Rᵀ R = G, and R⁻¹, for a positive definite G (m, m), in fp64."""
    vectors, roots = _rooted(gram)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _rooted(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (n, n) of a Gram, and the roots (n,) of its clamped eigenvalues with their ridge."""
    values, vectors = eigh_descending(gram)
    return vectors, (values + _ridge(values.mean())).sqrt()


def fix_signs(columns: Tensor) -> Tensor:
    """Each column's sign chosen so that its entry of largest magnitude is positive; (m, k) to (m, k).

    An eigenvector's sign is the library's whim; fixing it makes factors reproducible across machines.
    """
    peaks = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    return columns * torch.where(peaks < 0, -1.0, 1.0).to(columns.dtype)


def polar(matrix: Tensor) -> Tensor:
    """U Vᵀ of M = U Σ Vᵀ, (k, n) with k ≤ n: the matrix with orthonormal rows nearest to M (Procrustes).

    In M's dtype, and in fp64 where the library's iteration does not converge in it.
    """
    try:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest.to(matrix.dtype)
