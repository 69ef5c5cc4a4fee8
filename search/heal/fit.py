"""AdamW with a warm-up and a cosine, clipped, that stops at what is not finite; and the best state seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfront.search.heal.trainable import RATES, Kind, Parameter, copied, restore

BETAS = (0.9, 0.95)
WARM_UP, LEAST_WARM_UP = 0.1, 4  # share of the steps, and steps; Adam's first steps have full size in every entry
FINAL = 0.1  # of the rate, at the end of the cosine
CLIP = 1.0  # norm of the gradient
EASE = 4.0  # what the rate is divided by where training leaves more than it began with; guess


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step`` of ``steps``: linear up, then a cosine down to `FINAL`."""
    warm = min(max(LEAST_WARM_UP, round(WARM_UP * steps)), max(1, steps // 2))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * share))


class NotFinite(Exception):
    """A loss or a gradient is no number: the stage ends at its best state."""


class Fit:
    """Steps of AdamW over ``parameters``, without weight decay, which on factors is a nuclear-norm penalty.

    A tensor with a unit u trains as u t does with t in its place.
    """

    def __init__(self, parameters: Sequence[Parameter], rate: float, steps: int) -> None:
        self.parameters, self.rate, self.steps, self.done = list(parameters), rate, steps, 0
        alike: dict[tuple[Kind, float], list[Tensor]] = {}
        for p in self.parameters:
            alike.setdefault((p.kind, p.unit), []).append(p.tensor)
        groups = [{"params": tensors, "kind": kind, "unit": unit} for (kind, unit), tensors in alike.items()]
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0)

    def step(self) -> None:
        """One step with the gradients that are there; raises `NotFinite` before it would spoil anything."""
        for p in self.parameters:
            if p.unit != 1 and p.tensor.grad is not None:
                p.tensor.grad.mul_(p.unit)
        norm = torch.nn.utils.clip_grad_norm_([p.tensor for p in self.parameters], CLIP)
        if not bool(torch.isfinite(norm)):
            raise NotFinite(f"the gradient's norm is {float(norm)} at step {self.done + 1} of {self.steps}")
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_of(group["kind"]) * group["unit"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1

    def ease(self) -> None:
        """Go on at a lower rate, without what was learned of the steps before."""
        self.rate /= EASE
        self.optimiser.state.clear()

    def rate_of(self, kind: Kind) -> float:
        """The learning rate of the coming step."""
        return self.rate * RATES[kind] * schedule(self.done, self.steps)

    def moment(self, tensor: Tensor) -> Tensor | None:
        """The first moment of a parameter; None before its first step."""
        found: Tensor | None = self.optimiser.state.get(tensor, {}).get("exp_avg")
        return found

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` goes on: the parameters and both moments of each, by name."""
        found = {f"value.{p.name}": p.tensor.detach() for p in self.parameters}
        for p in self.parameters:
            for name, value in self.optimiser.state.get(p.tensor, {}).items():
                found[f"{name}.{p.name}"] = value.detach().clone() if value.ndim == 0 else value.detach()
        return found

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from what `state` gave after ``done`` steps."""
        restore(self.parameters, {p.name: state[f"value.{p.name}"] for p in self.parameters})
        for p in self.parameters:
            own: dict[str, Any] = {
                key: state[f"{key}.{p.name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{p.name}" in state
            }
            if own:
                self.optimiser.state[p.tensor] = own
        self.done = done


class Best:
    """The parameters of the least held-out error so far, the start among them."""

    def __init__(self, parameters: Sequence[Parameter], error: float) -> None:
        self.parameters = list(parameters)
        self.start = self.error = error
        self.values = copied(self.parameters)

    def offer(self, error: float) -> None:
        """Keep the parameters as they are now, if ``error`` is less."""
        if error < self.error:  # of NaN, never
            self.error, self.values = error, copied(self.parameters)

    def judge(self, error: float, fit: Fit | None) -> None:
        """`offer`; where ``error`` is more than at the start, ``fit`` goes on from the best ones at a lower rate."""
        self.offer(error)
        if fit is not None and error > self.start:
            self.take()
            fit.ease()

    def take(self) -> None:
        """Put the best ones in place."""
        restore(self.parameters, self.values)
