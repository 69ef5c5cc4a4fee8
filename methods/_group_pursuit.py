"""Sparse coding with as many nonzeros in every group of atoms: orthogonal matching pursuit for all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5  # of an atom's squared norm, in fp32: what is less outside of those chosen counts as nothing
DAMPING = 1e-9  # of the mean squared norm of a row's atoms, so that atoms that coincide do not ask for huge values
ROWS_AT_ONCE = 768  # a few MB of directions: enough to be fast, little enough for the processor's cache


def pursued(correlations: Tensor, gram: Tensor, group: int, nonzeros: int) -> Tensor:
    """Columns (m, s), rising, of the atoms that code m rows greedily, ``nonzeros`` of every ``group`` of the k atoms.

    In the order-recursive form: with q_t the direction that atom j_t adds to those chosen before, u_t (m, k) holds
    every atom's product with it, so that residual correlations and the norms that remain follow by subtraction. The
    atom taken is that which lowers the error most, residual correlation over remaining norm (orthogonal least
    squares). In fp32, on atoms and rows of norm one: only the choice comes out of it.

    Args:
        correlations: of every row with every atom, (m, k).
        gram: of the atoms, (k, k).
    """
    tiny = torch.finfo(gram.dtype).tiny
    norms = gram.diagonal().clamp_min(tiny).sqrt()
    cosines = (gram / norms / norms[:, None]).float()
    scaled = correlations / norms
    scaled = (scaled / scaled.abs().amax(1, keepdim=True).clamp_min(tiny)).float()
    return torch.cat([_pursued(rows, cosines, group, nonzeros) for rows in scaled.split(ROWS_AT_ONCE)])


def _pursued(residual: Tensor, cosines: Tensor, group: int, nonzeros: int) -> Tensor:
    m, k = residual.shape
    steps = nonzeros * (k // group)
    norms, closed = torch.ones_like(residual), torch.zeros(m, k, dtype=torch.bool, device=residual.device)
    taken, directions = closed.clone(), residual.new_zeros(m, steps, k)
    for step in range(steps):
        scores = residual.square() / norms.clamp_min(LEAST)
        chosen = scores.masked_fill_(closed, -1.0).argmax(1, keepdim=True)  # (m, 1)
        taken.scatter_(1, chosen, True)
        closed = taken
        if group < k:
            full = taken.unflatten(1, (-1, group)).sum(2, keepdim=True) == nonzeros
            closed = (taken.unflatten(1, (-1, group)) | full).flatten(1)
        earlier = directions[:, :step]
        known = earlier.gather(2, chosen[:, :, None].expand(-1, step, 1))  # (m, step, 1)
        fresh = cosines[chosen[:, 0]] - (known.mT @ earlier)[:, 0]
        left = norms.gather(1, chosen)
        fresh = torch.where(left > LEAST, fresh / left.clamp_min(LEAST).sqrt(), 0.0)
        directions[:, step] = fresh
        residual = residual - fresh * (residual.gather(1, chosen) / left.clamp_min(LEAST).sqrt())
        norms -= fresh.square()
    return taken.nonzero()[:, 1].view(m, steps)


def coded(correlations: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The least-squares values (m, s) of each row at its ``columns`` (m, s), in the dtype of what is given."""
    systems = gram[columns[:, :, None], columns[:, None, :]]  # (m, s, s)
    precision = torch.finfo(gram.dtype)
    damping = max(DAMPING, 100 * precision.eps)  # atoms that coincide leave nothing in fp32
    scale = systems.diagonal(dim1=1, dim2=2).mean(1) * damping + precision.tiny
    systems.diagonal(dim1=1, dim2=2).add_(scale[:, None])
    return torch.cholesky_solve(correlations.gather(1, columns)[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
