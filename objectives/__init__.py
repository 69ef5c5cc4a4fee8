"""Objectives: a model or a plan in, one number out. Importing this package registers every objective, without torch."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from rankfront.methods._lazy import lazy
from rankfront.objectives._clock import Clock
from rankfront.objectives._model_task import CAUSAL, Task
from rankfront.objectives._objective import OBJECTIVES, Objective, make_objective
from rankfront.objectives._subject import Subject

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from rankfront.objectives._generation import compiled, generate
    from rankfront.objectives._scores import TEACHER_TOP_K, Scores, Teacher, divergence_from, score, teach

__all__ = [
    "CAUSAL",
    "OBJECTIVES",
    "TEACHER_TOP_K",
    "Clock",
    "Objective",
    "Scores",
    "Subject",
    "Task",
    "Teacher",
    "compiled",
    "divergence_from",
    "generate",
    "make_objective",
    "score",
    "teach",
]

NEED_TORCH = {  # name -> the file that has it
    **dict.fromkeys(("compiled", "generate"), "_generation"),
    **dict.fromkeys(("TEACHER_TOP_K", "Scores", "Teacher", "divergence_from", "score", "teach"), "_scores"),
}


__getattr__ = lazy(__name__, NEED_TORCH)


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
