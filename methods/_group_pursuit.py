"""Sparse coding with as many nonzeros in every group of atoms: orthogonal matching pursuit for all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5  # of an atom's squared norm, in fp32: what is less outside of those chosen counts as nothing
DAMPING = 1e-9  # of the mean squared norm of a row's atoms, so that atoms that coincide do not ask for huge values
ROWS_AT_ONCE = 1536  # a few MB of directions: enough to be fast, little enough for the processor's cache


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
    residual, norms, closed = residual.clone(), torch.ones_like(residual), torch.zeros_like(residual)  # −∞ where closed
    taken = torch.zeros(m, k, dtype=torch.bool, device=residual.device)
    directions = residual.new_empty(m, steps, k)
    inside = torch.arange(group, device=residual.device)
    count = torch.zeros(m, k // group, dtype=torch.long, device=residual.device)  # of atoms taken, by group
    one = torch.ones_like(count[:, :1])
    for step in range(steps):
        chosen = torch.addcdiv(closed, residual.square(), norms.clamp_min(LEAST)).argmax(1, keepdim=True)  # (m, 1)
        taken.scatter_(1, chosen, True)
        closed.scatter_(1, chosen, -torch.inf)
        if group < k:
            own = chosen // group
            count.scatter_add_(1, own, one)
            full = torch.where(count.gather(1, own) == nonzeros, -torch.inf, 0.0)
            closed.scatter_add_(1, own * group + inside, full.expand(-1, group))
        earlier, fresh = directions[:, :step], cosines[chosen[:, 0]]
        if step:
            known = earlier.gather(2, chosen[:, :, None].expand(-1, step, 1))  # (m, step, 1)
            fresh = torch.baddbmm(fresh[:, None], known.mT, earlier, alpha=-1)[:, 0]
        left = norms.gather(1, chosen)
        inverse = torch.where(left > LEAST, left.clamp_min(LEAST).rsqrt(), 0.0)
        fresh = torch.mul(fresh, inverse, out=directions[:, step])
        residual.addcmul_(fresh, residual.gather(1, chosen) * inverse, value=-1)
        norms.addcmul_(fresh, fresh, value=-1)
    return taken.nonzero()[:, 1].view(m, steps)


def coded(correlations: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The least-squares values (m, s) of each row at its ``columns`` (m, s), in the dtype of what is given."""
    systems = gram[columns[:, :, None], columns[:, None, :]]  # (m, s, s)
    precision = torch.finfo(gram.dtype)
    damping = max(DAMPING, 100 * precision.eps)  # atoms that coincide leave nothing in fp32
    scale = systems.diagonal(dim1=1, dim2=2).mean(1) * damping + precision.tiny
    systems.diagonal(dim1=1, dim2=2).add_(scale[:, None])
    return torch.cholesky_solve(correlations.gather(1, columns)[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
