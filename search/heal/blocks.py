"""Block-wise healing: every window of the model trained to give what the dense model gives there.

    min_θ Σ_t ‖f_θ(h'_t) − h_t‖² / ‖h_t‖²,    or    min_θ Σ_t Σ_c w_c (f_θ(h'_t) − h_t)_c²  with w as `fisher` says,

f the window, h' the hidden states that the healed model before it makes, h what the dense model has after it. Two
streams of hidden states go along, dense and healed; one window is trained at a time, so memory is that of a block.
A window is a block, or its attention and its MLP in turn, cut where the residual stream enters the norm of the MLP.

Source: AA-SVD (2604.02119) for the window and its two streams; BRECQ (2102.05426) for reconstruction block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import InputError
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.fisher import Point, fisher
from rankfront.search.heal.fit import Best, Fit, NotFinite
from rankfront.search.heal.loss import relative_error, weighted_error
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.processes import Processes
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.trainable import Parameter, factored_modules, shared, training, within
from rankfront.search.inputs.sites import blocks
from rankfront.search.measure.streams import Call, calls_of, caught, first_hidden

Seen = Callable[[int, int, float, float], None]  # blocks done, in all, error before and after
Measure = Callable[[Tensor, Tensor], Tensor]  # error of hidden states (B, L, d) and their targets
EVALUATIONS = 4  # of the held-out error in a window's training; guess


class Stream:
    """Hidden states of all windows on their way through a model's blocks, kept on the CPU.

    Attributes:
        model: whose blocks they go through.
        blocks: these.
        hidden: (W, L, d), what enters the next block.
    """

    def __init__(self, model: Any, found: list[nn.Module], windows: Tensor, size: int, precision: Precision) -> None:
        self.model, self.blocks, self.size, self.precision = model, found, size, precision
        self.windows, self.device = windows, next(model.parameters()).device
        self._calls: dict[int, list[Call]] = {}
        with torch.no_grad(), precision.context():
            first = [first_hidden(model, found[0], ids.to(self.device)).cpu() for ids in windows.split(size)]
        self.hidden = torch.cat(first)

    def call(self, number: int, count: int) -> Call:
        """What block ``number`` is called with for ``count`` windows at once."""
        if count not in self._calls:
            with torch.no_grad(), self.precision.context():
                self._calls[count] = calls_of(self.model, self.blocks, self.windows[:count].to(self.device))
        return self._calls[count][number]

    def run(self, number: int, hidden: Tensor, until: str | None = None) -> Tensor:
        """What block ``number`` makes of hidden states (b, L, d); or what enters its submodule ``until``."""
        block, call = self.blocks[number], self.call(number, len(hidden))
        with self.precision.context():
            if until is None:
                return call.run(block, hidden.to(self.device))
            return caught(block.get_submodule(until), lambda: call.run(block, hidden.to(self.device)))

    @torch.no_grad()
    def after(self, number: int, until: str | None = None) -> Tensor:
        """`run` of all windows."""
        return torch.cat([self.run(number, part, until).cpu() for part in self.hidden.split(self.size)])


def middle(stream: Stream, number: int) -> str | None:
    """The submodule of a block that the residual stream enters between attention and MLP; None where there is none.

    It is what is called just before the second of the submodules that hold compressed weights. In parallel blocks it
    reads what the block reads, and there is no middle.
    """
    block = stream.blocks[number]
    called: list[tuple[str, Tensor]] = []
    handles = [
        child.register_forward_pre_hook(
            lambda _, given, named, name=name: called.append((name, given[0] if given else named["hidden_states"])),
            with_kwargs=True,
        )
        for name, child in block.named_children()
    ]
    hidden = stream.hidden[:1]
    try:
        with torch.no_grad():
            stream.run(number, hidden)
    finally:
        for handle in handles:
            handle.remove()
    treated = {path.split(".")[0] for path in factored_modules(block)}
    places = [place for place, (name, _) in enumerate(called) if name in treated]
    if len(places) < 2 or places[1] - places[0] < 2:
        return None
    name, entering = called[places[1] - 1]
    same_shape = entering.shape == hidden.shape
    return name if same_shape and not torch.equal(entering.cpu(), hidden.to(entering.dtype)) else None


class BlockWise:
    """Trains the blocks of ``student`` in their order."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        windows: Tensor,
        held: Tensor,
        settings: HealSettings,
        arm: type[Arm],
        parameters: list[Parameter],
        precision: Precision,
    ) -> None:
        prefix, theirs = blocks(teacher)
        ours = list(student.get_submodule(prefix))
        self.count = len(ours)
        length = windows.shape[1]
        self.settings, self.arm, self.precision = settings, arm, precision
        self.processes = Processes()
        together = self.processes.count
        if len(windows) < together:
            raise InputError(
                f"{together} processes heal on {len(windows)} windows, and each needs one: start fewer, or give more"
                " tokens or shorter windows"
            )
        self.size = max(1, min(settings.step_tokens // length, len(windows)) // together)  # of this process, a step
        used = len(windows) // (self.size * together) * self.size * together
        self.windows, self.held = self.processes.share(windows[:used]), len(held)
        everything = torch.cat([self.windows, self.processes.share(held)])
        self.dense = Stream(teacher, list(theirs), everything, self.size, precision)
        self.healed = Stream(student, ours, everything, self.size, precision)
        outside = shared(student, ours)
        self.parameters = [parameter for parameter in parameters if id(parameter.tensor) not in outside]
        halves = settings.window == "half"
        self.cuts = [middle(self.healed, number) if halves else None for number in range(self.count)]
        self.weights: dict[Point, Tensor] = {}
        if settings.error == "fisher":
            points = [(number, until) for number, cut in enumerate(self.cuts) for until in {cut, None}]
            self.weights = fisher(teacher, list(theirs), points, self.windows, precision, settings.seed)
            for weight in self.weights.values():
                self.processes.add(weight)
        self.steps = max(1, settings.budget("blocks") // (self.size * together * length))

    def run(self, done: int, after_block: Callable[[int, float], None]) -> str | None:
        """Train every block but the first ``done``, which were; after each, how many are and its held-out error as a
        ratio to what it was. What went wrong, in one line."""
        notes: list[str] = []
        for number in range(self.count):
            if number < done:
                self._advance(number)
                continue
            before, after, note = self.heal(number)
            notes += [f"block {number}: {note}"] if note else []
            after_block(number + 1, after / before if before else 1.0)
        return None if not notes else notes[0] + (f", and {len(notes) - 1} more blocks" if len(notes) > 1 else "")

    def heal(self, number: int) -> tuple[float, float, str | None]:
        """Train block ``number``, let both streams pass; its held-out error before and after, and what went wrong."""
        own = within(self.parameters, self.healed.blocks[number])
        cut = self.cuts[number]
        before, after = 0.0, 0.0
        notes: list[str] = []
        for until in (None,) if cut is None else (cut, None):
            target = self.dense.after(number, until)
            trained = own if cut is None else self._half(own, number, cut, until)
            if trained:
                before, after, note = self._train(number, trained, until, target)
                notes += [note] if note else []
        self._advance(number)
        return before, after, "; ".join(notes) or None

    def _half(self, own: list[Parameter], number: int, cut: str, until: str | None) -> list[Parameter]:
        """Those of a block's parameters that what enters ``cut`` depends on, or the others."""
        with training(own):
            entering = self.healed.run(number, self.healed.hidden[:1], cut)
            tensors = [parameter.tensor for parameter in own]
            found = torch.autograd.grad(entering.float().sum(), tensors, allow_unused=True)
        return [p for p, grad in zip(own, found, strict=True) if (grad is None) == (until is None)]

    def _advance(self, number: int) -> None:
        self.dense.hidden = self.dense.after(number)
        self.healed.hidden = self.healed.after(number)

    def _train(
        self, number: int, own: list[Parameter], until: str | None, target: Tensor
    ) -> tuple[float, float, str | None]:
        settings, train, measure = self.settings, len(self.windows), self._error((number, until), target)
        note = None
        block = self.healed.blocks[number]
        arm = self.arm(block, self.dense.blocks[number], _inside(own, block), settings.seed + number)
        with training(arm.parameters):
            fit = Fit(arm.parameters, settings.rate_of("blocks"), self.steps)
            arm.fit = fit
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)

            best = Best(arm.parameters, self._held_out(number, until, target, measure))
            try:
                order: list[Tensor] = []
                for step in range(self.steps):
                    if not order:
                        order = list(torch.randperm(train, generator=generator).split(self.size))
                    chosen = order.pop()
                    arm.before(step, self.steps)
                    made = self.healed.run(number, self.healed.hidden[chosen], until)
                    loss = measure(made, target[chosen].to(made.device))
                    penalty = arm.penalty()
                    ((loss if penalty is None else loss + penalty) / self.processes.count).backward()
                    self.processes.add_gradients(parameter.tensor for parameter in arm.parameters)
                    fit.step()
                    arm.after(step, self.steps)
                    due = (step + 1) % max(1, self.steps // EVALUATIONS) == 0 or step + 1 == self.steps
                    if due and arm.storable:
                        error = self._held_out(number, until, target, measure)
                        best.judge(error, fit if arm.goes_back else None)
            except NotFinite as failure:
                note = f"{failure}: ended at its best state"
                fit.optimiser.zero_grad(set_to_none=True)
            best.take()
            arm.finish()
        return best.start, best.error, note

    def _error(self, point: Point, target: Tensor) -> Measure:
        """The error at ``point``; a weighted one of 1 where all of the ``target`` (W, L, d) is missed."""
        if self.settings.error == "relative":
            return relative_error
        weights = self.weights[point]
        size = target[:, 1:].float().square().mean((0, 1)).to(weights.device) @ weights
        return partial(weighted_error, weights=weights / size)

    @torch.no_grad()
    def _held_out(self, number: int, until: str | None, target: Tensor, measure: Measure) -> float:
        """The mean error of the windows that nothing is trained on."""
        train, total = len(self.windows), 0.0
        for part, wanted in zip(
            self.healed.hidden[train:].split(self.size), target[train:].split(self.size), strict=True
        ):
            if not len(part):  # fewer windows than processes
                continue
            made = self.healed.run(number, part, until)
            total += len(part) * float(measure(made, wanted.to(made.device)))
        return self.processes.total(total) / self.held


def _inside(own: list[Parameter], block: nn.Module) -> list[Parameter]:
    """The same parameters under the names that they have in ``block``."""
    names = {id(tensor): name for name, tensor in block.named_parameters()}
    return [replace(p, name=names[id(p.tensor)]) for p in own]
