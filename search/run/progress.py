"""What the terminal shows of a launch: bars of its phases, then a live line of the search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rankfront.search.attributes import BLOCK_PARAMETERS
from rankfront.search.constraint import Constraint
from rankfront.search.factors.store import FactorStore
from rankfront.search.optimise.accuracy import Calibration, calibration_of
from rankfront.search.plain import literal
from rankfront.search.quantities import said_time
from rankfront.search.run.scheduler import Status
from rankfront.search.storage.front import comparable, front_of
from rankfront.search.storage.picking import holding

BUDGETS = (
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
)  # kept fractions of the blocks at which the live line names the best so far
TRIALS, TOKENS = "search (trials)", "search (tokens)"
PHASES = {
    "sample": "sample own text",
    "load": "load the model",
    "calibrate": "calibrate (windows)",
    "factor": "factor (sites)",
    "timing": "time options",
    "gradient": "differentiate (windows)",
    "menu": "predict (jobs)",
    "slopes": "measure slopes (windows)",
    "report": "measure the report split",
}
EVERY = 30.0  # seconds between lines of a log about one phase; guess
WORTH = 5.0  # seconds that a phase takes at least for a log to say how long it took; guess


@dataclass
class _Phase:
    """One that was begun: its bar, when it began and a log last spoke of it; since when it has its ``total``, and how
    much was done then."""

    bar: TaskID
    began: float
    spoke: float
    since: float
    first: int
    total: int
    done: int = 0

    def left(self, now: float) -> float | None:
        """Seconds that the rest takes at the pace until ``now``; None where nothing is done yet, or nothing left."""
        done = self.done - self.first
        return (now - self.since) * (self.total - self.done) / done if done > 0 and self.done < self.total else None


class Display:
    """Draws on ``console`` while it is entered: a bar for every phase, with the time that is left.

    Without a terminal it prints lines instead: one where a phase begins, one every `EVERY` seconds while it goes on,
    one where it ends after more than `WORTH` seconds, and one for each finished trial. ``clock`` gives seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.phases: dict[str, _Phase] = {}
        self.reported = 0

    def __enter__(self) -> Display:
        self.bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.__exit__(kind, error, trace)

    def phase(self, name: str, done: int, total: int, status: str = "") -> None:
        """Show ``done`` of ``total`` in a phase; it begins with its first call, and anew where it was done before."""
        now, title = self.clock(), PHASES.get(name, name)
        phase = self.phases.get(name)
        if phase is None:
            bar = self.bars.add_task(title, total=total, status=status, left="")
            phase = self.phases[name] = _Phase(bar, now, now, now, done, total)
            self._line(name, f"{title} ...")
        elif phase.done == phase.total and done < total:
            phase.began = phase.spoke = phase.since = now
            phase.first = done
        elif total != phase.total:  # what came before says little of the rest
            phase.since, phase.first = now, done
        ended = phase.done < phase.total and done >= total
        phase.done, phase.total = done, total
        left = phase.left(now)
        remaining = "" if left is None else f"{said_time(left)} left"
        self.bars.update(phase.bar, completed=done, total=total, status=status, left=remaining)
        if ended and now - phase.began >= WORTH:
            self._line(name, f"{title}: {total} in {said_time(now - phase.began)}")
        elif done < total and now - phase.spoke >= EVERY:
            phase.spoke = now
            self._line(name, ", ".join(filter(None, [f"{title}: {done} of {total}", remaining])))

    def _line(self, name: str, text: str) -> None:
        """Say something of a phase in a log; trials have lines of their own."""
        if not self.console.is_terminal and name in PHASES:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def unmade(self, store: FactorStore) -> None:
        """Say what could not be factored in this launch."""
        if store.unmade:
            path, reason = next(iter(store.unmade.items()))
            said = (
                f"{len(store.unmade)} factorisations failed, as will trials that want them; the next launch tries again"
                f" ({path.parent.name}/{path.stem}: {reason})"
            )
            self.say(said)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(literal(text), soft_wrap=True)

    def search(self, status: Status) -> None:
        """What is predicted of, then the live line: trials done, front size, best at each budget, time left."""
        for name in ("timing", "menu"):
            if status.preparing is not None and status.preparing[0] == name:
                self.phase(*status.preparing)
            elif name in self.phases:
                self.phase(name, self.phases[name].total, self.phases[name].total)
        if status.preparing is not None:
            return
        limits = status.config.search
        line = line_of(status, calibration_of(status.config, status.rows))
        name, done, total = _nearest_limit(status)
        self.phase(name, done, total, line)
        if status.closed:
            front = front_of(status.rows)
            self.phase("report", sum(row.report is not None for row in front), len(front))
        if not self.console.is_terminal and status.spent > self.reported:
            self.reported = status.spent
            left = self.phases[name].left(self.clock())
            line = line if left is None or limits.time is not None else f"{line} · {said_time(left)} left"
            far = f"{status.spent}/{total}" if name == TRIALS else f"{status.spent}, {done:,} of {total:,} tokens"
            self.console.print(f"trial {far}  {line}", soft_wrap=True)


def _nearest_limit(status: Status) -> tuple[str, int, int]:
    """(Its name, what is done of it, itself) of trials or tokens: that which ends a study of trials alone first."""
    config, limits = status.config, status.config.search
    if limits.tokens is None or limits.trials * config.trial_windows * config.data.length <= limits.tokens:
        return TRIALS, status.spent, limits.trials
    return TOKENS, min(status.tokens, limits.tokens), limits.tokens


def _left(status: Status) -> str:
    limit = status.config.search.time
    if limit is None:
        return ""
    minutes, seconds = divmod(round(max(0.0, limit - status.elapsed)), 60)
    return f"{minutes}:{seconds:02d} left"


def _best_within(status: Status) -> str:
    """The best so far within the study's limits."""
    limits = [Constraint.parse(text) for text in status.config.search.where]
    met = holding(comparable(status.rows), limits)
    if not met:
        return "none within the limits yet"
    first = next(iter(status.config.objectives))
    best = min(met, key=lambda row: row.values[first])
    return f"best {first} within {' and '.join(map(str, limits))}: {best.values[first]:.4g} (trial {best.number})"


def _best_at_budgets(status: Status) -> str:
    """The best so far at each of `BUDGETS`."""
    first, best = next(iter(status.config.objectives)), []
    for budget in BUDGETS:
        within = [r.values[first] for r in comparable(status.rows) if r.attributes[BLOCK_PARAMETERS] <= budget]
        if within:
            best.append(f"{budget:g}: {min(within):.4g}")
    return f"best {first} at keep {', '.join(best)}" if best else ""


def line_of(status: Status, calibrated: Calibration | None) -> str:
    """Front size, the best within the limits or at each budget, how well predictions held, time left, failures."""
    failed = sum(1 for row in status.rows if row.state == "failed" and row.counts)
    held = f"predictions hold to {calibrated.brief}" if calibrated else ""
    if calibrated and calibrated.poor:
        held += " (poor: trust the measured trials)"
    parts = [
        f"front {len(front_of(status.rows))}",
        _best_within(status) if status.config.search.where else _best_at_budgets(status),
        held,
        _left(status),
        f"{failed} failed" if failed else "",
    ]
    return " · ".join(filter(None, parts))
