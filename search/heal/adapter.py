"""A residual adapter beside every low-rank weight of a model: the one way of healing that stores more than before.

Source: WaRA (2506.24092). It starts at no change: up is zero, and down uniform, as in LoRA.
"""

from __future__ import annotations

from typing import Any

import torch

from rankfront.methods import InputError
from rankfront.methods.checkpoint import contents
from rankfront.methods.layers import set_module
from rankfront.methods.layers_adapted import AdaptedLinear
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.methods.layers_wavelet import even
from rankfront.search.measure.joining import separate

MOMENTS = 1  # of the wavelet: Haar's


def adapt(model: Any, rank: int, seed: int) -> int:
    """Put an adapter of ``rank`` beside every low-rank weight of an export that was loaded; how many values that adds:
    k (⌈m/2⌉ + ⌈n/2⌉) a weight (m, n).

    Weights that are tied to others stay as they are. Raises `InputError` where there is none to put it beside.
    """
    separate(model.modules())
    described: Any = contents(model.config)
    tied = {name.rpartition(".")[0] for pair in described["tied"].items() for name in pair}
    chosen = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LowRankLinear) and module.in_full and path in described["modules"] and path not in tied
    }
    if not chosen:
        raise InputError("an adapter stands beside low-rank weights and the plan has none: leave --adapter out")
    generator, added = torch.Generator().manual_seed(seed), 0
    for path, module in chosen.items():
        outputs, inputs = even(module.out_features) // 2, even(module.in_features) // 2
        up = module.left.new_zeros(outputs, rank)
        down = ((2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5).to(up)
        set_module(model, path, AdaptedLinear(module.left, module.right, up, down, module.bias, MOMENTS))
        described["modules"][path] |= {"kind": "low-rank-adapted", "adapter": rank, "moments": MOMENTS}
        added += up.numel() + down.numel()
    described["joined"] = [group for group in described["joined"] if chosen.keys().isdisjoint(group["modules"])]
    return added
