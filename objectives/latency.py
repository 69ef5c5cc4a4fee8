"""Latency: prefill of a prompt and decode token by token, as ratios to dense, measured on the model itself.

Each round runs both models, taking turns at going first, so that a busy machine slows both; a ratio's value is the
median over rounds, its spread their interquartile range. The dense model's is 1, without a spread. Rounds go on until
the spread is below `STEADY` of the median, and no longer than the objective's ``seconds`` once it has its ``rounds``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from rankfront.methods import Cost, InputError, check_choice, shown
from rankfront.objectives._model_task import CAUSAL, Task
from rankfront.objectives._objective import WORST, register
from rankfront.objectives._subject import Subject

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ENGINES = ("openvino", "xllamacpp")  # beside the model as it is here
LONGEST = 3600  # seconds that one model may be timed for; a guess
STEADY = 0.03  # of the median


@dataclass(frozen=True)
class Run:
    """Seconds of one generation: the whole prompt at once, then one token after another."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class Engines(Protocol):
    """What runs generations in another engine: given prompts (batch, tokens) and how many tokens to decode."""

    def ours(self, engine: str, length: int) -> Callable[[Tensor, int], Run]:
        """Those of the model, of at most ``length`` tokens in all."""

    def dense(self, engine: str, length: int) -> Callable[[Tensor, int], Run]:
        """Those of the dense one."""


@dataclass
class Rounds:
    """Rounds of both models so far, for one batch, prompt and decode length.

    Attributes:
        pairs: makes one more round at every step.
        ours, dense: what each took.
        seconds: spent on all of them.
    """

    pairs: Iterator[tuple[Run, Run]]
    ours: list[Run] = field(default_factory=list)
    dense: list[Run] = field(default_factory=list)
    seconds: float = 0.0

    def more(self) -> None:
        """One more round."""
        started = time.perf_counter()
        ours, dense = next(self.pairs)
        self.seconds += time.perf_counter() - started
        self.ours.append(ours)
        self.dense.append(dense)

    def ratio(self, of: Callable[[Run], float]) -> tuple[float, float]:
        """Median and interquartile range of ours over dense."""
        ratios = np.array([of(a) / of(b) for a, b in zip(self.ours, self.dense, strict=True)])
        low, high = np.percentile(ratios, [25, 75])
        return float(np.median(ratios)), float(high - low)


@dataclass(frozen=True)
class Timed:
    """What the three have in common. Those of one study with the same lengths share their rounds.

    Attributes:
        batch: sequences at once.
        prompt: tokens a sequence starts with.
        decode: tokens generated after it; 0 where a forward pass of the prompt is all.
        rounds: pairs of runs, at least.
        seconds: after which no further round is begun to steady the ratio.
        compile: whether both models run through ``torch.compile``, with a static cache.
        prepack: whether both run with their weights prepacked, see `prepack`.
        engine: one of `ENGINES`, which both are written for and run in; None for transformers.
    """

    name = "timed"
    least_decoded: ClassVar[int] = 0
    unit = "ratio to dense"
    logarithmic = False

    batch: int = 1
    prompt: int = 128
    decode: int = 16
    rounds: int = 20
    seconds: float = 60.0
    compile: bool = False
    prepack: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("decode", self.least_decoded), ("rounds", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= 2**31:
                raise InputError(
                    f"objectives.{self.name}.{name} is {shown(value)}: it must be a whole number from {least} to 2^31"
                )
        if type(self.seconds) not in (int, float) or not 0 <= self.seconds <= LONGEST:
            raise InputError(
                f"objectives.{self.name}.seconds is {shown(self.seconds)}: it must be a number from 0 to {LONGEST}"
            )
        for name in ("compile", "prepack"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise InputError(f"objectives.{self.name}.{name} is {value!r}: it must be true or false")
        if self.compile and self.prepack:
            raise InputError(
                f"objectives.{self.name} has compile and prepack, and compiled graphs read plain weights: choose one"
            )
        if self.engine is not None:
            check_choice(f"objectives.{self.name}.engine", self.engine, ENGINES)
            if self.compile or self.prepack:
                raise InputError(f"objectives.{self.name}.engine runs in its own way: leave out compile and prepack")
            if self.engine == "xllamacpp" and self.batch > 1:
                raise InputError(f"objectives.{self.name}.batch is {self.batch} and xllamacpp runs one: set batch = 1")

    @staticmethod
    def of(run: Run) -> float:
        """The seconds that count."""
        raise NotImplementedError

    def value(self, subject: Subject) -> float:
        with subject.clock.phase("latency"):
            rounds = self._rounds(subject)
        value, spread = rounds.ratio(self.of)
        subject.notes |= {f"{self.name}_spread": spread, **self.notes(rounds)}
        return value

    def notes(self, rounds: Rounds) -> dict[str, float]:
        """Figures that go with the value; absolute ones for orientation only."""
        raise NotImplementedError

    def _rounds(self, subject: Subject) -> Rounds:
        key = (self.batch, self.prompt, self.decode, self.compile, self.prepack, self.engine)
        if key not in subject.timings:
            subject.timings[key] = Rounds(self._pairs(subject))
        rounds: Rounds = subject.timings[key]
        if not self._enough(rounds):
            with self._laid_out(subject):
                while not self._enough(rounds):
                    rounds.more()
        return rounds

    def _enough(self, rounds: Rounds) -> bool:
        """Whether these rounds settle the ratio, or have taken as long as they may."""
        if len(rounds.ours) < self.rounds:
            return False
        value, spread = rounds.ratio(self.of)
        return rounds.seconds >= self.seconds or spread < STEADY * value

    @contextmanager
    def _laid_out(self, subject: Subject) -> Iterator[None]:
        """Within, both models' weights are as the rounds want them."""
        if not self.prepack:
            yield
            return
        from rankfront.methods import prepack, undo_prepack

        as_dense = subject.dense or nullcontext
        try:
            prepack(subject.model)
            with as_dense():
                prepack(subject.model)
            yield
        finally:
            undo_prepack(subject.model)
            with as_dense():
                undo_prepack(subject.model)

    def prompts(self, windows: Tensor, device: torch.device) -> Tensor:
        """Token ids (batch, prompt) out of ``windows``, over and over where they are few."""
        ids, need = windows.flatten(), self.batch * self.prompt
        return ids.repeat(-(-need // len(ids)))[:need].view(self.batch, self.prompt).to(device)

    def runner(self, model: nn.Module, task: Task = CAUSAL) -> Callable[[Tensor], Run]:
        """What times one generation from prompts (batch, prompt), or a forward pass of them where none goes on."""
        from rankfront.objectives._generation import compiled, generate, generate_compiled, read

        if not task.generates:
            return partial(read, compiled(model) if self.compile else model)
        if self.compile:
            return partial(generate_compiled, compiled(model), model, decode=self.decode)
        return partial(generate, model, decode=self.decode)

    def _pairs(self, subject: Subject) -> Iterator[tuple[Run, Run]]:
        ids = self.prompts(subject.windows, next(subject.model.parameters()).device)
        ours, dense = self._runners(subject, ids)
        if dense is None:
            ours()  # warm-up
            while True:
                alike = ours()
                yield alike, alike
        ours(), dense()  # warm-up
        while True:
            own = ours()
            yield own, dense()
            other = dense()
            yield ours(), other

    def _runners(self, subject: Subject, ids: Tensor) -> tuple[Callable[[], Run], Callable[[], Run] | None]:
        """What runs one generation of the model, and of the dense one where that is another."""
        as_dense = subject.dense
        if self.engine is not None:
            assert subject.engines is not None
            lengths = self.engine, self.prompt + self.decode
            dense = partial(subject.engines.dense(*lengths), ids.cpu(), self.decode)
            return (
                (dense, None)
                if as_dense is None
                else (
                    partial(subject.engines.ours(*lengths), ids.cpu(), self.decode),
                    dense,
                )
            )
        run = partial(self.runner(subject.model, subject.task), ids)
        if as_dense is None:
            return run, None

        def dense_run() -> Run:
            with as_dense():
                return run()

        return run, dense_run

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return 0.0, WORST


@register
@dataclass(frozen=True)
class Latency(Timed):
    """Median over rounds of compressed seconds over dense seconds for one prompt and its continuation.

    So the mix of prefill and decode is that of the lengths chosen. The notes ``latency_prefill``, ``latency_decode``
    (ratios), ``latency_spread`` and ``latency_dense_ms`` (median) go with the value.
    """

    name = "latency"

    @staticmethod
    def of(run: Run) -> float:
        return run.total

    def notes(self, rounds: Rounds) -> dict[str, float]:
        found = {"latency_prefill": rounds.ratio(lambda run: run.prefill)[0]}
        if self.decode:
            found["latency_decode"] = rounds.ratio(lambda run: run.decode)[0]
        return found | {"latency_dense_ms": 1000 * float(np.median([run.total for run in rounds.dense]))}


@register
@dataclass(frozen=True)
class LatencyPrefill(Timed):
    """The same for the prompt alone; notes ``latency_prefill_spread`` and ``latency_prefill_tokens_per_second``."""

    name = "latency_prefill"

    @staticmethod
    def of(run: Run) -> float:
        return run.prefill

    def notes(self, rounds: Rounds) -> dict[str, float]:
        seconds = float(np.median([run.prefill for run in rounds.ours]))
        return {"latency_prefill_tokens_per_second": self.batch * self.prompt / seconds}


@register
@dataclass(frozen=True)
class LatencyDecode(Timed):
    """The same for the tokens after it; notes ``latency_decode_spread`` and ``latency_decode_ms``, of one step."""

    name = "latency_decode"
    least_decoded = 1

    @staticmethod
    def of(run: Run) -> float:
        return run.decode

    def notes(self, rounds: Rounds) -> dict[str, float]:
        return {"latency_decode_ms": 1000 * float(np.median([run.decode for run in rounds.ours])) / self.decode}
