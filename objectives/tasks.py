"""Tasks of the language model evaluation harness (lm-eval, an extra): the share that a model gets wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from rankfront.methods import Cost, InputError
from rankfront.objectives._objective import register
from rankfront.objectives._subject import Subject

METRICS = ("acc_norm", "acc", "exact_match", "f1")  # the first of these that a task has, where none is named
BATCH = 8  # requests at once; guess


@register
@dataclass(frozen=True)
class Tasks:
    """1 − the mean score over tasks, each in [0, 1] where 1 is best.

    Args:
        names: of tasks or groups of tasks, as lm-eval knows them.
        fewshot: examples before each question; by default the task's own number.
        limit: questions of each task, its first; by default all.
        metric: of lm-eval, such as ``acc``; by default the first of `METRICS` that a task has.
        include_path: a folder of task files beside lm-eval's own.
        search: whether every trial is scored by them. By default only members of the front are, in the end, as on the
            report split.
    """

    names: Sequence[str] = ()
    fewshot: int | None = None
    limit: int | None = None
    metric: str | None = None
    include_path: str | None = None
    search: bool = False

    name = "tasks"
    unit = "share wrong"
    logarithmic = False

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names or not all(isinstance(name, str) for name in self.names):
            raise InputError(f"objectives.tasks.names is {self.names!r}: list tasks of lm-eval, such as ['arc_easy']")
        for key, least in (("fewshot", 0), ("limit", 1)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"objectives.tasks.{key} is {value!r}: give a whole number, {least} or more")

    def value(self, subject: Subject) -> float:
        found = self.scores(subject.model, subject.tokenizer)
        return 1 - sum(found.values()) / len(found)

    def from_cost(self, cost: Cost) -> None:
        return None

    def box(self, dense: float) -> tuple[float, float]:
        return 0.0, 1.0

    def check(self) -> None:
        """Raise `InputError` where lm-eval is not installed."""
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("objectives.tasks needs lm-eval: pip install 'rankfront[tasks]', or leave the table out")

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Task -> its metric. Raises `InputError` where lm-eval has no such task or metric."""
        self.check()
        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            manager = _manager(self.include_path)
            unknown = [name for name in self.names if name not in manager.all_tasks]
            if unknown:
                raise InputError(f"lm-eval knows no task {unknown[0]!r}: `lm_eval ls tasks` lists them")
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
                tasks=list(self.names),
                num_fewshot=self.fewshot,
                limit=self.limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        results = found["results"]
        return {name: self._metric_of(name, results[name]) for name in self.names}

    def _metric_of(self, task: str, result: dict[str, Any]) -> float:
        """Results name a metric and a filter, as in ``acc,none``."""
        known = {key.partition(",")[0]: value for key, value in result.items() if isinstance(value, int | float)}
        for name in METRICS if self.metric is None else (self.metric,):
            if name in known:
                return float(known[name])
        measured = sorted(name for name in known if not name.endswith("_stderr"))
        raise InputError(f"task {task!r} has the metrics {measured}: name one as objectives.tasks.metric")


@cache
def _manager(include_path: str | None) -> Any:
    """Which tasks there are: lm-eval reads thousands of files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and nothing of what lm-eval logs: what is wrong is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
