"""What trains while a model heals: the base of every method, which trains the factors as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, cast

from torch import Tensor, nn

from rankfront.search.heal.fit import Fit
from rankfront.search.heal.trainable import Parameter, normalise, normalised


class Arm:
    """Factors, smaller dense weights, norms and biases, as they are stored.

    Attributes:
        model: what is trained, or the block of it.
        dense: the same of the dense model.
        parameters: that train.
        projected: modules whose factors are normalised after every step.
        fit: takes the steps, once there is one.
        lasso: the strength of a penalty that the user sets, where there is one.
        first_alone: whether the first stage is trained so and a second one by its factors.
        goes_back: whether training that has become worse than its start goes on from its best state.
    """

    name: ClassVar[str] = "factors"
    first_alone: ClassVar[bool] = False
    goes_back: ClassVar[bool] = True
    lasso: float = 0.0
    fit: Fit

    @classmethod
    def added(cls, model: nn.Module) -> int:
        """How many values train beside what ``model``, or a block of it, stores."""
        return 0

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Raise `NothingToHeal` where ``model`` stores nothing that this trains in a way of its own."""

    def __init__(self, model: nn.Module, dense: nn.Module, parameters: Sequence[Parameter], seed: int = 0) -> None:
        self.model, self.dense, self.seed = model, dense, seed
        self.parameters = self.chosen(parameters)
        names = {id(parameter.tensor) for parameter in self.parameters}
        self.projected = [
            module
            for module in normalised(model)
            if any(id(tensor) in names for tensor in cast(nn.Module, module).parameters())
        ]

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What trains of what may train."""
        return list(parameters)

    @property
    def storable(self) -> bool:
        """Whether the model runs as it would be stored now: only then may it be the best state."""
        return True

    @classmethod
    def views(cls, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """Within each, ``model`` runs as it is judged: its held-out divergence is the mean over them."""
        return (nullcontext(),)

    def cost(self) -> float:
        """What counts beside held-out divergence where the best state is chosen."""
        return 0.0

    def prepare(self, windows: Tensor) -> None:
        """Called before the first step, with the windows (W, L) that the whole model is trained on."""

    def before(self, step: int, steps: int) -> None:
        """Called before the forward pass of each step."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
        return None

    def after(self, step: int, steps: int) -> None:
        """Called after each step of the optimiser."""
        normalise(self.projected)

    def finish(self) -> None:
        """Merge what was added into what is stored."""
