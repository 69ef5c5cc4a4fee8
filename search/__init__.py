"""Search: launch studies, read fronts, export plans. Each name is imported when it is used."""

from typing import TYPE_CHECKING

from rankfront.methods._lazy import lazy

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from rankfront.search.config import StudyConfig
    from rankfront.search.plans.plan import Plan
    from rankfront.search.storage.front import Row
    from rankfront.search.study import Study

__all__ = ["Plan", "Row", "Study", "StudyConfig"]
PLACES = {"Plan": "plans.plan", "Row": "storage.front", "Study": "study", "StudyConfig": "config"}


__getattr__ = lazy(__name__, PLACES)
