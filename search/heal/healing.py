"""Healing a compressed model in memory, stage by stage, from checkpoint to checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError, check_choice, places_kept, undo_prepack
from rankfront.search.choices import Loss
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.arms import ARMS
from rankfront.search.heal.blocks import BlockWise
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.logits import EndToEnd, HeldOut
from rankfront.search.heal.loss import Head
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.processes import Processes
from rankfront.search.heal.scratch import everything
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.status import StageResult, Status
from rankfront.search.heal.teacher import Beside, Cached, Says, cached_bytes
from rankfront.search.heal.trainable import Parameter, balance, put_back, snapshot, stored, trainable, training
from rankfront.search.measure.joining import separate

BASE = "base."  # before the names, in a checkpoint of the last stage, of what was stored when it began
KEEP_EVERY = 60.0  # seconds between checkpoints of the last stage; guess
WRITES = 6.0  # seconds that one may take to write; where it takes longer, they are as many times rarer; guess
MOST_HELD_OUT = 2**14  # tokens that nothing is trained on; guess
LARGEST_CACHE = 4 * 10**9  # bytes of a teacher's file that `auto` makes; guess


Show = Callable[[Status], None]


class Healing:
    """One compressed model healed towards its dense one, in place.

    What a stage does is in `blocks` and `logits`. The class is long because it is what lies between them: both models,
    what trains and what is held out are prepared once, and a checkpoint of either stage is taken up here.

    Attributes:
        student: as it was loaded, its factors in the place of dense weights.
        teacher: the dense model; of training from scratch the model itself, which is not asked.
        windows: what it trains on (W, L); the last of them, a share, are held out.
        results: of the stages that are done.
    """

    stage_began = earlier = 0.0  # when this launch began the stage, and seconds that earlier ones spent in it

    def __init__(
        self,
        student: Any,
        teacher: Any,
        windows: Tensor,
        settings: HealSettings,
        keeper: Keeper,
        show: Show = lambda status: None,
    ) -> None:
        check_choice("heal method", settings.method, ARMS)
        self.settings, self.keeper, self.show = settings, keeper, show
        self.train, self.held = split_held_out(windows, settings.held_out)
        device = str(next(student.parameters()).device)
        self.precision = Precision(device, settings.dtype)
        for model in (student, teacher):
            undo_prepack(model)
        separate(student.modules())
        self.before = stored(student)
        self.dtypes = {name: tensor.dtype for name, tensor in student.named_parameters()}
        self.student, self.teacher = self.precision.prepared(student), self.precision.prepared(teacher)
        if not settings.from_scratch:
            balance(self.student)
        self.parameters: list[Parameter] = (everything if settings.from_scratch else trainable)(self.student)
        ARMS[settings.method].check(self.student)
        self.beside = Beside(self.teacher, self.precision)
        self.head = Head(self.student)
        self._check_heads()
        loss: Loss = "ce" if settings.from_scratch else "kl"
        self.held_out = HeldOut(self.beside, self.held, self.precision, loss)
        self.status = Status(settings.tokens, "cross-entropy" if settings.from_scratch else "divergence")
        self.results: list[StageResult] = []

    def _check_heads(self) -> None:
        ids = self.held[:1].to(next(self.student.parameters()).device)
        with self.precision.context():
            if not (self.head.whole(ids) and self.beside.head.whole(ids)):
                raise InputError(
                    f"{type(self.student).__name__} makes its logits of more than its last hidden states, which healing"
                    " has to make them of: this model cannot be healed"
                )

    def run(self) -> list[StageResult]:
        """Every stage, from where an earlier launch stopped; what is stored keeps its shapes and dtypes."""
        with places_kept(self.student):
            self._run_stages()
        for name, tensor in self.student.named_parameters():
            tensor.data = tensor.data.to(self.dtypes[name])
        if stored(self.student) != self.before:
            raise RuntimeError("healing changed what the model stores: a defect of rankfront")
        return self.results

    def _run_stages(self) -> None:
        self.began = time.monotonic()
        found = self.keeper.load()
        where: Mapping[str, Any] = found.where if found else {}
        tensors = found.tensors if found else {}
        self.results = [StageResult(**result) for result in where.get("results", [])]
        self.status.resumed = self.status.done = int(where.get("tokens", 0))
        if "first" in where:
            self.status.start = where["first"]
        else:
            self.status.start = self._held_out()
        self.status.now = self.results[-1].after if self.results else self.status.start
        untouched = self._snapshot()  # what blocks, always first, go back to where they have not helped
        if where.get("stage") == "logits":
            based = {name.removeprefix(BASE): value for name, value in tensors.items() if name.startswith(BASE)}
            put_back(self.student, self.parameters, based)
        elif tensors:
            put_back(self.student, self.parameters, tensors)
        for stage in self.settings.stages[len(self.results) :]:
            own = where if where.get("stage") == stage else {}
            before, self.stage_began = self.status.now, time.monotonic()
            self.earlier = float(own.get("seconds", 0.0))
            start = untouched if stage == "blocks" else self._snapshot()
            note = self._blocks(own) if stage == "blocks" else self._logits(own, tensors if own else {})
            after = self._held_out()
            if not after <= before:
                put_back(self.student, self.parameters, start)
                note = (
                    note
                    or f"it left the held-out {self.status.measure} at {after:.4g}, more than {before:.4g}: taken back"
                )
                after = before
            self.status.now = after
            seconds = self.earlier + time.monotonic() - self.stage_began
            self.results.append(StageResult(stage, self.settings.budget(stage), seconds, before, after, note))
            self._keep({"stage": "", "tokens": self.status.done}, self._snapshot())

    def _snapshot(self) -> dict[str, Tensor]:
        return snapshot(self.student, self.parameters)

    def _held_out(self) -> float:
        found = []
        for view in ARMS[self.settings.method].views(self.student):
            with view:
                found.append(self.held_out.mean(self.head))
        return fmean(found)

    def _keep(self, where: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if not Processes().first:
            return
        shared = {
            "results": [vars(result) for result in self.results],
            "first": self.status.start,
            "seconds": self.earlier + time.monotonic() - self.stage_began,
        }
        self.keeper.save({**shared, **where}, tensors)

    def _tell(self, stage: str, done: int, loss: float) -> None:
        self.status.stage, self.status.done, self.status.loss = stage, done, loss
        self.status.seconds = time.monotonic() - self.began
        self.show(self.status)

    def _blocks(self, where: Mapping[str, Any]) -> str | None:
        settings = self.settings
        windows = spread(self.train, settings.block_tokens // self.train.shape[1])
        wise = BlockWise(
            self.student,
            self.teacher,
            windows,
            self.held,
            settings,
            ARMS[settings.method],
            self.parameters,
            self.precision,
        )

        def after_block(done: int, ratio: float) -> None:
            tokens = settings.budget("blocks") * done // wise.count
            self._keep({"stage": "blocks", "blocks": done, "tokens": tokens}, self._snapshot())
            self._tell("blocks", tokens, ratio)

        return wise.run(int(where.get("blocks", 0)), after_block)

    def _logits(self, where: Mapping[str, Any], tensors: dict[str, Tensor]) -> str | None:
        settings, seen = self.settings, self.settings.tokens - self.settings.budget("logits")
        windows = spread(self.train, settings.budget("logits") // self.train.shape[1])
        base = {f"{BASE}{name}": value for name, value in self._snapshot().items()}
        kind = Arm if self.results and ARMS[settings.method].first_alone else ARMS[settings.method]
        arm = kind(self.student, self.teacher, self.parameters, settings.seed)
        arm.lasso = settings.lasso
        arm.prepare(windows)
        with training(arm.parameters):
            whole = EndToEnd(arm, self.head, self._teacher(windows), windows, settings, self.precision)
            whole.begin(self.status.now, where, tensors)
            kept, wrote = time.monotonic(), 0.0

            def after_step(loss: float) -> None:
                nonlocal kept, wrote
                tokens = seen + settings.budget("logits") * whole.fit.done // whole.steps
                if (began := time.monotonic()) - kept >= KEEP_EVERY * max(1.0, wrote / WRITES):
                    own, state = whole.state()
                    self._keep({"stage": "logits", "tokens": tokens, **own}, state | base)
                    kept = time.monotonic()
                    wrote = kept - began
                self._tell("logits", tokens, loss)

            return whole.run(self._looked_at, after_step)

    def _looked_at(self) -> float:
        self.status.now = self._held_out()
        return self.status.now

    def _teacher(self, windows: Tensor) -> Says:
        settings = self.settings
        size = cached_bytes(len(windows), windows.shape[1])
        passes = settings.budget("logits") / windows.numel()
        device = next(self.student.parameters()).device.type
        cached = settings.teacher == "cached" or (
            settings.teacher == "auto" and device == "cpu" and passes >= 2 and size <= LARGEST_CACHE
        )
        if settings.loss == "ce" or not cached:
            return self.beside
        return Processes().one_by_one(
            lambda: Cached(self.teacher, windows, self.keeper.folder, self.precision, lambda done, total: None)
        )


def spread(windows: Tensor, count: int) -> Tensor:
    """``count`` of windows (W, L), at least one, evenly over all of them; all where there are fewer."""
    places = torch.linspace(0, len(windows) - 1, max(1, min(count, len(windows))))
    return windows[places.round().long()]


def split_held_out(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Windows (W, L) to train on, and a share spread over them held out, `MOST_HELD_OUT` tokens at most.

    Raises `InputError` of fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(
            f"healing needs at least 2 windows of {windows.shape[1]} tokens, one of them held out, and the text gives"
            f" {len(windows)}: give a longer text or shorter windows"
        )
    most = max(1, MOST_HELD_OUT // windows.shape[1])
    count = min(max(1, round(share * len(windows))), most)
    held = torch.linspace(0, len(windows) - 1, count).round().long().unique()
    mask = torch.ones(len(windows), dtype=torch.bool)
    mask[held] = False
    return windows[mask], windows[~mask]
