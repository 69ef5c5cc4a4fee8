"""What a user asks of a smaller model, in the terms that people think in, as limits of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rankfront.methods import InputError
from rankfront.search.choices import Effort, Servable
from rankfront.search.quantities import parse_bytes, parse_count
from rankfront.search.splits import SELF


@dataclass(frozen=True)
class Request:
    """A smaller model, as a user asks for it; None and () leave something out.

    Attributes:
        model: a bundled name, a hub id, a folder or a .gguf file.
        keep: at most this fraction of the model's parameters.
        parameters: at most so many, such as ``100M``.
        bytes: at most so many on disk, such as ``2GB``.
        latency: at most this ratio to the dense model's.
        memory: at most so many bytes of weights and cache, such as ``3GB``, while ``batch`` sequences of ``context``
            tokens are in the cache.
        text: what the model will be used on: a file, or ``hub:NAME/CONFIG:SPLIT``; by default what it samples itself.
        serve: the format of an engine that the result is written in.
        gguf_type: of weights in a GGUF file.
        heal: tokens to train on in the end, 0 for none.
        effort: how much is read and measured.
        overrides: KEY=VALUE of the study file.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    model: str
    keep: float | None = None
    parameters: str | None = None
    bytes: str | None = None
    latency: float | None = None
    memory: str | None = None
    batch: int = 1
    context: int = 4096
    text: str = SELF
    serve: Servable | None = None
    gguf_type: str = "F16"
    heal: int = 0
    effort: Effort = "auto"
    overrides: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, fraction in (("--keep", self.keep), ("--latency", self.latency)):
            if fraction is not None and not 0 < fraction < 1:
                raise InputError(f"{name} is {fraction:g}: give a fraction of the dense model's, such as 0.7")

    def limits(self, dense: int) -> dict[str, float]:
        """Objective -> the most that it may be, of a model with so many ``dense`` parameters."""
        kept = [self.keep] if self.keep is not None else []
        if self.parameters is not None:
            kept.append(parse_count(self.parameters, "--parameters") / dense)
        found: dict[str, float] = {}
        if self.bytes is not None:
            most = parse_bytes(self.bytes, "--bytes")
            if self.serve == "gguf":  # whose values have a size of their own, not that of the trials' dtype
                kept.append(most / (bytes_of_value(self.gguf_type) * dense))
            else:
                found["bytes"] = float(most)
        if kept:
            if min(kept) >= 1:
                raise InputError(f"the model has {dense:,} parameters, which keeps the limit as it is: ask for less")
            found = {"parameters": math.floor(1e6 * min(kept)) / 1e6, **found}
        if self.latency is not None:
            found["latency"] = self.latency
        if self.memory is not None:
            found["memory"] = float(parse_bytes(self.memory, "--memory"))
        return found

    def settings(self, objective: str) -> dict[str, int]:
        """Of ``objective`` in the study file."""
        return {"batch": self.batch, "context": self.context} if objective == "memory" else {}


def bytes_of_value(kind: str) -> float:
    """Bytes that a GGUF file takes for a value of type ``kind``, blocks with their scales."""
    from rankfront.search.serve.gguf_file import check_type

    check_type(kind)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return float(size / values)
