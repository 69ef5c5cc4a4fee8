"""Rounding a matrix to 8 or 4 bits, as `_packed_integers` stores it.

Scales and zeros are rounded to bf16 before anything is rounded with them, so what was measured is what runs, whichever
of the usual dtypes the model runs in.

To the nearest value, or by GPTQ: columns in order, each one's rounding error made good by those that follow, which is
Cholesky elimination with the inverse of the Gram C = Σ_t x_t x_tᵀ. Source: GPTQ (2210.17323), algorithm 1; damping as
published.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from rankfront.methods._packed_integers import MIDDLE, Integers, restored
from rankfront.methods._sizes import group_size, padded_width
from rankfront.methods._storage import Storage
from rankfront.methods._weighting import Gram, Unweighted, Weighting

LARGEST = {8: 127, 4: 15}
DAMPING = 0.01  # of the mean diagonal of C (GPTQ, section 4)
PADDED = "padded to what the kernels read it stores no less than the dense weight"
BLOCK = 128  # columns whose errors are carried on together; a whole number of groups
SMALLEST = 2.0**-120  # a step, so that a group of zeros has one


def rounded(weight: Tensor, bits: int, weighting: Gram | None = None) -> Integers:
    """W (m, n) to the nearest values; under a weighting by GPTQ, where that leaves less of ‖(W − Ŵ) S‖."""
    work = weight.double()
    nearest = _packed(*_swept(work, bits, None), bits)
    if weighting is None:
        return nearest
    calibrated = _packed(*_swept(work, bits, _elimination(weighting)), bits)

    def error(found: Integers) -> float:  # in fp32, which tells the two apart, at half of the time
        lost = (work - restored(found, bits, work.shape[1]).double()).float()
        return float(((lost @ weighting.single) * lost).sum())

    return calibrated if error(calibrated) <= error(nearest) else nearest


def rounded_factors(
    target: Tensor, left: Tensor, right: Tensor, bits: int, gram: Gram | None
) -> tuple[Integers, Integers]:
    """A (m, r) and B (r, n), both rounded, for T (m, n), L (m, r) of columns of norm 1 and R (r, n), in fp64.

    B is R rounded by GPTQ under C, without a Gram to the nearest; A is fitted to what B has become,

        A = L + (T − L B) C Bᵀ (G + λ I)⁻¹, G = B C Bᵀ,

    and rounded by GPTQ under G, which is the Gram of its inputs. So the second factor makes good what rounding the
    first has lost; the ridge, GPTQ's hundredth of G's mean diagonal, keeps it from large entries, which round badly.
    """
    weighting: Weighting = gram or Unweighted()
    first = rounded(right, bits, gram)
    rows = restored(first, bits, target.shape[1]).double()  # B (r, n)
    weighed = weighting.times_gram(rows)  # B C (r, n)
    inner = weighed @ rows.T  # G (r, r)
    ridge = DAMPING * inner.diagonal().mean() + torch.finfo(torch.float32).tiny
    lost = target @ weighed.T - left @ inner  # (m, r)
    damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return rounded(left + torch.linalg.solve(damped, lost.T).T, bits, Gram(inner)), first


def padded_away(own: Storage, dense: Storage) -> str | None:
    """Why rounding is refused where the padding takes all that it saves; None where it does not."""
    small = own.bytes(2) < dense.bytes(2)
    return None if small else PADDED


def _elimination(gram: Gram) -> Tensor:
    """The upper Cholesky factor of (C + damping)⁻¹, (n, n), kept as long as the Gram: levels share it."""
    if gram not in _KEPT:
        _KEPT[gram] = _made_elimination(gram.matrix.clone())
    return _KEPT[gram]


_KEPT: weakref.WeakKeyDictionary[Gram, Tensor] = weakref.WeakKeyDictionary()


def _made_elimination(gram: Tensor) -> Tensor:
    if not torch.isfinite(gram).all():
        raise ValueError(f"a Gram of shape {tuple(gram.shape)} has values that are not finite")
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _swept(weight: Tensor, bits: int, elimination: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q (m, n), and scales and zeros (m, groups), column by column where errors are carried on."""
    m, n = weight.shape
    group = n if bits == 8 else group_size(n)
    if elimination is None:
        parts = weight.split(group, 1)
        grids = [_grid(part, bits) for part in parts]
        found = zip(parts, grids, strict=True)
        q = torch.cat([_nearest(part, scale[:, None], zero[:, None], bits) for part, (scale, zero) in found], 1)
        scales, zeros = (torch.stack(sides, 1) for sides in zip(*grids, strict=True))
        return q, scales, zeros
    work = weight.T.contiguous()  # (n, m): a column of W in one run of memory
    q = torch.empty_like(work)
    grids = [_grid(weight, bits)] if bits == 8 else []
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty(stop - start, m, dtype=work.dtype, device=work.device)
        for column in range(start, stop):
            if bits != 8 and column % group == 0:
                grids.append(_grid(work[column : min(column + group, n)].T, bits))
            scale, zero = grids[-1]
            q[column] = _nearest(work[column], scale, zero, bits)
            value = q[column] * scale if bits == 8 else (q[column] - MIDDLE) * scale + zero
            error = (work[column] - value) / elimination[column, column]
            work[column + 1 : stop].addr_(elimination[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        work[stop:].addmm_(elimination[start:stop, stop:].T, errors, alpha=-1)
    scales, zeros = (torch.stack(sides, 1) for sides in zip(*grids, strict=True))
    return q.T, scales, zeros


def _grid(part: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (m,) of every row of W's columns ``part`` (m, g)."""
    if bits == 8:
        scale = _bf16((part.abs().amax(1) / LARGEST[8]).clamp_min(SMALLEST))
        return scale, torch.zeros_like(scale)
    low, high = part.amin(1), part.amax(1)
    scale = _bf16(((high - low) / LARGEST[4]).clamp_min(SMALLEST))
    return scale, _bf16(low + MIDDLE * scale)


def _nearest(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    q = ((values - zero) / scale).round()
    return q.clamp(-LARGEST[8], LARGEST[8]) if bits == 8 else (q + MIDDLE).clamp(0, LARGEST[4])


def _bf16(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def _packed(q: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Integers:
    padded = torch.nn.functional.pad(q, (0, padded_width(q.shape[1], bits) - q.shape[1]))
    if bits == 8:
        return Integers(padded.to(torch.int8).contiguous(), scales[:, 0].float())
    pairs = padded.to(torch.uint8).contiguous().unflatten(1, (-1, 2))
    return Integers(
        pairs[..., 0] | pairs[..., 1] << 4, torch.stack([scales, zeros], -1).movedim(0, 1).float().contiguous()
    )
