"""Bytes: what the exported model's tensors take on disk."""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods import Cost
from rankfront.objectives._objective import Size, register
from rankfront.objectives._subject import Subject


@register
@dataclass(frozen=True)
class Bytes(Size):
    """Tensor bytes in the safetensors files of the export, in the dtype the trial ran in."""

    name = "bytes"
    unit = "bytes"

    def value(self, subject: Subject) -> float:
        return self.from_cost(subject.cost)

    def from_cost(self, cost: Cost) -> float:
        return float(cost.bytes)
