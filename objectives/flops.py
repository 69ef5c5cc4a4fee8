"""FLOPs: the arithmetic of one more token, in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rankfront.methods import Cost, InputError
from rankfront.objectives._objective import Size, register
from rankfront.objectives._subject import Subject

if TYPE_CHECKING:
    from torch import nn

DENSE = ("Linear", "Conv1D")
SLIDING = "sliding_attention"


@register
@dataclass(frozen=True)
class Flops(Size):
    """2 Σ multiply-adds of every matrix product for one token with ``context`` tokens to attend to, itself included.

    Σ over linears of mn, or of what a compressed weight multiplies as it runs, the output head too, and of E experts
    that a token is given to k of, k / E; and over attentions
    of 2 · heads · width · min(context, window), for scores and values. Heads that were thinned attend at full width.

    Attributes:
        context: tokens that the token attends to.
    """

    name = "flops"
    unit = "FLOPs/token"

    context: int = 512

    def __post_init__(self) -> None:
        if type(self.context) is not int or self.context < 1:
            raise InputError(f"objectives.flops.context is {self.context!r}: it must be a whole number of at least 1")

    def value(self, subject: Subject) -> float:
        linear = sum(_multiplications(module) - _idle(module) for module in subject.model.modules())
        ahead = not subject.task.generates  # an encoder's window has as many tokens after the token as before it
        attended = sum(
            min(self.context, window + ahead * (window + 1) if window else self.context)
            for window in _windows(subject.model)
        )
        heads, width = _heads(subject.model)
        return float(2 * (linear + 2 * heads * width * attended))

    def from_cost(self, cost: Cost) -> None:
        return None


def _multiplications(module: nn.Module) -> int:
    from rankfront.methods.layers import Factored, weight_of

    if type(module).__name__ in DENSE:
        return weight_of(module).numel()
    return cast(Factored, module).multiplications() if hasattr(module, "multiplications") else 0


def _idle(module: nn.Module) -> float:
    """Multiply-adds of the experts of a mixture that a token is not given to."""
    share = getattr(module, "share", 1.0)
    return (1 - share) * sum(map(_multiplications, module.modules())) if share < 1 else 0.0


def _config(model: nn.Module) -> Any:
    return cast(Any, model).config.get_text_config()


def _windows(model: nn.Module) -> Iterator[int | None]:
    """How far back each attention looks; None for all the way."""
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers  # without window, all the way
    for kind in kinds:
        yield window if kind == SLIDING else None


def _heads(model: nn.Module) -> tuple[int, int]:
    """Query heads of an attention, and their width."""
    config = _config(model)
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads
