"""Memory: what the model holds while it runs, and what each token of its context adds."""

from __future__ import annotations

from dataclasses import dataclass

from rankfront.methods import Cost, InputError
from rankfront.objectives._objective import Size, register
from rankfront.objectives._subject import Subject


class Held(Size):
    """Of an objective that a plan alone does not decide: the model is run for it."""

    def from_cost(self, cost: Cost) -> None:
        return None


@register
@dataclass(frozen=True)
class ResidentBytes(Held):
    """Bytes of all tensors that the model's modules hold after a token was decoded, each once.

    Beside what is on disk these are buffers that are not saved, and copies that layers keep to run: supports decoded to
    indices, sparse factors made dense, integers in the order of a kernel.
    """

    name = "resident_bytes"
    unit = "bytes"

    def value(self, subject: Subject) -> float:
        from rankfront.objectives._running import note_running

        note_running(subject)
        return subject.notes["resident_bytes"]


@register
@dataclass(frozen=True)
class KVBytes(Held):
    """Bytes that the cache of keys and values grows by with each token of a sequence."""

    name = "kv_bytes"
    unit = "bytes/token"

    def value(self, subject: Subject) -> float:
        from rankfront.objectives._running import TOKENS, cache_after

        layers = getattr(cache_after(subject), "layers", ())
        kept = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))  # states do not grow
        return float(sum(tensor.nbytes for tensor in kept if tensor is not None) / TOKENS)


@register
@dataclass(frozen=True)
class Memory(Held):
    """Bytes of weights and cache while ``batch`` sequences of ``context`` tokens are in the cache:

        resident_bytes + batch · context · kv_bytes.

    Attention that sees a window keeps no more than that, and takes less.

    Attributes:
        batch: sequences at once.
        context: tokens of each, prompt and continuation.
    """

    name = "memory"
    unit = "bytes"

    batch: int = 1
    context: int = 4096

    def __post_init__(self) -> None:
        for name, count in (("batch", self.batch), ("context", self.context)):
            if type(count) is not int or count < 1:
                raise InputError(f"objectives.memory.{name} is {count!r}: it must be a whole number of at least 1")

    def value(self, subject: Subject) -> float:
        return ResidentBytes().value(subject) + self.batch * self.context * KVBytes().value(subject)
