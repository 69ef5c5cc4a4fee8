"""What the terminal shows of a healing: tokens, loss, divergence closed, time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from rankfront.search.heal.healing import Show
from rankfront.search.heal.status import StageResult, Status
from rankfront.search.plain import literal

Line = Callable[[], AbstractContextManager[Show]]
Say = Callable[[str], None]
LINES = 10  # printed of a healing where there is no terminal


@contextmanager
def progress_line(console: Console) -> Iterator[Show]:
    """Within, what it gives draws a live line on ``console``; without a terminal, one for every tenth of the tokens."""
    bar = Progress(
        TextColumn("heal {task.description:<7}"), BarColumn(), TextColumn("{task.fields[status]}", markup=False),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task: TaskID | None = None
    printed = 0

    def show(status: Status) -> None:
        nonlocal task, printed
        line = said(status)
        if task is None:
            task = bar.add_task(status.stage, total=status.tokens, status=line)
        bar.update(task, description=status.stage, completed=status.done, status=line)
        tenth = LINES * status.done // status.tokens
        if not console.is_terminal and tenth > printed:
            printed = tenth
            console.print(f"heal {status.stage}: {line}", soft_wrap=True, markup=False, highlight=False)

    with bar:
        yield show


def lines_on(console: Console | None) -> tuple[Line, Say]:
    """On ``console``, by default standard error: a live line for each of several healings, and plain lines."""
    console = console or Console(stderr=True)

    def say(line: str) -> None:
        console.print(literal(line), soft_wrap=True)

    return lambda: progress_line(console), say


def said(status: Status) -> str:
    """One line."""
    left = "" if math.isnan(status.left) else f", {timedelta(seconds=round(status.left))} left"
    now = f"{status.closed:.0%} closed" if status.measure == "divergence" else f"held-out {status.now:.4g}"
    return f"{status.done:,} of {status.tokens:,} tokens, loss {status.loss:.4g}, {now}{left}"


def summary(results: Sequence[StageResult], measure: str = "divergence") -> Iterator[str]:
    """A line for each stage."""
    for r in results:
        pace = f"{r.tokens / r.seconds:,.0f} tokens a second" if r.seconds > 0 else "before"
        yield (
            f"{r.stage}: {r.tokens:,} tokens ({pace}), held-out {measure} {r.before:.4f} -> {r.after:.4f} nats a"
            f" token{'' if r.note is None else f'; {r.note}'}"
        )
