"""The driver: ask the sampler, tell the storage. Both executors, in process and Ray, talk to it."""

from __future__ import annotations

import time
from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from rankfront.search.config import StudyConfig
from rankfront.search.front import Row, front_of, rows_of
from rankfront.search.sampler import make_sampler
from rankfront.search.space import Space
from rankfront.search.trial import Job, Record

INTERRUPTED = "interrupted: the launcher or its worker stopped before the trial was done"
MAX_REPEATS = 20  # proposals in a row that were measured before: then the space is taken to be exhausted
MAX_DEAD = 3  # workers in a row that died without finishing anything

Listener = Callable[["Driver"], None]


class Driver:
    """Decides what is measured next and records what came back. Optuna's storage is its only state.

    First the anchors, then what the sampler proposes, until the limits are reached; last, the front members
    that have no perplexity on the report split yet.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        space: Space,
        origin: dict[str, str],
        listener: Listener,
    ) -> None:
        self.study = study
        self.config = config
        self.space = space
        self.origin = origin
        self.listener = listener
        self.started = time.monotonic()
        self.running: dict[int, optuna.Trial] = {}
        self.reporting: set[int] = set()
        self.dead = 0
        self.exhausted = False
        self._close_orphans()
        self.seen = {row.plan_key for row in self.rows() if row.state == "complete"}
        study.sampler = make_sampler(config.search.sampler, config.search.seed, len(study.trials))
        self._enqueue_anchors()

    def rows(self) -> list[Row]:
        """Every trial so far."""
        return rows_of(self.study, list(self.config.objectives))

    # -- what is left from an earlier launch

    def _close_orphans(self) -> None:
        """Trials that a killed launcher left running can never be told: mark them failed, with the reason."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._fail(optuna.Trial(self.study, trial._trial_id), INTERRUPTED)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("failure", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def _enqueue_anchors(self) -> None:
        """Queue the anchors that were neither measured nor are waiting; an interrupted one is due again."""
        settled = {
            trial.user_attrs.get("anchor")
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state in (TrialState.COMPLETE, TrialState.WAITING, TrialState.PRUNED)
            or (trial.state == TrialState.FAIL and trial.user_attrs.get("failure") != INTERRUPTED)
        }
        for anchor in self.space.anchors(self.config.search.anchors):
            if anchor.label not in settled:
                attributes = {"origin": "anchor", "anchor": anchor.label}
                self.study.enqueue_trial(self.space.anchor_parameters(anchor), user_attrs=attributes)

    # -- ask

    def begin(self) -> None:
        """Start the clock of this launch's time limit."""
        self.started = time.monotonic()

    @property
    def spent(self) -> int:
        """Trials that count against the limit: finished ones, and failed ones that failed by themselves."""
        return sum(1 for row in self.rows() if row.counts)

    @property
    def elapsed(self) -> float:
        """Seconds since this launch began to measure."""
        return time.monotonic() - self.started

    @property
    def searching(self) -> bool:
        """Whether more trials may start."""
        limits = self.config.search
        in_time = limits.time is None or self.elapsed < limits.time
        return in_time and not self.exhausted and self.spent + len(self.running) < limits.trials

    def next(self) -> Job | None:
        """The next thing to measure, or None: look at `done` to tell "wait" from "finished"."""
        job = self._next_trial() if self.searching else None
        if job is None and not self.running:
            job = self._next_report()
        return job

    @property
    def done(self) -> bool:
        """Nothing is running and nothing is left to start."""
        return not self.running and not self.reporting and not self.searching and not self._unreported()

    def _next_trial(self) -> Job | None:
        for _ in range(MAX_REPEATS):
            trial = self.study.ask()
            plan = self.space.suggest(trial, self.origin)
            if plan.key in self.seen:
                # Its values are known: a second measurement would only spend tokens.
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            if "origin" not in trial.user_attrs:
                trial.set_user_attr("origin", self.config.search.sampler)
            trial.set_user_attr("plan", plan.to_json())
            trial.set_user_attr("plan_key", plan.key)
            self.seen.add(plan.key)
            self.running[trial.number] = trial
            return Job("trial", trial.number, plan)
        self.exhausted = True
        return None

    def _unreported(self) -> list[Row]:
        return [row for row in front_of(self.rows()) if row.report is None and row.number not in self.reporting]

    def _next_report(self) -> Job | None:
        for row in self._unreported():
            self.reporting.add(row.number)
            return Job("report", row.number, row.plan)
        return None

    # -- tell

    def finish(self, job: Job, record: Record) -> None:
        """Record what measuring ``job`` gave. Raises `InputError` for a cause that would fail every trial."""
        self.dead = 0
        if job.kind == "report":
            # A finished trial's attributes are frozen in Optuna, so the report split is kept with the study.
            self.study.set_user_attr(f"report {job.number}", record)
            self.reporting.discard(job.number)
        elif "failure" in record:
            self._fail(self.running.pop(job.number), record["failure"])
        else:
            trial = self.running.pop(job.number)
            for key, value in record.items():
                if key != "values":
                    trial.set_user_attr(key, value)
            self.study.tell(trial, list(record["values"].values()))
        self.listener(self)

    def lost(self, job: Job, reason: str) -> None:
        """The worker that measured ``job`` died; the study goes on, unless workers die again and again."""
        self.dead += 1
        if job.kind == "trial":
            self._fail(self.running.pop(job.number), reason)
        else:
            self.reporting.discard(job.number)
            self.study.set_user_attr(f"report {job.number}", {"failure": reason})
        self.listener(self)
        if self.dead >= MAX_DEAD:
            raise WorkersDied(
                f"{self.dead} workers in a row died ({reason}): give a trial more memory, or use --workers 0"
            )

    def abandon(self) -> None:
        """Mark what still runs as interrupted; it is measured again at the next launch."""
        while self.running:
            self._fail(self.running.popitem()[1], INTERRUPTED)
        self.reporting.clear()


class WorkersDied(Exception):
    """Workers die without finishing anything: not the user's input, and not worth going on with."""
