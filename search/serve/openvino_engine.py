"""OpenVINO on a CPU: what a folder that was written for it says next, and how likely it finds a text."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankfront.search.serve.openvino_graph import FILE

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
}  # by default fewer bits, where the CPU has them


def installed() -> str:
    """Which version of it."""
    return f"openvino {version('openvino')}"


class OpenVino:
    """A ``folder`` loaded by OpenVINO on ``threads`` of a CPU; ``exact`` in fp32, else as it chooses itself."""

    def __init__(self, folder: Path, threads: int, exact: bool = True) -> None:
        openvino = importlib.import_module("openvino")
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **(EXACT if exact else {})}
        self.request = openvino.Core().compile_model(folder / FILE, "CPU", settings).create_infer_request()
        self.length = 0  # tokens in its cache

    def start(self) -> None:
        """Forget what was read."""
        self.request.reset_state()
        self.length = 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary) of ``ids`` (B, L) after what was read so far."""
        return torch.from_numpy(self._read(ids).copy())

    def likeliest(self, ids: Tensor) -> Tensor:
        """The likeliest tokens (B, 1) after ``ids`` (B, L), and what was read before."""
        return torch.from_numpy(self._read(ids)[:, -1:].argmax(-1))

    def _read(self, ids: Tensor) -> np.ndarray:
        """Logits in memory of the engine, which the next call writes to."""
        count, new = ids.shape
        every = self.length + new
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((count, every), dtype=np.int64),
            "position_ids": np.tile(np.arange(self.length, every), (count, 1)),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        self.length = every
        found: np.ndarray = self.request.infer(given, share_inputs=True, share_outputs=True)["logits"]
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest ``count`` tokens after ``ids``, one after the other."""
        self.start()
        found, given = [], torch.tensor([list(ids)])
        for _ in range(count):
            given = self.likeliest(given)
            found.append(int(given))
        return found

    def perplexities(self, model: nn.Module, windows: Tensor) -> tuple[float, float]:
        """(here, of ``model``) of ``windows`` (W, L), each token but the first predicted from those before it."""
        here, there = [], []
        for ids in windows.split(1):
            self.start()
            with torch.inference_mode():
                logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
            here.append(_loss(self.read(ids), ids))
            there.append(_loss(logits.cpu(), ids))
        return math.exp(sum(here) / len(here)), math.exp(sum(there) / len(there))


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Nats a token."""
    return float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
