"""What others named or wrote, for a terminal or a page: nothing in it is markup, and nothing moves the cursor."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that fails need not wait for it
    from rich.text import Text

NAMED = 2  # sites that an error names


def plain(text: object) -> str:
    """``text`` in one line, with what does not print (control characters, changes of direction) as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def literal(text: object) -> Text:
    """`plain` text that rich shows as it is: brackets are no markup, ``:names:`` are no emoji."""
    from rich.text import Text

    return Text(plain(text))


def markdown(text: object) -> str:
    """`plain` text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>#|!&~])", r"\\\1", plain(text))


def without_folders(name: str) -> str:
    """``name``, or the last part of it where it is a path on this machine, ``#column`` after it or not: what is
    passed on names no folder here."""
    path, _, _ = name.rpartition("#")
    return (
        Path(name).name if os.path.exists(name) or os.path.exists(path) else name
    )  # which knows no name too long to ask


def several(sites: Sequence[str]) -> str:
    """The first few of ``sites``, and how many more there are."""
    more = f" and {len(sites) - NAMED} more" if len(sites) > NAMED else ""
    return ", ".join(sites[:NAMED]) + more
