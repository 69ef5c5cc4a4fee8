"""What the terminal shows: bars for calibration and factorisation, then a live line of the search."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rankfront.search.attributes import BLOCK_PARAMETERS
from rankfront.search.factors.store import FactorStore
from rankfront.search.optimise.accuracy import Calibration, calibration_of
from rankfront.search.plain import literal
from rankfront.search.run.scheduler import Status
from rankfront.search.storage.front import comparable, front_of

BUDGETS = (
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
)  # kept fractions of the blocks at which the live line names the best so far
PHASES = {
    "sample": "sample own text",
    "load": "load the model",
    "calibrate": "calibrate (windows)",
    "factor": "factor (sites)",
    "report": "measure the report split",
}


class Display:
    """Draws on ``console`` while it is entered. Without a terminal it prints a line per finished trial instead."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.reported = 0

    def __enter__(self) -> Display:
        self.bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.__exit__(kind, error, trace)

    def phase(self, name: str, done: int, total: int, status: str = "") -> None:
        """Show ``done`` of ``total`` in a phase; the bar appears with its first call."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(PHASES.get(name, name), total=total, status=status)
            if not self.console.is_terminal and name in PHASES:
                self.console.print(f"{PHASES[name]} ...")
        self.bars.update(self.tasks[name], completed=done, total=total, status=status)

    def unmade(self, store: FactorStore) -> None:
        """Say what could not be factored in this launch."""
        if store.unmade:
            path, reason = next(iter(store.unmade.items()))
            said = (
                f"{len(store.unmade)} factorisations failed, as will trials that want them; the next launch tries again"
                f" ({path.parent.name}/{path.stem}: {reason})"
            )
            self.console.print(literal(said), soft_wrap=True)

    def search(self, status: Status) -> None:
        """The live line: trials done, front size, best at each budget, time left."""
        limits = status.config.search
        line = line_of(status, calibration_of(status.config, status.rows))
        self.phase("search (trials)", status.spent, limits.trials, line)
        if status.closed:
            front = front_of(status.rows)
            self.phase("report", sum(row.report is not None for row in front), len(front))
        if not self.console.is_terminal and status.spent > self.reported:
            self.reported = status.spent
            self.console.print(f"trial {status.spent}/{limits.trials}  {line}", soft_wrap=True)


def _left(status: Status) -> str:
    limit = status.config.search.time
    if limit is None:
        return ""
    minutes, seconds = divmod(round(max(0.0, limit - status.elapsed)), 60)
    return f"{minutes}:{seconds:02d} left"


def line_of(status: Status, calibrated: Calibration | None) -> str:
    """Front size, best at each budget, how well predictions held, time left, failures."""
    rows, first = status.rows, next(iter(status.config.objectives))
    measured = comparable(rows)
    best = []
    for budget in BUDGETS:
        within = [row.values[first] for row in measured if row.attributes[BLOCK_PARAMETERS] <= budget]
        if within:
            best.append(f"{budget:g}: {min(within):.4g}")
    failed = sum(1 for row in rows if row.state == "failed" and row.counts)
    held = f"predictions hold to {calibrated.brief}" if calibrated else ""
    if calibrated and calibrated.poor:
        held += " (poor: trust the measured trials)"
    parts = [
        f"front {len(front_of(rows))}",
        f"best {first} at keep {', '.join(best)}" if best else "",
        held,
        _left(status),
    ]
    return " · ".join(part for part in [*parts, f"{failed} failed" if failed else ""] if part)
