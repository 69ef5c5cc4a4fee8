"""Search: launch studies, read fronts, export plans."""

from rankfront.search.config import StudyConfig
from rankfront.search.front import Row
from rankfront.search.plan import Plan
from rankfront.search.study import Study

__all__ = ["Plan", "Row", "Study", "StudyConfig"]
