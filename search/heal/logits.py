"""End-to-end healing: the whole model trained on KL(dense ‖ healed) of next-token distributions, temperature 1.

All that may train does at once: factors, smaller dense weights, norms and biases; embeddings, heads and untouched dense
weights stay. Logits exist for one run of tokens at a time. Cross-entropy alone, or both, as the user says: of both, the
divergence is scaled to the size of the entropy, run by run, as NVIDIA's ModelOpt does step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankfront.search.choices import Loss
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.fit import Best, Fit, NotFinite
from rankfront.search.heal.loss import Head, Target, descend, summed
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.processes import Processes
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.teacher import Beside, Says

BEST = "best."  # before the names, in a checkpoint, of the best state
EVALUATIONS = 8  # of the held-out divergence; guess
AT_ONCE = {"cpu": 2_048, "cuda": 8_192}  # tokens of one forward pass; guess


def at_once(device: torch.device, length: int) -> int:
    """How many windows of ``length`` tokens one forward pass takes."""
    return max(1, AT_ONCE[device.type] // length)


class HeldOut:
    """Windows (W, L) that nothing is trained on, and what the dense model says of them, asked once."""

    def __init__(self, beside: Beside, windows: Tensor, precision: Precision, loss: Loss = "kl") -> None:
        self.processes, self.precision, self.loss = Processes(), precision, loss
        self.predicted = len(windows) * (windows.shape[1] - 1)
        device = next(beside.head.model.parameters()).device
        batches = self.processes.share(windows).split(at_once(device, windows.shape[1]))
        self.windows = [ids.to(device) for ids in batches if len(ids)]
        self.targets = [beside.target(torch.zeros(0), ids) if loss == "kl" else Target() for ids in self.windows]

    @torch.no_grad()
    def mean(self, head: Head) -> float:
        """Mean of the loss over predicted tokens, KL(dense ‖ compressed) or −log p, in nats."""
        total = 0.0
        for ids, target in zip(self.windows, self.targets, strict=True):
            with self.precision.context():
                total += summed(head, head.hidden(ids), ids, self.loss, target)
        return self.processes.total(total) / self.predicted


class EndToEnd:
    """Trains the whole of a model; `steps` of them, each of which `step` does."""

    def __init__(
        self,
        arm: Arm,
        head: Head,
        teacher: Says,
        windows: Tensor,
        settings: HealSettings,
        precision: Precision,
    ) -> None:
        self.arm, self.head, self.teacher = arm, head, teacher
        self.windows, self.settings, self.precision = windows, settings, precision
        self.processes = Processes()
        self.device = next(head.model.parameters()).device
        length = windows.shape[1]
        self.size = max(1, min(settings.step_tokens // length, len(windows)))
        self.steps = max(1, settings.budget("logits") // (self.size * length))
        self.fit = arm.fit = Fit(arm.parameters, settings.rate_of("logits"), self.steps)
        self.at_once = at_once(self.device, length)

    def begin(self, error: float, where: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Start from the parameters as they are, of held-out divergence ``error``; or from what `state` gave."""
        self.best = Best(self.arm.parameters, error + self.arm.cost())
        if where:
            self.fit.load(tensors, int(where["step"]))
            self.fit.rate = where.get("rate", self.fit.rate)
            self.best.error = where["best"]
            self.best.values = {p.name: tensors[f"{BEST}{p.name}"] for p in self.arm.parameters}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `begin` goes on from."""
        best = {f"{BEST}{name}": value for name, value in self.best.values.items()}
        return {"step": self.fit.done, "best": self.best.error, "rate": self.fit.rate}, self.fit.state() | best

    def run(self, evaluate: Callable[[], float], after_step: Callable[[float], None]) -> str | None:
        """All steps that are left; the best state is in place after. What went wrong, in one line."""
        note = None
        try:
            while self.fit.done < self.steps:
                loss = self.step()
                due = self.fit.done % max(1, self.steps // EVALUATIONS) == 0 or self.fit.done == self.steps
                if due and self.arm.storable:
                    self.best.judge(evaluate() + self.arm.cost(), self.fit if self.arm.goes_back else None)
                after_step(loss)
        except NotFinite as error:
            note = f"{error}: ended at its best state"
            self.fit.optimiser.zero_grad(set_to_none=True)
        self.best.take()
        self.arm.finish()
        return note

    def chosen(self, step: int) -> Tensor:
        """Numbers of the windows of a step: pass after pass over all of them, each in an order of its own."""
        count, start = len(self.windows), step * self.size
        turns = range(start // count, (start + self.size - 1) // count + 1)
        orders = [
            torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + turn))
            for turn in turns
        ]
        first = start - turns.start * count
        return torch.cat(orders)[first : first + self.size]

    def step(self) -> float:
        """One step; the loss a token of its batch, before it. Raises `NotFinite`."""
        done = self.fit.done
        numbers = self.chosen(done)
        self.arm.before(done, self.steps)
        count, total = len(numbers) * (self.windows.shape[1] - 1), 0.0
        for part in self.processes.share(numbers).split(self.at_once):
            if not len(part):  # fewer windows than processes
                continue
            ids = self.windows[part].to(self.device)
            target = self.teacher.target(part, ids) if self.settings.loss != "ce" else Target()
            with self.precision.context():
                hidden = self.head.hidden(ids)
                total += descend(self.head, hidden, ids, self.settings.loss, target, 1 / count)
        penalty = self.arm.penalty() if self.processes.first else None
        if penalty is not None:
            penalty.backward()
        self.processes.add_gradients(parameter.tensor for parameter in self.arm.parameters)
        self.fit.step()
        self.arm.after(done, self.steps)
        return self.processes.total(total)
