"""Several processes that heal one model together, each on a device of its own: data-parallel, by accelerate.

Every process holds both models and goes through its share of each batch; gradients are summed over processes before a
step, so that all of them make the same one. Alone, nothing of this runs and accelerate is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class Processes:
    """This process among those that `accelerate launch` or `torchrun` started.

    Attributes:
        rank, count: its number, and how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and tells."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """``asked``, or this process's own GPU."""
        return str(self._state.device) if self._state is not None and asked in ("auto", "cuda") else asked

    def share(self, rows: Tensor) -> Tensor:
        """Every ``count``-th of rows (n, …), from this one's number on."""
        return rows[self.rank :: self.count]

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of ``parameters`` over all processes, in place; none counts as zeros."""
        if self._state is None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.add(parameter.grad)

    def add(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over all processes, in place."""
        if self._state is not None:
            torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of ``value`` over all processes."""
        if self._state is None:
            return value
        from accelerate.utils import reduce

        found = reduce(torch.tensor(value, dtype=torch.float64, device=self._state.device), "sum")
        return float(found)

    def one_by_one(self, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, called by the first process, then by the others: they find what it left on disk."""
        made = make() if self.first else None
        self.wait()
        found = make() if made is None else made
        self.wait()
        return found

    def end(self) -> None:
        """Leave the others, for good."""
        if self._state is not None:
            self._state.destroy_process_group()

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()
