"""Search: launch studies, read fronts, export plans."""

from rankfront.search.config import StudyConfig
from rankfront.search.plans.plan import Plan
from rankfront.search.storage.front import Row
from rankfront.search.study import Study

__all__ = ["Plan", "Row", "Study", "StudyConfig"]
