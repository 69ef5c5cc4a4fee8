"""The error a user can cause, and the look-up that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong: one line with the invariant, the values and the remedy."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Raise `InputError` unless ``name`` is one of ``choices``, naming them and the nearest."""
    known = list(choices)
    if name not in known:
        raise InputError(f"unknown {kind} {name!r}: choose from {', '.join(known)}{nearest(name, known)}")
