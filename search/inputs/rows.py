"""Texts that come in rows: data sets of the hub, and files of JSON lines; of plain text, or of conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from rankfront.methods import InputError

Rows = Iterable[Mapping[str, Any]]
COLUMNS = ("text", "messages")  # what is read where no column is named, the first that there is


def hub_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of ``hub:NAME/CONFIG:SPLIT``. Of ``SPLIT[:N]`` the first N, which are all that is fetched.

    Raises `InputError` where it cannot be loaded.
    """
    match = re.fullmatch(r"hub:(?P<name>.+)/(?P<config>[^/:]+):(?P<split>[^:\[]+)(?:\[:(?P<first>\d+)\])?", name)
    if match is None:
        raise InputError(
            f"text {name!r} does not read as 'hub:NAME/CONFIG:SPLIT', such as 'hub:org/set/default:train', or"
            " 'hub:org/set/default:train[:1000]' for its first rows"
        )
    import datasets

    datasets.disable_progress_bars()
    first = int(match["first"]) if match["first"] else None
    try:
        found = datasets.load_dataset(match["name"], match["config"], split=match["split"], streaming=first is not None)
        yield from islice(found, first)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"text {name!r} cannot be loaded ({reason}): check the name, or use a local file") from error


def json_rows(content: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of JSON lines, empty lines left out; `InputError` with the line that is no JSON object."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"line {number} of text {name!r} is no JSON ({error}): mend or remove it") from error
            if not isinstance(row, dict):
                raise InputError(f'line {number} of text {name!r} is no JSON object: write {{"text": ...}}')
            yield row


def text_of(rows: Rows, column: str | None, name: str, tokenizer: Any) -> str:
    """What stands in ``column``, by default in the first of `COLUMNS` that there is; rows without it are left out.

    Texts are put together with an empty line between; a conversation, a list of ``{"role": ..., "content": ...}``, is
    what the tokenizer's chat template makes of it. Raises `InputError` where no row has the column, or there is no
    template.
    """
    parts: list[str] = []
    seen: dict[str, None] = {}
    for row in rows:
        value = row.get(column) if column is not None else next((row[c] for c in COLUMNS if row.get(c)), None)
        seen |= dict.fromkeys(row)
        if value:
            parts.append(f"{value}\n\n" if isinstance(value, str) else conversation(value, name, tokenizer))
    if not parts:
        wanted = " or ".join(COLUMNS) if column is None else column
        raise InputError(f"text {name!r} has no row with {wanted}, but {list(seen)}: name a column, as TEXT#COLUMN")
    return "".join(parts).removesuffix("\n\n")


def conversation(messages: Any, name: str, tokenizer: Any) -> str:
    """One conversation by the tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"text {name!r} holds conversations, and the model's tokenizer has no chat template to write them by: name"
            " a column of plain text, as TEXT#COLUMN"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise InputError(
            f"text {name!r} holds a conversation that the chat template refuses ({error}): leave it out"
        ) from error
