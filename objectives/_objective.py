"""What an objective is, and the registry."""

from __future__ import annotations

from typing import Protocol

from rankfront.methods import Cost, InputError, check_choice
from rankfront.objectives._subject import Subject

WORST = 1.1  # times dense, of a size or a time: a plan that leaves one as it was still counts for what else it does


class Objective(Protocol):
    """A model or a plan in, one number out. Smaller is better, everywhere.

    Attributes:
        name: as the study file has it.
        unit: of the value.
        logarithmic: whether the hypervolume measures its axis in logarithms, as befits an exponential of a loss.
    """

    name: str
    unit: str
    logarithmic: bool

    def value(self, subject: Subject) -> float:
        """The objective's value for the model that ``subject`` holds."""

    def from_cost(self, cost: Cost) -> float | None:
        """The value where the plan alone decides it; None where it has to be measured."""

    def box(self, dense: float) -> tuple[float, float]:
        """(ideal, reference) for the hypervolume, given the dense model's value.

        The reference is the worst value that still counts; the ideal, the best one conceivable.
        """


class Size:
    """Of an objective whose values are sizes: its axis runs from nothing to somewhat above dense, evenly."""

    logarithmic = False

    def box(self, dense: float) -> tuple[float, float]:
        """(ideal, reference): see `Objective`."""
        return 0.0, WORST * dense


OBJECTIVES: dict[str, type[Objective]] = {}


def register(objective: type[Objective]) -> type[Objective]:
    """Add an objective class under its name; raises ValueError where the name is taken."""
    if objective.name in OBJECTIVES:
        raise ValueError(f"an objective named {objective.name!r} is already registered: choose another name")
    OBJECTIVES[objective.name] = objective
    return objective


def make_objective(name: str, settings: dict[str, object]) -> Objective:
    """The objective ``name`` with its settings; `InputError` on an unknown name or setting."""
    check_choice("objective", name, OBJECTIVES)
    kind = OBJECTIVES[name]
    known = list(getattr(kind, "__dataclass_fields__", {}))
    for key in settings:
        if not known:
            raise InputError(f"objective {name!r} has no settings, and [objectives.{name}] sets {key!r}: remove it")
        check_choice(f"key in [objectives.{name}]", key, known)
    return kind(**settings)
