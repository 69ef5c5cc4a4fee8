"""A study as TOML with a comment at every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

COMMENTS = {
    "model.dtype": "what trials run in, and the export is stored in",
    "model.device": "cpu, cuda or cuda:N",
    "model.trust_remote_code": "runs Python code that comes with the model",
    "data.length": "tokens of a window",
    "data.calibrate": "what the methods' statistics are collected on",
    "data.search": "what trials are scored on, and predictions are made from",
    "data.report": "what the front is measured on in the end; nothing before reads it",
    "data.control": "a text of another domain, on which a plan must not lose much more",
    "data.heal": "what is trained on; none of these windows is read elsewhere",
    "space.methods": "what may be done to a weight: docs/methods.md",
    "space.keep": "kept fractions of a weight to choose from",
    "space.servable": "every plan stays as small in this format: docs/serve.md",
    "search.trials": "plans to measure; more find better ones",
    "search.trial_tokens": "what each of them reads of the search split; the rest is for predictions",
    "search.where": "limits that the search keeps to",
    "search.anchors": "kept fractions at which a method is measured everywhere alike, to compare with",
    "search.seed": "of everything random",
    "search.time": "how long to search",
    "heal.tokens": "that are trained on, passes counted",
}
TABLES = {
    "data": (
        'A text is "self" (what the dense model samples), "pydoc" (CPython\'s language reference), a file, or'
        " hub:NAME/CONFIG:SPLIT."
    ),
    "objectives": "Two or more, all minimised. Exports take the best in the first.",
    "heal": "How exports are trained: docs/heal.md.",
}
COLUMN = 34  # that comments start at; those of longer lines stand above


def to_toml(data: Mapping[str, Any], heading: str) -> str:
    """``data``, tables of plain values or of tables, after ``heading``, whose lines become comments."""
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for name, table in data.items():
        lines += ["", *_table(name, table)]
    return "\n".join(lines) + "\n"


def _table(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    if name in TABLES:
        yield f"# {TABLES[name]}"
    if name == "objectives" and table:
        for objective, settings in table.items():
            yield f"[{name}.{objective}]"
            yield from (f"{key} = {_value(value)}" for key, value in settings.items())
        return
    yield f"[{name}]"
    for key, value in table.items():
        line, comment = f"{key} = {_value(value)}", COMMENTS.get(f"{name}.{key}")
        if comment is not None and len(line) > COLUMN:
            yield f"# {comment}"
            comment = None
        yield line if comment is None else f"{line:<{COLUMN}}  # {comment}"


def _value(value: Any) -> str:
    """``value`` as TOML, in one line; strings are those of JSON, which TOML reads."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    return json.dumps(value)
