"""A model run a stretch of its blocks at a time: hidden states wait between them, so that each block is read once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import Site
from rankfront.objectives import Task
from rankfront.search.inputs.forwards import running_as
from rankfront.search.inputs.memory import ample
from rankfront.search.inputs.sites import blocks
from rankfront.search.inputs.source import cache_folder


class _Ended(Exception):
    """The block after the stretch was called."""


@dataclass(frozen=True)
class Span:
    """Blocks ``start`` to before ``stop``, counting what follows them as one more."""

    start: int
    stop: int


class Stretches:
    """The blocks of a model, which may be run by stretches.

    Attributes:
        model: the whole.
        prefix: path of the list of its blocks.
        blocks: these.
    """

    def __init__(self, model: Any, task: Task) -> None:
        self.model, self.task = model, task
        self.prefix, found = blocks(model)
        self.blocks = list(found)
        self.tuples = False  # whether blocks give what they make as the first of a tuple

    def span(self, sites: Sequence[Site]) -> Span:
        """What has to run for the inputs of ``sites``: all of it where one is neither in a block nor the head."""
        head = self.model.get_output_embeddings()
        places = []
        for path in (path for site in sites for weight in site.measured for path in (weight.path, *weight.shared)):
            if path.startswith(f"{self.prefix}."):
                places.append(int(path.removeprefix(f"{self.prefix}.").partition(".")[0]))
            elif self.model.get_submodule(path) is head:
                places.append(len(self.blocks))
            else:
                places += [0, len(self.blocks)]
        return Span(min(places), max(places) + 1)

    @property
    def end(self) -> int:
        """Beyond what follows the blocks."""
        return len(self.blocks) + 1

    def resumes(self, ids: Tensor, starts: Sequence[int]) -> bool:
        """Whether the model gives the very same logits on ``ids`` (b, L) where it goes on from each of ``starts``.

        Not so where blocks run several times, or read more of those before them than hidden states.
        """
        called: list[nn.Module] = []

        def leave(block: nn.Module, _: Any, output: Any) -> None:
            called.append(block)
            self.tuples = not isinstance(output, Tensor)

        entered: dict[int, Tensor] = {}
        seen = {start: partial(_copy_to, entered, start) for start in starts}
        try:
            with torch.no_grad():
                with ExitStack() as stack:
                    for block in self.blocks:
                        stack.callback(block.register_forward_hook(leave).remove)
                    wanted = self.run(ids, Span(0, self.end), seen=seen)
                return called == self.blocks and all(
                    torch.equal(self.run(ids, Span(at, self.end), entered[at]), wanted) for at in starts
                )
        except Exception:  # noqa: BLE001 - a model's own code fails in ways of its own without what its blocks note
            return False

    def run(
        self, ids: Tensor, span: Span, hidden: Tensor | None = None, seen: Mapping[int, Callable[[Tensor], Any]] = {}
    ) -> Tensor:
        """What enters the block after the ``span``, or the logits of ``ids`` (b, L) where that is the `end`.

        ``hidden`` states enter its first block; None where that is the model's first. What enters the blocks of
        ``seen`` is shown to them.
        """
        ended: list[Tensor] = []

        def end(given: Tensor) -> None:
            ended.append(given)
            raise _Ended

        with ExitStack() as stack:
            if hidden is not None:
                given = (hidden,) if self.tuples else hidden
                for block in self.blocks[: span.start]:
                    stack.enter_context(running_as(block, lambda *_, **__: given))
            for number, show in [*seen.items(), *([] if span.stop == self.end else [(span.stop, end)])]:
                stack.callback(self._entering(number, show))
            try:
                return self.task.logits(self.model, ids)
            except _Ended:
                return ended[0]

    def _entering(self, number: int, show: Callable[[Tensor], Any]) -> Callable[[], None]:
        """Have ``show`` hear of what enters a block, or leaves the last one, until what is returned is called."""

        def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            show(given[0] if given else named["hidden_states"])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            show(output if isinstance(output, Tensor) else output[0])

        if number < len(self.blocks):
            return self.blocks[number].register_forward_pre_hook(enter, with_kwargs=True).remove
        return self.blocks[-1].register_forward_hook(leave).remove


def _copy_to(entered: dict[int, Tensor], number: int, hidden: Tensor) -> None:
    """Copied, for the model may add to it in place."""
    entered[number] = hidden.clone()


def parked(hidden: Tensor, together: int) -> Tensor:
    """A copy of ``hidden`` on the CPU, one of several that are ``together`` bytes: in a file that has no name where
    these have no room, from which the system takes the memory back."""
    if ample(together, torch.device("cpu")):
        return hidden.detach().to("cpu", copy=True)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_folder()) as file:
        name = f"/proc/self/fd/{file.fileno()}"
        own = torch.from_file(name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
    return own.view(hidden.shape).copy_(hidden.detach())
