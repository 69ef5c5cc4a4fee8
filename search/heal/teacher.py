"""What the dense model says of the next tokens: run beside, or its likeliest tokens from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rankfront.objectives import Teacher, teach
from rankfront.search.atomic import write_whole
from rankfront.search.heal.loss import Head, Target
from rankfront.search.heal.precision import Precision

TOP = 256  # of the vocabulary that a file keeps, and the rest's mass as one more outcome; training.md 5.7, a guess
BYTES = 6  # of each: an index in 32 bits, a logarithm in 16
FILE = "teacher.safetensors"


class Says(Protocol):
    """The dense model's distributions."""

    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        """Of windows ids (b, L), whose ``numbers`` (b,) are their places among all that are trained on."""


class Beside:
    """Runs the dense model for every batch."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self.head, self.precision = Head(model), precision

    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        with torch.no_grad(), self.precision.context():
            return Target(self.head, self.head.hidden(ids))


class Cached:
    """The `TOP` likeliest tokens of every position, in a file that is made at the first use."""

    def __init__(
        self, model: Any, windows: Tensor, folder: Path, precision: Precision, seen: Callable[[int, int], None]
    ) -> None:
        self.path = folder / FILE
        if not self.path.exists():
            with precision.context():
                parts = []
                for number, window in enumerate(windows):
                    parts.append(teach(model, window[None], TOP))
                    seen(number + 1, len(windows))
            tensors = {
                "indices": torch.cat([part.indices for part in parts]),
                "log_probabilities": torch.cat([part.log_probabilities for part in parts]).half(),
            }
            write_whole(self.path, save(tensors))
        self.file: Any = safe_open(self.path, "pt")
        self.indices, self.values = (self.file.get_slice(name) for name in ("indices", "log_probabilities"))

    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        indices, values = (
            torch.cat([part[int(number) : int(number) + 1] for number in numbers])
            for part in (self.indices, self.values)
        )
        return Target(cut=Teacher(indices, values.float()))


def cached_bytes(windows: int, length: int) -> int:
    """Bytes of the file."""
    return windows * (length - 1) * TOP * BYTES
