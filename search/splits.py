"""What a study asks of its texts: names and shares, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from rankfront.methods import InputError

SPLITS = ("calibrate", "search", "report")
PYDOC, SELF = "pydoc", "self"
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "My favourite animal is the")


@dataclass(frozen=True)
class Split:
    """What one split asks for: ``windows`` of a text, from the part (start, end) of it by position.

    Of a mixture, text -> weight, each text gives windows in proportion to its weight.
    """

    text: str | Mapping[str, float]
    windows: int
    part: tuple[float, float] = (0.0, 1.0)

    @property
    def width(self) -> float:
        """The fraction of a text that the part is."""
        return self.part[1] - self.part[0]

    def counts(self) -> dict[str, int]:
        """Text -> its windows, by largest remainders; `InputError` where one of a mixture gets none."""
        weights: dict[str, float] = {}
        for name, weight in ({self.text: 1.0} if isinstance(self.text, str) else self.text).items():
            weights[_canonical(name)] = weights.get(_canonical(name), 0.0) + weight
        shares = {name: self.windows * weight / sum(weights.values()) for name, weight in weights.items()}
        counts = {name: int(share) for name, share in shares.items()}
        for name in sorted(shares, key=lambda name: counts[name] - shares[name])[: self.windows - sum(counts.values())]:
            counts[name] += 1
        for name, count in counts.items():
            if not count:
                raise InputError(
                    f"of {self.windows} windows, text {name!r} with weight {weights[name]:g} of"
                    f" {sum(weights.values()):g} gets none: ask for more windows, or leave it out"
                )
        return counts


def rung_windows(rungs: Sequence[int], windows: int, length: int) -> list[slice]:
    """Which windows of the search split each rung reads; all of them where there is only one fidelity.

    ``rungs`` are in tokens; each takes at least one window. Raises `InputError` where the split has too few.
    """
    if not rungs:
        return [slice(0, windows)]
    ends = list(accumulate(max(1, tokens // length) for tokens in rungs))
    if ends[-1] > windows:
        raise InputError(
            f"search.rungs = {list(rungs)} read {ends[-1]} windows of {length} tokens and data.search.windows is"
            f" {windows}: each rung takes windows of its own, so set data.search.windows to {ends[-1]} or more"
        )
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def own_text_seed(name: str) -> int | None:
    """The seed of ``self`` (0) or ``self:SEED``, the model's own text; None for other texts."""
    match = re.fullmatch(rf"{SELF}(?::(\d{{1,9}}))?", name)
    return int(match[1] or 0) if match else None


def _canonical(name: str) -> str:
    """One name for one text, however a file's path is spelled."""
    seed = own_text_seed(name)
    if seed is not None:
        return f"{SELF}:{seed}" if seed else SELF
    path = Path(name).expanduser()
    return str(path.resolve()) if name != PYDOC and path.is_file() else name
