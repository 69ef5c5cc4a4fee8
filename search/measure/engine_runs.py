"""Generations of a compressed model and of the dense one in the engine that will serve: latencies are read off them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.objectives.latency import Run
from rankfront.search.errors import ExportError
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.serve.engines import FORMS
from rankfront.search.serve.writing import write

Timed = Callable[[Tensor, int], Run]  # prompts (batch, tokens), tokens to decode -> their seconds


class EngineRuns:
    """What runs generations of what ``compressed`` runs, written for an engine and loaded by it.

    The dense model is written once, whatever runs in between. Folders last as long as this.
    """

    def __init__(self, compressed: CompressedModel) -> None:
        self.compressed = compressed
        self.folder = tempfile.TemporaryDirectory(prefix="rankfront-")
        self.newest: Path | None = None  # of a compressed model
        self._dense: dict[tuple[str, int], Timed] = {}

    def ours(self, engine: str, length: int) -> Timed:
        """Of what the model runs now, for sequences of at most ``length`` tokens; RuntimeError where the engine cannot
        run it."""
        if self.newest is not None:
            shutil.rmtree(self.newest, ignore_errors=True)
        self.newest = Path(tempfile.mkdtemp(dir=self.folder.name))  # engines map files: none is written over
        try:
            return self._loaded(engine, length, self.newest)
        except (InputError, ExportError) as error:  # of this plan: others may have a form there
            raise RuntimeError(str(error)) from error

    def dense(self, engine: str, length: int) -> Timed:
        """The same of the dense model."""
        if (engine, length) not in self._dense:
            with self.compressed.dense():
                folder = Path(tempfile.mkdtemp(dir=self.folder.name))
                self._dense[engine, length] = self._loaded(engine, length, folder)
        return self._dense[engine, length]

    def _loaded(self, engine: str, length: int, folder: Path) -> Timed:
        tokenizer, original = self.compressed.tokenizer, self.compressed.setup.source.gguf
        write(self.compressed.model, FORMS[engine], folder, "F16", tokenizer, original)
        threads = torch.get_num_threads()
        return _in_openvino(folder, threads) if engine == "openvino" else _in_llama_cpp(folder, threads, length)


def _in_openvino(folder: Path, threads: int) -> Timed:
    from rankfront.search.serve.openvino_engine import OpenVino

    engine = OpenVino(folder, threads, exact=False)

    def run(ids: Tensor, decode: int) -> Run:
        engine.start()
        started = perf_counter()
        given = engine.likeliest(ids)
        prompted = perf_counter()
        for _ in range(decode):
            given = engine.likeliest(given)
        return Run(prompted - started, perf_counter() - prompted)

    return run


def _in_llama_cpp(folder: Path, threads: int, length: int) -> Timed:
    from rankfront.search.serve.llama_cpp import LlamaCpp

    engine = LlamaCpp(folder / "model.gguf", length + 1, threads)
    return lambda ids, decode: Run(*engine.seconds(ids[0].tolist(), decode))
