"""Hidden states on their way through the blocks of a model: what enters the first, and every block run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL, Task


class _Reached(Exception):
    """The module that was waited for has been called."""


class Call:
    """What a model calls a block with, beside the hidden states."""

    def __init__(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.arguments = tuple(arguments[1:])
        self.named = {name: value for name, value in named.items() if name != "hidden_states"}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block`` makes of hidden states (B, L, d): those after it."""
        return _first(block(hidden, *self.arguments, **self.named))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def calls_of(model: Any, found: Iterable[nn.Module], ids: Tensor, task: Task = CAUSAL) -> list[Call]:
    """What ``model`` calls each of the blocks ``found`` with on ids (B, L): the same for every batch of that shape.

    Raises `InputError` unless each is called once and reads what the one before gives: in XLM attentions run between
    the blocks, HRM calls one several times, Mllama none of those for images.
    """
    blocks, calls = list(found), list[Call]()
    called: list[nn.Module] = []
    before: list[Tensor] = []
    followed = True

    def enter(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal followed
        hidden = given[0] if given else named["hidden_states"]
        followed &= all(torch.equal(each.to(hidden.device), hidden) for each in before)
        called.append(block)
        calls.append(Call(given, named))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        before[:] = [_first(output).clone()]  # what follows may add to it in place

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        task.logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    if called != blocks or not followed:
        raise InputError(
            f"the {len(blocks)} blocks of {type(model).__name__} are no chain ({len(calls)} calls): a refit and healing"
            " by blocks need each to read what the one before gives, so use --refit none, --stages logits"
        )
    return calls


def first_hidden(model: Any, block: nn.Module, ids: Tensor, task: Task = CAUSAL) -> Tensor:
    """The hidden states that enter the first ``block``."""
    return caught(block, lambda: task.logits(model, ids))


def caught(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What ``module`` is called with first within ``call``, which goes no further."""
    found = reached(module, call)
    if found is None:
        raise RuntimeError(f"a {type(module).__name__} is not called")
    return found


def reached(module: nn.Module, call: Callable[[], Any]) -> Tensor | None:
    """The same; None where it is not called, as experts are not that no token is given to."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(given[0] if given else named["hidden_states"])
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call()
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


def even_batches(windows: Tensor, most: int, device: str) -> list[Tensor]:
    """Windows (W, L) in batches of one size, the largest up to ``most`` that divides W."""
    size = next(count for count in range(min(max(1, most), len(windows)), 0, -1) if len(windows) % count == 0)
    return [batch.to(device) for batch in windows.split(size)]
