"""The scheduler: what is measured next, and what becomes of it. Both executors, in process and Ray, talk to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import optuna

from rankfront.search import attributes as keys
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig
from rankfront.search.errors import GaveUp, place_of, reason_of
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.space import Space
from rankfront.search.run.budget import Budget
from rankfront.search.run.in_flight import InFlight
from rankfront.search.run.phase import Phase
from rankfront.search.run.preparation import Preparation
from rankfront.search.run.rankfront_strategy import RankfrontStrategy
from rankfront.search.run.recovery import recover
from rankfront.search.run.reports import ReportQueue
from rankfront.search.run.retries import ATTEMPTS, MAX_ALIKE, MAX_LOST, Retries
from rankfront.search.run.strategy import OptunaStrategy, Strategy
from rankfront.search.run.trials import Trials
from rankfront.search.storage.front import Row, StudyReader, StudyState

log = logging.getLogger(__name__)


@dataclass
class Stop:
    """What Ctrl-C asks for.

    Python drops a KeyboardInterrupt that arrives in a finaliser, so the handler only makes a request, which is looked
    at wherever it is safe to stop: between batches, sites and trials, and a few times a second while Ray works.
    """

    requested: bool = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop is requested."""
        if self.requested:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Status:
    """How far a launch has come: the study's rows, trials and tokens that count against the limits, seconds since the
    launch began to measure, whether it only measures reports from now on, and what is measured before anything is
    proposed: its kind, how many of those jobs are done, and how many there are as far as is known."""

    config: StudyConfig
    rows: Sequence[Row]
    spent: int
    tokens: int
    elapsed: float
    closed: bool
    preparing: tuple[str, int, int] | None = None


Listener = Callable[[Status], None]


class Scheduler:
    """Hands out what is measured next and records what came back. Optuna's storage is its only state.

    First what the strategy needs, the anchors among it, then what its sampler proposes, until the limits are reached;
    last, the front members that have no perplexity on the report split yet. With ``only``, nothing is measured but the
    plan of that trial.

    A job whose worker died, or that ran out of memory, is measured again, `ATTEMPTS` times in all; then it has failed,
    and the next launch tries it again. A job that fails otherwise has failed. Without the dense model the launch ends,
    and where the workers of `MAX_LOST` jobs in succession died at every attempt; see `Retries`.

    What decides has names of its own: budget, strategy, trials, preparation, reports, retries. What is left is long
    because both executors talk to this class alone, and it to all of those.

    The study is read where `next` and `finish` begin, and again where one of them has written what it then decides by;
    what decides is a function of what was read.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        space: Space,
        origin: dict[str, str],
        listener: Listener,
        report: bool = True,
        stop: Stop | None = None,
        only: int | None = None,
    ) -> None:
        self.study = study
        self.config = config
        self.listener = listener
        self.stop = stop or Stop()
        self.only = only
        self.budget = Budget.of(config)
        self.in_flight = InFlight()
        self.reports = ReportQueue(study, config, report, self.in_flight)
        self.retries = Retries()
        self.started = time.monotonic()
        self._reader = StudyReader(study, list(config.objectives))
        recover(study, again=only is None)
        state = self.state()
        if config.search.sampler == OURS:
            slope_tokens = partial(self.budget.slope_tokens, running=self.in_flight)
            self.strategy: Strategy = RankfrontStrategy(study, config, space, slope_tokens, state)
        else:
            self.strategy = OptunaStrategy(study, config, space, len(state.trials))
        self.trials = Trials(study, config, origin, self.strategy, self.in_flight)
        self.preparation = Preparation(self.strategy, self.budget, self.in_flight)
        self._advance(state)

    # -- how far it has come

    def state(self) -> StudyState:
        """The study as it is: read now."""
        return self._reader.read()

    def _phase(self) -> Phase:
        """The study as it is and what of its limits is left: read now."""
        state = self.state()
        time_limit = self.config.search.time
        in_time = time_limit is None or self.elapsed < time_limit
        return Phase(state, self.budget.left(state, self.in_flight), in_time, self.only, self.trials.exhausted)

    def status(self) -> Status:
        """How far the launch has come."""
        phase = self._phase()
        closed = not self.in_flight.trials and not phase.searching
        preparing = None if closed else self.preparation.progress(phase.state)
        state = phase.state
        return Status(self.config, state.rows, state.spent, state.tokens, self.elapsed, closed, preparing)

    def begin(self) -> None:
        """Start the clock of this launch's time limit."""
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since this launch began to measure."""
        return time.monotonic() - self.started

    @property
    def done(self) -> bool:
        """Nothing is running and nothing is left to start."""
        if self.in_flight.trials or self.in_flight.reports:
            return False
        phase = self._phase()
        return not phase.searching and not self.reports.due(phase.state)

    # -- ask

    def next(self) -> Job | None:
        """The next thing to measure, or None: look at `done` to tell "wait" from "finished".

        Raises KeyboardInterrupt once a stop is requested.
        """
        self.stop.check()
        begun = time.monotonic()
        again = self.retries.next()
        if again is not None:
            return again
        phase = self._phase()
        if self.preparation.failure is not None:
            return self.trials.next(phase, begun, self._phase) if self.preparation.names_dense(phase) else None
        if phase.searching and phase.exploring:
            jobs = self.strategy.jobs(phase.state)
            job = self.preparation.next(jobs)
            if job is not None or self.preparation.alone(jobs):
                return job
            if self.strategy.fill(phase.state):
                phase = self._phase()
        found = self.trials.next(phase, begun, self._phase) if phase.searching else None
        if found is None and not self.in_flight.trials:
            phase = self._phase()
            return None if phase.searching else self.reports.next(phase.state)
        return found

    # -- tell

    def finish(self, job: Job, record: Record) -> None:
        """Record what measuring ``job`` gave, or have it measured again where it was ``lost``.

        Raises `InputError` for a cause that would fail every trial, `GaveUp` where it is not the user's, and where
        trials fail alike one after another.
        """
        if keys.LOST not in record:
            self.retries.measured()
        elif self.retries.again(job):
            return
        else:
            record = record | {keys.FAILURE: f"{record[keys.FAILURE]}; {ATTEMPTS} attempts"}
        if job.kind == "report":
            self.reports.finish(job.number, record)
        elif job.kind in ("menu", "timing"):
            self._finish_preparation(job, record)
        else:
            self._finish_trial(job, record)
        self._tell(self.status())

    def _tell(self, status: Status) -> None:
        """Have the listener hear how far the launch has come; what goes wrong there is said, and ends nothing."""
        try:
            self.listener(status)
        except Exception as error:  # noqa: BLE001 - nothing that is shown is worth a study
            log.warning("progress cannot be shown (%s, at %s)", reason_of(error), place_of(error))

    def _finish_preparation(self, job: Job, record: Record) -> None:
        if self.preparation.finish(job, record, self.state()):
            self._advance(self.state())
            if job.kind == "menu":
                self.preparation.check_tokens(self._phase())

    def _finish_trial(self, job: Job, record: Record) -> None:
        self.trials.finish(job, record)
        if job.kind != "trial":
            return
        if keys.FAILURE not in record:
            self.retries.succeeded()
            self._advance(self.state())
        elif self.retries.failed(record):
            raise GaveUp(
                f"{MAX_ALIKE} trials in succession failed alike, at {record[keys.PLACE]} ({record[keys.FAILURE]}):"
                " unless that is code of the model's own, it is a defect of rankfront"
            )

    def _advance(self, state: StudyState) -> None:
        """Have the strategy queue what has become possible, unless one plan alone is measured."""
        if self.only is None:
            self.strategy.advance(state)

    def lost(self, job: Job, reason: str) -> None:
        """The worker that measured ``job`` died: as `finish`. Raises `GaveUp` where they die whatever they measure."""
        self.finish(job, {keys.FAILURE: reason, keys.LOST: True})
        if self.retries.hopeless(job):
            raise GaveUp(
                f"workers died at every attempt of {MAX_LOST} jobs in succession ({reason}): give a trial more memory,"
                " or use --workers 0"
            )

    def abandon(self) -> None:
        """Mark what still runs as interrupted; it is measured again at the next launch."""
        self.trials.abandon()
