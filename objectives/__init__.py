"""Objectives: a model or a plan in, one number out. Importing this package registers every objective."""

import importlib
import pkgutil

from rankfront.objectives._clock import Clock
from rankfront.objectives._objective import OBJECTIVES, Objective, make_objective
from rankfront.objectives._scores import TEACHER_TOP_K, Scores, Teacher, divergence_from, score, teach
from rankfront.objectives._subject import Subject

__all__ = [
    "OBJECTIVES",
    "TEACHER_TOP_K",
    "Clock",
    "Objective",
    "Scores",
    "Subject",
    "Teacher",
    "divergence_from",
    "make_objective",
    "score",
    "teach",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
