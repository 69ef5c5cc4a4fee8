"""Labelled texts: rows of a text and a class, as token ids for a model that classifies them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.objectives import Task
from rankfront.search.inputs.model import read_config
from rankfront.search.inputs.rows import hub_rows, json_rows
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import Sampler, by_turns, cut, spread
from rankfront.search.splits import Split, column_of

COLUMNS = ("text", "label")
LARGEST = 2**20  # characters of one field of a CSV file


def rows_of(
    source: Source, tokenizer: Any, task: Task, splits: Mapping[str, Split], length: int, sample: Sampler | None = None
) -> dict[str, Tensor]:
    """What a model for this ``task`` reads of each split: windows of texts, see `cut`, or labelled rows."""
    if task.labelled:
        return labelled_rows(tokenizer, splits, length, read_config(source).label2id)
    return cut(tokenizer, splits, length, sample, task=task)


def labelled_rows(
    tokenizer: Any, splits: Mapping[str, Split], length: int, classes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Rows (W, 1 + L) for each split: the number of the class, then at most L token ids, padded to L.

    Splits take rows of a text as windows of one are taken: none twice, each spread evenly over what is free in its
    part.
    ``classes`` are the model's, by name. Raises `InputError` where a text has no such rows, or too few.
    """
    texts = {text for split in splits.values() for text in split.counts()}
    found = {text: read_rows(text, tokenizer, length, classes) for text in texts}
    taken: dict[str, set[int]] = {text: set() for text in found}
    result = {}
    for name, split in by_turns(splits):
        parts = []
        for text, count in split.counts().items():
            rows = found[text]
            start, end = (round(fraction * len(rows)) for fraction in split.part)
            free = [number for number in range(start, end) if number not in taken[text]]
            if len(free) < count:
                raise InputError(
                    f"data.{name}: part {list(split.part)} of text {text!r} has {len(free):,} rows that no other split"
                    f" took, and {count} are asked for: ask for fewer"
                )
            chosen = spread(free, count)
            taken[text].update(chosen)
            parts.append(rows[chosen])
        result[name] = torch.cat(parts)
    return result


def read_rows(name: str, tokenizer: Any, length: int, classes: Mapping[str, int]) -> Tensor:
    """All rows (N, 1 + L) of a text: a ``.jsonl`` or ``.csv`` file, or a data set of the hub; its columns are `COLUMNS`
    unless others are named, as in ``sst2.csv#sentence,label``."""
    text, columns = (name, None) if Path(name).expanduser().is_file() else column_of(name)
    wanted = tuple((columns or ",".join(COLUMNS)).split(","))
    if len(wanted) != 2:
        raise InputError(f"text {name!r} names {len(wanted)} columns: name that of the text and that of the label")
    texts, labels = [], []
    for number, row in enumerate(_rows(text, name), start=1):
        missing = [column for column in wanted if row.get(column) in (None, "")]
        if missing:
            raise InputError(
                f"row {number} of text {name!r} has no {missing[0]!r}, but {sorted(map(str, row))}: name the columns,"
                " as in my.jsonl#sentence,label"
            )
        texts.append(str(row[wanted[0]]))
        labels.append(_class_of(row[wanted[1]], classes, f"row {number} of text {name!r}"))
    if not texts:
        raise InputError(f"text {name!r} has no rows: give it some")
    if tokenizer.pad_token_id is None:
        raise InputError("the model's tokenizer has no padding token, which rows of several lengths need: give it one")
    ids = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")["input_ids"]
    return torch.cat([torch.tensor(labels)[:, None], ids], dim=1)


def _rows(text: str, name: str) -> Iterable[Mapping[str, Any]]:
    if text.startswith("hub:"):
        return hub_rows(text)
    path = Path(text).expanduser()
    if path.suffix not in (".jsonl", ".csv") or not path.is_file():
        raise InputError(
            f"text {name!r} is no file of labelled rows: name a .jsonl or .csv file, or 'hub:NAME/CONFIG:SPLIT'"
        )
    content = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return json_rows(content, name)
    csv.field_size_limit(LARGEST)
    return csv.DictReader(content.splitlines(keepends=True))


def _class_of(label: Any, classes: Mapping[str, int], where: str) -> int:
    """The number of a class that is given by number or by name."""
    known = {**{str(number): number for number in classes.values()}, **{str(k): v for k, v in classes.items()}}
    if str(label) not in known:
        raise InputError(f"{where} has label {label!r}, and the model's are {list(classes)}: mend it")
    return known[str(label)]
