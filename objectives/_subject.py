"""What objectives measure: a model with its plan applied, the dense one to compare with, tokens, exact cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rankfront.methods import Cost
from rankfront.objectives._clock import Clock
from rankfront.objectives._model_task import CAUSAL, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankfront.objectives._scores import Scores, Teacher
    from rankfront.objectives.latency import Engines


@dataclass
class Subject:
    """One model under measurement. Results that several objectives share are computed once.

    Attributes:
        model: with the plan applied, in evaluation mode.
        dense: a context manager within which ``model`` runs dense; None where it does so anyway.
        windows: token ids (W, L) of the split that is scored.
        teacher: the dense model's predictions on the same windows; None where no objective needs them.
        cost: what the plan stores.
        clock: where the seconds of each phase go.
        notes: figures that objectives leave beside their values.
        tokenizer: the model's; None where nobody gave one.
        timings: rounds of both models, by lengths and by how both run, for latencies to share.
        engines: what runs both models in other engines; None where nobody gave any.
        task: what the model is for.
    """

    model: nn.Module
    dense: Callable[[], AbstractContextManager[None]] | None
    windows: Tensor
    teacher: Teacher | None
    cost: Cost
    clock: Clock
    notes: dict[str, float] = field(default_factory=dict)
    tokenizer: Any = None
    timings: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    engines: Engines | None = None
    task: Task = CAUSAL

    @cached_property
    def scores(self) -> Scores:
        """Perplexity, and divergence where there is a teacher, from one pass over the windows."""
        from rankfront.objectives._scores import score

        with self.clock.phase("evaluate"):
            return score(self.model, self.windows, self.teacher, self.task, errors=self.task.labelled)
