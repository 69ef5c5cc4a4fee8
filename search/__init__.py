"""Search: launch studies, read fronts, export plans. Each name is imported when it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from rankfront.search.config import StudyConfig
    from rankfront.search.plans.plan import Plan
    from rankfront.search.storage.front import Row
    from rankfront.search.study import Study

__all__ = ["Plan", "Row", "Study", "StudyConfig"]
PLACES = {"Plan": "plans.plan", "Row": "storage.front", "Study": "study", "StudyConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
