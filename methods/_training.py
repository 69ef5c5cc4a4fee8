"""How factors are scaled before they train, and after a step of it: what they multiply to stays as it is.

Ŵ = LR = (LQ)(Q⁻¹R) for every invertible Q, and a gradient step moves Ŵ by −η (G RᵀR + LLᵀ G): which of the two factors
moves it depends on their scale. Of equal norms, component by component, both move it alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_scale(left: Tensor, right: Tensor) -> Tensor:
    """s (r,) with which columns of left (m, r) times s and rows of right (r, n) over s have equal norms."""
    tiny = torch.finfo(torch.float32).tiny
    scale: Tensor = (right.norm(dim=1).clamp_min(tiny) / left.norm(dim=0).clamp_min(tiny)).sqrt()
    return scale


@torch.no_grad()
def balance_pair(left: Tensor, right: Tensor) -> None:
    """Scale columns of ``left`` (m, r) and rows of ``right`` (r, n) in place, so that ‖left_:k‖ = ‖right_k:‖.

    A component of which one side is zero stays as it is: scaled, neither side could train.
    """
    scale = balance_scale(left, right)
    scale = torch.where((left.norm(dim=0) > 0) & (right.norm(dim=1) > 0), scale, torch.ones_like(scale))
    left.mul_(scale)
    right.div_(scale[:, None])


@torch.no_grad()
def balance_cores(cores: Sequence[Tensor]) -> None:
    """Scale the tensors of a product in place, so that all have the geometric mean of their norms."""
    norms = torch.stack([core.norm() for core in cores])
    if bool((norms > 0).all()):
        mean = norms.log().mean().exp()
        for core, norm in zip(cores, norms, strict=True):
            core.mul_(mean / norm)


@torch.no_grad()
def unit_rows(atoms: Tensor) -> Tensor:
    """Scale rows of ``atoms`` (k, n) in place to norm 1, rows of zeros left out; their norms before, (k,)."""
    norms = atoms.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    atoms.div_(norms[:, None])
    return norms
