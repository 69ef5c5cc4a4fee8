"""What ends a command without being the user's mistake; no import needs to be waited for to catch it."""

from __future__ import annotations

import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "site-packages"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during a launch: everything finished is kept."""


class GaveUp(Exception):
    """Memory is short, workers die or trials fail alike, and nothing is left to go on with: no fault of the user's
    input."""


class ExportError(Exception):
    """The export could not be written or did not verify. Nothing is left behind."""


class Unwritable(ExportError):
    """The disk did not take it, as when it is full: nor would it take another."""


def reason_of(error: BaseException) -> str:
    """One line: the class and the first line of the message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def place_of(error: BaseException) -> str:
    """``search/measure/runner.py:147``: the innermost frame that the error went through, torch's own left out."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename] or list(frames)
    if not own:
        return ""
    file = Path(own[-1].filename).resolve()
    if file.is_relative_to(ROOT):
        return f"{file.relative_to(ROOT)}:{own[-1].lineno}"
    inside = file.parts[file.parts.index(PACKAGES) + 1 :] if PACKAGES in file.parts else file.parts[-1:]
    return f"{'/'.join(inside)}:{own[-1].lineno}"
