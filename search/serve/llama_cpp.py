"""llama.cpp, as the package `xllamacpp` has it: what a GGUF file says next, and how likely it finds a text."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "xllamacpp"
FORCED = 1e4  # added to a logit, so that its token is the one that is drawn


def available() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def installed() -> str:
    """Which version of it."""
    return f"{PACKAGE} {version(PACKAGE)}"


class LlamaCpp:
    """A GGUF ``file``, loaded by llama.cpp, for sequences of at most ``length`` tokens one at a time."""

    def __init__(self, file: Path, length: int, threads: int) -> None:
        xllamacpp = importlib.import_module(PACKAGE)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel = length, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.verbosity, settings.warmup = 0, False
        self.server = xllamacpp.Server(settings)

    def complete(self, ids: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        """The server's answer to the prompt ``ids``: ``count`` tokens, the likeliest unless ``more`` says other."""
        asked = {"prompt": list(ids), "n_predict": count, "temperature": 0.0, "n_probs": 1, **more}
        found: dict[str, Any] = self.server.handle_completions(asked)
        return found

    def seconds(self, ids: Sequence[int], count: int) -> tuple[float, float]:
        """Those of the prompt ``ids`` and a token, and of ``count`` more, by its own clock."""
        found = self.complete(ids, 1 + count, n_probs=0, ignore_eos=True, cache_prompt=False)["timings"]
        if found["prompt_n"] != len(ids) or found["predicted_n"] != 1 + count:
            counts = f"{found['prompt_n']} of {len(ids)} and {found['predicted_n']} of {1 + count}"
            raise RuntimeError(f"llama.cpp read and wrote {counts} tokens")
        return found["prompt_ms"] / 1000, found["predicted_ms"] / 1000

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, special tokens that are added to every text included."""
        asked = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return list(json.load(answer)["tokens"])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, up to ``count`` tokens; shorter where it ends by itself."""
        return [step["id"] for step in self.complete(ids, count)["choices"][0]["logprobs"]["content"]]

    def log_probability(self, ids: Sequence[int], token: int) -> float | None:
        """ln p(token | ids): ``token`` is forced, and what is reported of it is by the logits as they were.

        None where the token is no whole character, of which nothing is reported.
        """
        found = self.complete(ids, 1, temperature=1.0, samplers=["temperature"], logit_bias=[[token, FORCED]])
        steps = (found["choices"][0]["logprobs"] or {}).get("content") or []
        return next((float(step["logprob"]) for step in steps if step["id"] == token), None)

    def perplexities(self, model: nn.Module, windows: Tensor) -> tuple[float, float, int]:
        """(here, of ``model``, over how many tokens) of ``windows`` (W, L), each token predicted from those before it.

        The first token of a window is left out, and those that llama.cpp reports nothing of.
        """
        here, there = [], []
        for ids in windows.tolist():
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]).to(_device(model)), use_cache=False).logits[0, :-1]
            expected = logits.float().log_softmax(-1).cpu()
            for end in range(1, len(ids)):
                found = self.log_probability(ids[:end], ids[end])
                if found is not None:
                    here.append(found)
                    there.append(float(expected[end - 1, ids[end]]))
        return _perplexity(here), _perplexity(there), len(here)


def _perplexity(found: Sequence[float]) -> float:
    return math.exp(-sum(found) / len(found)) if found else math.nan


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
