"""Backward passes without room for what they keep: of hidden states between blocks alone, each block run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankfront.methods.layers import weight_of
from rankfront.search.inputs.forwards import running_as
from rankfront.search.inputs.memory import ample
from rankfront.search.inputs.sites import blocks, is_linear

KEPT = 1.25  # times the inputs and outputs of linear layers that a backward pass keeps: 1.1 of smollm2-135m in bf16


def kept_bytes(model: nn.Module, tokens: int) -> float:
    """What a backward pass keeps of so many ``tokens`` at once, in bytes."""
    ends = ((getattr(module, "in_features", 0), getattr(module, "out_features", 0)) for module in model.modules())
    dense = (
        weight_of(module).shape
        for module in model.modules()
        if not hasattr(module, "in_features") and is_linear(module)
    )
    dtype = next(model.parameters()).dtype
    return KEPT * tokens * dtype.itemsize * sum(map(sum, (*ends, *dense)))


@contextmanager
def recomputed(model: Any, tokens: int) -> Iterator[None]:
    """Within, a backward pass of ``tokens`` at once that has no room for what it keeps runs each block again.

    Blocks run without a gradient first, and with one on the way back: forward hooks that pass over outputs without
    a gradient see each once. Gradients are the same.
    """
    with ExitStack() as stack:
        if not ample(kept_bytes(model, tokens), next(model.parameters()).device):
            for block in blocks(model)[1]:
                stack.enter_context(running_as(block, _again(block)))
        yield


def _again(block: nn.Module) -> Callable[..., Any]:
    """The forward of ``block``, run again on the way back."""
    own: Callable[..., Any] = block.forward

    def forward(*given: Any, **named: Any) -> Any:
        by_name = not given
        hidden = named["hidden_states"] if by_name else given[0]
        beside = (*given[1:], *(value for name, value in named.items() if not (by_name and name == "hidden_states")))
        if not hidden.requires_grad or any(isinstance(each, Tensor) and each.requires_grad for each in beside):
            return own(*given, **named)

        def run(states: Tensor) -> Any:
            return own(**{**named, "hidden_states": states}) if by_name else own(states, *given[1:], **named)

        return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

    return forward
