"""Sparse coding by orthogonal matching pursuit and dictionaries by K-SVD, for many signals at once."""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES = 2**26  # of the triangular factors held at once, 256 MiB in fp32
LEAST = 1e-6  # of an atom's squared norm: what is left of it beside those chosen, below which it adds nothing


def pursuit(y: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: coefficients (m, k) and their mask, for signals Y (m, q) and unit atoms D (k, q).

    s times, each signal takes the atom that its residual has most of, and its coefficients become the least-squares
    ones. Batches of signals in the domain of inner products, with the inverse Cholesky factor F of the chosen atoms'
    Gram growing by a column a step: Fᵀ G F = I, so that the new direction alone changes the residual.
    Source: Batch-OMP (Rubinstein et al. 2008) [M]. Memory: a batch's F, (batch, s, s).
    """
    gram = dictionary @ dictionary.T
    step = max(1, ENTRIES // nonzeros**2)
    parts = [_pursue(part @ dictionary.T, gram, nonzeros) for part in y.split(step)]
    coefficients, chosen = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    dense = torch.zeros(len(y), len(dictionary), dtype=y.dtype, device=y.device)
    return dense.scatter(1, chosen, coefficients), dense.bool().scatter(1, chosen, True)


def _pursue(products: Tensor, gram: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Coefficients (m, s) and chosen atoms (m, s), from Y Dᵀ (m, k) and D Dᵀ (k, k)."""
    m, rows = len(products), torch.arange(len(products), device=products.device)
    factor = products.new_zeros(m, nonzeros, nonzeros)
    along = products.new_zeros(m, nonzeros)
    chosen = torch.zeros(m, nonzeros, dtype=torch.long, device=products.device)
    free = torch.ones_like(products, dtype=torch.bool)
    residual = products.clone()
    for j in range(nonzeros):
        new = residual.abs().masked_fill(~free, -1).argmax(1)  # (m,)
        free[rows, new] = False
        shared = factor[:, :j, :j].mT @ gram[new[:, None], chosen[:, :j], None]  # (m, j, 1)
        left = gram[new, new] - shared.square().sum((1, 2))
        scale = torch.where(left > LEAST, left.clamp_min(LEAST).rsqrt(), 0)  # an atom among those chosen adds nothing
        factor[:, :j, j] = -(factor[:, :j, :j] @ shared)[:, :, 0] * scale[:, None]
        factor[:, j, j] = scale
        chosen[:, j] = new
        direction = torch.zeros_like(products).scatter(1, chosen[:, : j + 1], factor[:, : j + 1, j])
        along[:, j] = (direction * products).sum(1)
        residual -= along[:, j, None] * (direction @ gram)
    return (factor @ along[:, :, None])[:, :, 0], chosen


def update_atoms(y: Tensor, coefficients: Tensor, mask: Tensor, dictionary: Tensor, powers: int) -> None:
    """One K-SVD sweep in place, A (m, k) on its ``mask`` and D (k, q): each atom and its coefficients in turn.

    Both become the leading pair of the residual E without that atom, over the signals that use it: d ← Eᵀ E d,
    normalised, ``powers`` times, then a = E d. Source: K-SVD (Aharon et al. 2006), power iterations as in CoSpaDi.
    """
    residual = y - coefficients @ dictionary
    for j, atom in enumerate(dictionary):
        users = mask[:, j].nonzero()[:, 0]
        own = residual[users] + coefficients[users, j, None] * atom  # E (users, q)
        found = atom.clone()
        for _ in range(powers):
            moved = (own @ found) @ own
            norm = moved.norm()
            found = torch.where(norm > 0, moved / norm, found)
        along = own @ found
        residual[users] = own - along[:, None] * found
        coefficients[users, j] = along
        dictionary[j] = found
