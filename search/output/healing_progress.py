"""What the terminal shows of a healing: tokens, loss, divergence closed, time left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from rankfront.search.heal.status import StageResult, Status

LINES = 10  # printed of a healing where there is no terminal


class HealingProgress:
    """A live line on ``console`` while it is entered; without a terminal, a line for every tenth of the tokens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("heal {task.description:<7}"), BarColumn(), TextColumn("{task.fields[status]}", markup=False),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.printed = 0

    def __enter__(self) -> HealingProgress:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def show(self, status: Status) -> None:
        """Draw ``status``."""
        line = said(status)
        if self.task is None:
            self.task = self.bar.add_task(status.stage, total=status.tokens, status=line)
        self.bar.update(self.task, description=status.stage, completed=status.done, status=line)
        tenth = LINES * status.done // status.tokens
        if not self.console.is_terminal and tenth > self.printed:
            self.printed = tenth
            self.console.print(f"heal {status.stage}: {line}", soft_wrap=True, markup=False, highlight=False)


def said(status: Status) -> str:
    """One line."""
    left = "" if math.isnan(status.left) else f", {timedelta(seconds=round(status.left))} left"
    return f"{status.done:,} of {status.tokens:,} tokens, loss {status.loss:.4g}, {status.closed:.0%} closed{left}"


def summary(results: Sequence[StageResult]) -> Iterator[str]:
    """A line for each stage."""
    for r in results:
        pace = f"{r.tokens / r.seconds:,.0f} tokens a second" if r.seconds > 0 else "before"
        yield (
            f"{r.stage}: {r.tokens:,} tokens ({pace}), held-out divergence {r.before:.4f} -> {r.after:.4f} nats a"
            f" token{'' if r.note is None else f'; {r.note}'}"
        )
