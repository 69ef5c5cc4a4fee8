"""Modules that keep something else to run than what they store: sparse factors made dense, weights multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfront.methods.integer_matrix import FactorModule


class Unpacked(FactorModule):
    """A module that keeps a dense matrix beside what it is stored as.

    Where gradients are wanted for what is stored, and while a graph is compiled, the matrix is made at every call.
    Otherwise it is kept until what it was made of changes or moves. What is kept is neither saved nor copied. Writing
    through ``.data``, which leaves no trace, is the one change that goes unnoticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keep_as: Callable[[Tensor], Tensor] | None = None
        self._kept: Made | None = None
        self._places: Made | None = None
        self._keep_places = False

    @property
    def unpacked(self) -> bool:
        """Whether it keeps one now."""
        return self._kept is not None

    def kept(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """What ``make`` makes of ``sources``."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(each.requires_grad for each in sources)):
            return make()
        if self._kept is not None and self._kept.still_of(sources):
            return self._kept.tensor
        if any(source.is_inference() for source in sources):  # whose changes nobody counts
            return make()
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a backward pass later
            dense = make() if self._keep_as is None else self._keep_as(make())
        self._kept = Made.of(sources, dense)
        return dense

    def places(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """Where values stand, which ``make`` unpacks from ``sources`` or draws: at every call, but while the module
        trains, when it would take longer than a step."""
        if not self._keep_places or torch.compiler.is_compiling():
            return make()
        if self._places is None or not self._places.still_of(sources):
            with torch.inference_mode(False):
                self._places = Made.of(sources, make())
        return self._places.tensor

    def keep_places(self, keep: bool) -> None:
        """Keep what `places` gives from now on, or no longer."""
        self._keep_places, self._places = keep, None

    def keep_as(self, layout: Callable[[Tensor], Tensor] | None) -> None:
        """Bring what is kept into a ``layout`` that linear products read; None: leave it plain."""
        if layout is not self._keep_as:
            self._keep_as, self._kept = layout, None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = self._places = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_places": None}


class Made(NamedTuple):
    """A tensor, and what it was made of: each with its version and address then. A tuple, for what a model holds is
    looked for in those."""

    tensor: Tensor
    stamps: tuple[tuple[Tensor, int, int], ...]

    @classmethod
    def of(cls, sources: Sequence[Tensor], tensor: Tensor) -> Made:
        return cls(tensor, tuple((source, source._version, source.data_ptr()) for source in sources))

    def still_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether ``sources`` are what it was made of, neither changed nor moved."""
        return all(
            source is known and source._version == version and source.data_ptr() == address
            for source, (known, version, address) in zip(sources, self.stamps, strict=True)
        )


@contextmanager
def places_kept(model: nn.Module) -> Iterator[None]:
    """Within, the modules of ``model`` keep where their values stand."""
    modules = [module for module in model.modules() if isinstance(module, Unpacked)]
    try:
        for module in modules:
            module.keep_places(True)
        yield
    finally:
        for module in modules:
            module.keep_places(False)
