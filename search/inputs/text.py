"""Token windows: three disjoint splits, calibrate, search and report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL, Task
from rankfront.search.inputs.rows import hub_rows, json_rows, text_of
from rankfront.search.inputs.tasks import frame_of
from rankfront.search.splits import PYDOC, Split, column_of, own_text_seed

LAST = "heal"  # split that chooses its windows after all others
GOLDEN = (math.sqrt(5) - 1) / 2
Sampler = Callable[[int, int], Tensor]  # seed, tokens -> that many token ids (N,) of the model's own text


def read_text(name: str, tokenizer: Any = None) -> str:
    """The text called ``name``: ``pydoc``, ``hub:NAME/CONFIG:SPLIT``, or a local file; of rows, as data sets and
    ``.jsonl`` files have, the column after ``#`` (see `rows.text_of`).

    Raises `InputError` where there is no such text.
    """
    if own_text_seed(name) is not None:
        raise InputError(f"text {name!r} is sampled from a study's dense model: name another text here")
    if name == PYDOC:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    text, column = (name, None) if Path(name).expanduser().is_file() else column_of(name)
    if text.startswith("hub:"):
        return text_of(hub_rows(text), column, name, tokenizer)
    path = Path(text).expanduser()
    if not path.is_file():
        raise InputError(
            f"text {name!r} is no file: use 'self', 'pydoc', a text file's path, or 'hub:NAME/CONFIG:SPLIT'"
        )
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {name!r} is not UTF-8 ({error.reason} at byte {error.start}): convert it"
        ) from error
    return text_of(json_rows(content, name), column, name, tokenizer) if path.suffix == ".jsonl" else content


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids (N,) of the whole text, no special tokens added."""
    limit, tokenizer.model_max_length = (
        tokenizer.model_max_length,
        int(1e30),
    )  # windows are cut below; no warning
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    finally:
        tokenizer.model_max_length = limit
    return torch.tensor(ids, dtype=torch.int64)


def cut(
    tokenizer: Any,
    splits: Mapping[str, Split],
    length: int,
    sample: Sampler | None = None,
    tokenized: Mapping[str, Tensor] | None = None,
    task: Task = CAUSAL,
) -> dict[str, Tensor]:
    """Windows (W, length) for each split; windows of one text never overlap, whatever split they serve.

    A text is laid out on one grid of windows; each split takes its own, spread evenly over what is free in its
    part; those of a mixture come text by text. ``sample`` gives the model's own text, as long as the splits need it;
    ``tokenized``, ids (N,) of texts that were read already.
    What the tokenizer starts and ends every sequence with, as the ``task`` wants it, each window has too. Raises
    `InputError` with the counts where a text is too short.
    """
    first, last = frame_of(tokenizer, task)
    stride = length - len(first) - len(last)
    asked = {name: split.counts() for name, split in splits.items()}
    tokens = dict(tokenized or {})
    for text in sorted({text for counts in asked.values() for text in counts} - tokens.keys()):
        seed = own_text_seed(text)
        if seed is None or sample is None:
            tokens[text] = tokenize(tokenizer, read_text(text, tokenizer))
        else:
            wanted = [(splits[name], counts[text]) for name, counts in asked.items() if text in counts]
            tokens[text] = sample(seed, sum(_tokens_for(count * stride, split, stride) for split, count in wanted))
    taken: dict[str, set[int]] = {text: set() for text in tokens}
    result = {}
    for name, split in by_turns(splits):
        parts = []
        for text, count in asked[name].items():
            ids = tokens[text]
            start, end = (round(fraction * len(ids)) for fraction in split.part)
            free = [index for index in range(-(-start // stride), end // stride) if index not in taken[text]]
            if len(free) < count:
                raise InputError(
                    f"data.{name}: part {list(split.part)} of text {text!r} has {end - start:,} tokens"
                    f" ({len(free) * stride:,} in windows of {length} that no other split took) and {count} windows"
                    f" need {count * stride:,}: ask for fewer or shorter windows"
                )
            chosen = spread(free, count)
            taken[text].update(chosen)
            parts += [ids[index * stride : (index + 1) * stride] for index in chosen]
        windows = torch.stack(parts)
        before, after = (torch.tensor(ids, dtype=torch.int64).expand(len(windows), -1) for ids in (first, last))
        result[name] = torch.cat([before, windows, after], dim=1)
    return result


def by_turns(splits: Mapping[str, Split]) -> list[tuple[str, Split]]:
    """In which order splits choose: the most confined first, so that a part is not used up by one that could go
    elsewhere; what may be added to a study later takes what the others left."""
    return sorted(splits.items(), key=lambda item: (item[0] == LAST, item[1].width, item[0]))


def spread(free: Sequence[int], count: int) -> list[int]:
    """``count`` of those that are ``free``, evenly."""
    return [free[(2 * i + 1) * len(free) // (2 * count)] for i in range(count)]


def _tokens_for(tokens: int, split: Split, stride: int) -> int:
    """How long a text must be for so many ``tokens`` in a split's part of it, whose ends may lie within windows."""
    return tokens if split.width == 1 else math.ceil((tokens + 2 * stride) / split.width)


def scattered(windows: Tensor) -> Tensor:
    """``windows`` (W, L) in an order of which every beginning comes from all over the text: by the fraction of i φ.

    What is measured on the first few says something of all of them: neighbours in a text are of one topic. Between
    those i whose fraction of i φ is the least there are three distances at most, by the three-distance theorem
    (Sós 1958).
    """
    fractions = torch.arange(len(windows), dtype=torch.float64) * GOLDEN % 1
    return windows[fractions.argsort()]


def hash_tokens(windows: Tensor) -> str:
    """A hash of token ids (W, L) and their shape."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.numpy().tobytes()).hexdigest()[:16]
