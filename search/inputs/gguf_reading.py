"""GGUF files as transformers opens them, each of them read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
import numpy as np


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # of a library without types
    """On a plain array in the place of a memory map: of a vocabulary it takes millions of slices, and each of a map
    takes microseconds more."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def read_once() -> Iterator[None]:
    """Within, a GGUF file is read once, and an architecture's names of tensors are made once.

    transformers reads the whole file for the configuration, for the weights and for the tokenizer, and makes all names
    for each module of the model.
    """
    theirs = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_Reader), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = theirs
