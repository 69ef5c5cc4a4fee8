"""What ends a command without being the user's mistake; no import needs to be waited for to catch it."""

from __future__ import annotations


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during a launch: everything finished is kept."""


class GaveUp(Exception):
    """Memory is short or workers die, and nothing is left to go on with: no fault of the user's input."""


class ExportError(Exception):
    """The export could not be written or did not verify. Nothing is left behind."""
