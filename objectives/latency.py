"""Latency: prefill of a prompt and decode token by token, as a ratio to dense, measured on the model itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rankfront.methods import Cost, InputError
from rankfront.objectives._objective import register
from rankfront.objectives._subject import Subject

REFERENCE = 1.1  # times dense: slower than that counts for nothing


@dataclass(frozen=True)
class Run:
    """Seconds of one generation: the whole prompt at once, then one token after another."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


@register
@dataclass(frozen=True)
class Latency:
    """Median over rounds of (compressed seconds / dense seconds) for one prompt and its continuation.

    Each round runs both models, taking turns at going first, so that a busy machine slows both. The notes
    ``latency_prefill``, ``latency_decode`` (ratios), ``latency_spread`` (interquartile range of the ratio) and
    ``latency_dense_ms`` (median, for orientation only) go with the value.

    Attributes:
        batch: sequences at once.
        prompt: tokens a sequence starts with.
        decode: tokens generated after it.
        rounds: pairs of runs.
    """

    name = "latency"
    unit = "ratio to dense"
    logarithmic = False

    batch: int = 1
    prompt: int = 128
    decode: int = 16
    rounds: int = 9

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "decode", "rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"objectives.latency.{name} is {value!r}: it must be a whole number of at least 1")

    def value(self, subject: Subject) -> float:
        with subject.clock.phase("latency"):
            ours, dense = self._measure(subject)
        ratios = np.array([a.total / b.total for a, b in zip(ours, dense, strict=True)])
        low, high = np.percentile(ratios, [25, 75])
        subject.notes |= {
            "latency_prefill": _median([a.prefill / b.prefill for a, b in zip(ours, dense, strict=True)]),
            "latency_decode": _median([a.decode / b.decode for a, b in zip(ours, dense, strict=True)]),
            "latency_spread": float(high - low),
            "latency_dense_ms": 1000 * _median([b.total for b in dense]),
        }
        return float(np.median(ratios))

    def _measure(self, subject: Subject) -> tuple[list[Run], list[Run]]:
        window = subject.windows.flatten()
        need = self.batch * self.prompt
        ids = window.repeat(-(-need // len(window)))[:need].view(self.batch, self.prompt)
        ids = ids.to(next(subject.model.parameters()).device)

        def dense_run() -> Run:
            with subject.dense():
                return generate(subject.model, ids, self.decode)

        def our_run() -> Run:
            return generate(subject.model, ids, self.decode)

        our_run(), dense_run()  # warm-up
        ours, dense = [], []
        for turn in range(self.rounds):
            if turn % 2:
                dense.append(dense_run())
                ours.append(our_run())
            else:
                ours.append(our_run())
                dense.append(dense_run())
        return ours, dense

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return 0.0, REFERENCE


def _median(values: list[float]) -> float:
    return float(np.median(values))


class _Stopwatch:
    """Seconds since the last lap: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.last = self._now()

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def lap(self) -> float:
        now, last = self._now(), self.last
        self.last = now
        if isinstance(now, float):
            assert isinstance(last, float)
            return now - last
        assert not isinstance(last, float)
        now.synchronize()
        return float(last.elapsed_time(now)) / 1000


@torch.inference_mode()
def generate(model: nn.Module, ids: Tensor, decode: int) -> Run:
    """Time a prefill of ``ids`` (batch, prompt) and ``decode`` greedy single-token steps with the key-value cache."""
    watch = _Stopwatch(ids.device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = watch.lap()
    for _ in range(decode):
        token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return Run(prefill, watch.lap())
