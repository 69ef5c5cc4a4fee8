"""What others named or wrote, for a terminal: nothing in it is markup, and nothing moves the cursor."""

from __future__ import annotations

from rich.text import Text


def plain(text: object) -> str:
    """``text`` in one line, with what does not print (control characters, changes of direction) as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def literal(text: object) -> Text:
    """`plain` text that rich shows as it is: brackets are no markup, ``:names:`` are no emoji."""
    return Text(plain(text))
