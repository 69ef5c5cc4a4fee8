"""Truncation of a weight to the components that hold most of its energy, in the metric of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankfront.methods._algebra import root_and_inverse
from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._weighting import Gram, Unweighted


def least_rank(energy: Tensor, share: float) -> int:
    """The least e with Σ_{i≤e} σ_i² ≥ share · Σ σ_i², for σ² (k,), largest first."""
    sums = energy.cumsum(0)
    return min(int((sums < share * sums[-1]).sum()) + 1, len(energy))


@dataclass(frozen=True)
class Truncated:
    """W = left inner of rank e, fp64: left (m, e) of orthonormal columns, inner (e, n)."""

    left: Tensor
    inner: Tensor

    @property
    def weight(self) -> Tensor:
        """W, (m, n)."""
        return self.left @ self.inner

    @cached_property
    def rows(self) -> Tensor:
        """(e, n), orthonormal, with left rows = U Vᵀ of W = U Σ Vᵀ; nearly zero for components that W lacks."""
        return root_and_inverse(self.inner @ self.inner.T)[1] @ self.inner

    @property
    def subgradient(self) -> Tensor:
        """U Vᵀ of W = U Σ Vᵀ, (m, n): of the nuclear norm Σ σ_i, at W."""
        return self.left @ self.rows

    def projected(self, moment: Tensor) -> Tensor:
        """M (m, n) on the tangent space of matrices of rank e at W: M − (I − U Uᵀ) M (I − V Vᵀ).

        What goes would raise the rank again.
        """
        outside = moment - self.left @ (self.left.T @ moment)
        return moment - outside + (outside @ self.rows.T) @ self.rows


def truncated(weight: Tensor, gram: Tensor | None, rank: int, progress: float = 1.0) -> Truncated:
    """W (m, n) at the least rank, ``rank`` or above, that holds the share τ of the energy Σ σ_i² of W C^{1/2}.

    C is ``gram`` (n, n), or the identity. 1 − τ is ``progress`` times the share that lies beyond ``rank``: with 1 the
    result has rank ``rank``.

    Raises ValueError, or torch's LinAlgError, where there is no singular value decomposition.
    """
    basis, energy = weighted_subspace(weight, Unweighted() if gram is None else Gram(gram))
    beyond = float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))
    left = basis[:, : rank if progress >= 1 else max(rank, least_rank(energy, 1 - progress * beyond))]
    return Truncated(left, left.T @ weight.double())
