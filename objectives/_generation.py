"""One generation, timed: a prompt at once, then one token after another, compiled or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from rankfront.objectives._caches import cache_of
from rankfront.objectives.latency import Run

GRAPHS = 4096  # that compiled models may have had in all: every trial's are others


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
def generate(model: Callable[..., Any], ids: Tensor, decode: int, cache: Any = None) -> Run:
    """Time a prefill of ``ids`` (batch, prompt) and ``decode`` greedy single-token steps with the key-value ``cache``,
    one that grows where none is given."""
    watch = _Stopwatch(ids.device)
    given = {} if cache is None else {"past_key_values": cache}
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    prefill = watch.lap()
    for _ in range(decode):
        token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        out = model(input_ids=token, use_cache=True, logits_to_keep=1, **cache_of(out))
    return Run(prefill, watch.lap())


@torch.inference_mode()
def read(model: Callable[..., Any], ids: Tensor) -> Run:
    """Time a forward pass of ``ids`` (batch, tokens), after which nothing is decoded."""
    watch = _Stopwatch(ids.device)
    model(input_ids=ids)
    return Run(watch.lap(), 0.0)


def generate_compiled(forward: Callable[..., Any], model: Any, ids: Tensor, decode: int) -> Run:
    """`generate` by what `compiled` made of ``model``, with a static cache: one that grows asks for more graphs."""
    return generate(forward, ids, decode, StaticCache(config=model.config, max_cache_len=ids.shape[1] + decode))


def compiled(model: nn.Module) -> Callable[..., Any]:
    """``model`` through ``torch.compile``, on a GPU with CUDA graphs. What its modules are replaced by is compiled at
    its first call, and the graphs of before are kept."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    cuda = next(model.parameters()).is_cuda
    forward: Callable[..., Any] = torch.compile(model, mode="reduce-overhead" if cuda else None)
    return forward
