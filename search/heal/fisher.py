"""What an error of a residual stream's channels costs: the diagonal of E[g gᵀ] at every point where blocks are matched.

g is the gradient, at one token's hidden states, of Σ −log p(y) over the tokens that follow, the labels y drawn from the
dense model itself: E[g gᵀ] is the Fisher information there, the Hessian of KL(dense ‖ healed) at no error, tokens taken
as independent. BRECQ (2102.05426) weighs errors so, with labels of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.search.factors.gradient import drawn_loss
from rankfront.search.heal.loss import Head, run_by_run, runs_of
from rankfront.search.heal.precision import Precision
from rankfront.search.inputs.reached import differentiated

TOKENS = 16_384  # that one backward pass each goes over; guess
CLIPPED = 0.99  # quantile of the channels above which none weighs more

Point = tuple[int, str | None]  # a block, and the submodule of it that the stream enters; None: what leaves the block


def fisher(
    model: Any, blocks: list[nn.Module], points: Iterable[Point], windows: Tensor, precision: Precision, seed: int
) -> dict[Point, Tensor]:
    """Point -> mean of g² over the tokens of ``windows`` (W, L) but each window's first, (d,), clipped; fp32.

    One backward pass of the dense ``model`` a window, of which gradients of hidden states alone are kept.
    """
    device = next(model.parameters()).device
    sums: dict[Point, Tensor] = {}
    handles = [_watch(blocks[number], until, (number, until), sums) for number, until in points]
    head, generator = Head(model), torch.Generator().manual_seed(seed)
    chosen = windows[:: max(1, windows.numel() // TOKENS)]

    def drawn(states: Tensor) -> Iterator[Tensor]:
        for rows in runs_of(len(states), model.config.get_text_config().vocab_size, device.type):
            yield drawn_loss(head.logits(states[rows][None])[0].float(), generator)

    try:
        with differentiated(model):
            for ids in chosen.split(1):
                with precision.context():
                    run_by_run(head.hidden(ids.to(device)).flatten(0, 1), drawn)
    finally:
        for handle in handles:
            handle.remove()
    count = len(chosen) * (windows.shape[1] - 1)
    return {point: (total / count).clamp_max(torch.quantile(total / count, CLIPPED)) for point, total in sums.items()}


def _watch(block: nn.Module, until: str | None, point: Point, sums: dict[Point, Tensor]) -> Any:
    """A hook that adds g² of the hidden states that pass ``point`` to what ``sums`` has of it."""

    def arrived(gradient: Tensor) -> None:
        squares = gradient[:, 1:].float().square().sum((0, 1))
        sums[point] = sums[point] + squares if point in sums else squares

    def entered(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        watched(given[0] if given else named["hidden_states"])

    def left(module: nn.Module, given: Any, output: Any) -> None:
        watched(output[0] if isinstance(output, tuple) else output)

    def watched(hidden: Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(arrived)

    if until is None:
        return block.register_forward_hook(left)
    return block.get_submodule(until).register_forward_pre_hook(entered, with_kwargs=True)
