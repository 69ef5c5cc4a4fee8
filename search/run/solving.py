"""Answering a budget: the plan expected to be best within some limits, and one more trial that measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.optimise.answer import Answer
from rankfront.search.plans.latency_table import timed_objectives
from rankfront.search.run.launch import Launch
from rankfront.search.storage.checked import close
from rankfront.search.storage.folder import Run
from rankfront.search.storage.front import Row
from rankfront.search.storage.picking import holds
from rankfront.search.storage.trials import enqueue

SOLVES = 3  # plans measured for an answer at most, where tables predict a latency too low


def solve(
    run: Run,
    config: StudyConfig,
    constraints: Sequence[str],
    expected: Callable[[], Answer],
    console: Console | None,
    report: bool = True,
) -> None:
    """Measure the plan that is ``expected`` to be best, unless it was measured before. Where a latency turns out above
    its limit though its table predicted otherwise, what is expected then is measured too, `SOLVES` plans in all at
    most."""
    every = [Constraint.parse(text) for text in (*config.search.where, *constraints)]
    timed = [limit for limit in every if limit.figure in timed_objectives(config.objectives)]
    found = expected()
    for tries_left in reversed(range(SOLVES)):
        row = _measure(run, config, found, constraints, console, report)
        if found.trial is not None or row is None or all(holds(row, limit) for limit in timed) or not tries_left:
            return
        try:
            found = expected()
        except InputError:  # nothing more is expected to meet them: what was measured decides
            return


def _measure(
    run: Run, config: StudyConfig, found: Answer, constraints: Sequence[str], console: Console | None, report: bool
) -> Row | None:
    """The trial that measured what was found for ``constraints``; None where it failed.

    It is a launch of that one trial, for what surrounds it is that of any launch: the lock, what is tried again, the
    report, Ctrl-C.
    """
    if found.trial is None:
        with run.lock():
            storage = run.study(config, write=True)
            known = {keys.ORIGIN: "solve", keys.LABEL: " ".join(constraints), keys.PREDICTED: found.predicted}
            number = enqueue(storage, found.draws, known)
            close(storage)
        trials = run.read(config)[0].spent + 1
        limits = {"trials": trials, "tokens": None, "time": None, "workers": 0}
        search = config.search.model_copy(update=limits)
        config = config.model_copy(update={"search": search})
        Launch(run, config, report=report, only=number).measure(console)
    measured = (row for row in run.read(config)[0].rows if row.plan_key == found.plan.key and row.state == "complete")
    return next(measured, None)
