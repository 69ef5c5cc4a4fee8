"""The error a user can cause, and the look-up that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 80  # characters of a value


class InputError(ValueError):
    """Something the user gave is wrong: one line with the invariant, the values and the remedy."""


def shown(value: object) -> str:
    """``value`` as an error shows it, its beginning where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of integers with thousands of digits, and of what is nested as deep
        return "a value too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Raise `InputError` unless ``name`` is one of ``choices``, naming them and the nearest."""
    known = list(choices)
    if name not in known:
        raise InputError(f"unknown {kind} {name!r}: choose from {', '.join(known)}{nearest(name, known)}")
