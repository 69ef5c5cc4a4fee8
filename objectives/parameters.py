"""Parameters kept, as fractions of dense: of the whole model, its block-linear weights alone, what one token reads."""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods import Cost
from rankfront.objectives._objective import Size, register
from rankfront.objectives._subject import Subject


@register
@dataclass(frozen=True)
class Parameters(Size):
    """Stored values of the exported model over the dense model's; index bits count at 16 bits a value."""

    name = "parameters"
    unit = "kept fraction"

    def value(self, subject: Subject) -> float:
        return self.from_cost(subject.cost)

    def from_cost(self, cost: Cost) -> float:
        return cost.parameters


@register
@dataclass(frozen=True)
class BlockParameters(Size):
    """The same over the matrices inside the blocks only, whether they can be treated or not, with the biases of those
    that can: the fraction that papers quote."""

    name = "block_parameters"
    unit = "kept fraction"

    def value(self, subject: Subject) -> float:
        return self.from_cost(subject.cost)

    def from_cost(self, cost: Cost) -> float:
        return cost.block_parameters


@register
@dataclass(frozen=True)
class ActiveParameters(Size):
    """Stored values that one token reads, over the dense model's: those of the k of E experts that it is given to, and
    all else; of experts alike, on average."""

    name = "active_parameters"
    unit = "kept fraction"

    def value(self, subject: Subject) -> float:
        return self.from_cost(subject.cost)

    def from_cost(self, cost: Cost) -> float:
        return cost.active_parameters
