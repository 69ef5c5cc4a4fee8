"""Modules that keep something else to run than what they store: sparse factors made dense, weights multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Unpacked(nn.Module):
    """A module that keeps a dense matrix beside what it is stored as.

    Where gradients are wanted for what is stored, and while a graph is compiled, the matrix is made at every call.
    Otherwise it is kept until what it was made of changes or moves. What is kept is neither saved nor copied. Writing
    through ``.data``, which leaves no trace, is the one change that goes unnoticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keep_as: Callable[[Tensor], Tensor] | None = None
        self._kept: tuple[list[tuple[Tensor, int, int]], Tensor] | None = None

    @property
    def unpacked(self) -> bool:
        """Whether it keeps one now."""
        return self._kept is not None

    def kept(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """What ``make`` makes of ``sources``."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(each.requires_grad for each in sources)):
            return make()
        if self._kept is not None:
            stamps, dense = self._kept
            for source, (known, version, address) in zip(sources, stamps, strict=True):
                if source is not known or source._version != version or source.data_ptr() != address:
                    break
            else:
                return dense
        if any(source.is_inference() for source in sources):  # whose changes nobody counts
            return make()
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a backward pass later
            dense = make() if self._keep_as is None else self._keep_as(make())
        self._kept = [(source, source._version, source.data_ptr()) for source in sources], dense
        return dense

    def keep_as(self, layout: Callable[[Tensor], Tensor] | None) -> None:
        """Bring what is kept into a ``layout`` that linear products read; None: leave it plain."""
        if layout is not self._keep_as:
            self._keep_as, self._kept = layout, None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
