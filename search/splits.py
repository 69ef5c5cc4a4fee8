"""What a study asks of its texts: names and shares, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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


def trial_windows(tokens: int | None, windows: int, length: int) -> int:
    """How many of the search split's ``windows`` of ``length`` tokens a trial reads that reads so many ``tokens``: one
    at least, all where that is None. Raises `InputError` where the split has too few."""
    count = windows if tokens is None else max(1, tokens // length)
    if count > windows:
        raise InputError(
            f"search.trial_tokens = {tokens} are {count} windows of {length} tokens and data.search.windows is"
            f" {windows}: set data.search.windows to {count} or more"
        )
    return count


def own_text_seed(name: str) -> int | None:
    """The seed of ``self`` (0) or ``self:SEED``, the model's own text; None for other texts."""
    match = re.fullmatch(rf"{SELF}(?::(\d{{1,9}}))?", name)
    return int(match[1] or 0) if match else None


def column_of(name: str) -> tuple[str, str | None]:
    """(text, column): ``chat.jsonl#messages`` is the column ``messages`` of the rows of ``chat.jsonl``."""
    text, mark, column = name.rpartition("#")
    return (text, column) if mark else (name, None)


def _canonical(name: str) -> str:
    """One name for one text, however a file's path is spelled."""
    seed = own_text_seed(name)
    if seed is not None:
        return f"{SELF}:{seed}" if seed else SELF
    text, column = column_of(name)
    path = Path(text).expanduser()
    if name == PYDOC or not path.is_file():
        return name
    return str(path.resolve()) if column is None else f"{path.resolve()}#{column}"
