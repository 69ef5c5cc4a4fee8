"""A compressed model as its latency is measured: objectives, stopwatches, and which products are joined."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from rankfront.objectives.latency import Latency, Timed
from rankfront.search.factors.calibration import shared_inputs
from rankfront.search.inputs.device import DTYPES
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.engine_runs import EngineRuns
from rankfront.search.measure.joining import join_faster
from rankfront.search.measure.timing import Stopwatches
from rankfront.search.plans.latency_table import timed_objectives


class TimedModel:
    """What measures the latency of a compressed model.

    Attributes:
        objectives: name -> settings of every latency among the study's objectives.
    """

    def __init__(self, compressed: CompressedModel) -> None:
        self.compressed = compressed
        self.objectives: dict[str, Timed] = timed_objectives(compressed.setup.config.objectives)

    @property
    def tabulated(self) -> dict[str, Timed]:
        """Those that have a table: what runs here."""
        return {name: objective for name, objective in self.objectives.items() if objective.engine is None}

    @cached_property
    def engines(self) -> EngineRuns:
        """What runs models in other engines."""
        return EngineRuns(self.compressed)

    @property
    def prepacks(self) -> bool:
        """Whether weights run in the order that a CPU reads fastest, see `prepack`."""
        return any(objective.prepack for objective in self.objectives.values())

    @cached_property
    def watches(self) -> Stopwatches:
        setup = self.compressed.setup
        return Stopwatches(Path(setup.cache), setup.device, DTYPES[setup.dtype], self.prepacks)

    def join(self) -> list[dict[str, Any]]:
        """Run right factors that read the same input as one product where that is faster; what is joined.

        Nothing where weights are prepacked, each by itself, or factors are mapped: together they need memory.
        """
        if self.prepacks or not self.compressed.copies:
            return []
        lengths = next(iter(self.objectives.values()), Latency())
        return join_faster(self.compressed.modules, self._inputs, lengths, self.watches)

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """Path of every linear -> path of the first that reads the same input."""
        compressed, setup = self.compressed, self.compressed.setup
        linears = [path for path, module in compressed.dense_modules.items() if not isinstance(module, nn.Embedding)]
        with compressed.dense():
            return shared_inputs(compressed.model, linears, setup.tokens["search"][:1, :8].to(setup.device), setup.task)
