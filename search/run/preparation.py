"""What is measured before anything is proposed: the menu, the latency table."""

from __future__ import annotations

import numpy as np

from rankfront.methods import DENSE, InputError
from rankfront.search import attributes as keys
from rankfront.search.plans.job import Job, Record
from rankfront.search.run.budget import Budget
from rankfront.search.run.in_flight import InFlight
from rankfront.search.run.phase import Phase
from rankfront.search.run.strategy import Strategy
from rankfront.search.storage.front import StudyState
from rankfront.search.storage.trials import waiting_dense

ENOUGH = 10  # trials beside the menu that a limit on tokens should leave room for


class Preparation:
    """Hands out the jobs of a strategy, and says where the study cannot go on without one.

    Args:
        strategy: whose jobs they are.
        budget: what the study may spend.
        in_flight: what runs.
    """

    def __init__(self, strategy: Strategy, budget: Budget, in_flight: InFlight) -> None:
        self.strategy = strategy
        self.budget = budget
        self.in_flight = in_flight
        self.failure: InputError | None = None  # why there is no menu

    def next(self, jobs: list[Job]) -> Job | None:
        """The next of ``jobs`` that does not run; it runs from now on."""
        if self.alone(jobs) and self.in_flight.searching:
            return None
        return next((self.in_flight.prepare(job) for job in jobs if job.number not in self.in_flight.menu), None)

    def progress(self, state: StudyState) -> tuple[str, int, int] | None:
        """Kind of the jobs that are due, how many are done, and how many there are as far as is known; None once none
        is due."""
        jobs = self.strategy.jobs(state)
        if not jobs:
            return None
        done = keys.menu_jobs_done(state.known) if jobs[0].kind == "menu" else 0
        return jobs[0].kind, done, done + len(jobs)

    def alone(self, jobs: list[Job]) -> bool:
        """Whether nothing may run beside these: the latency table, which would have the others in its figures."""
        return any(job.kind == "timing" for job in jobs)

    def finish(self, job: Job, record: Record, state: StudyState) -> bool:
        """Keep what a job measured; whether it was. Where the study cannot go on without it, why is kept."""
        self.in_flight.prepared(job)
        try:
            self.strategy.keep(job, record, state)
        except InputError as error:
            self.failure = error
            return False
        return True

    def names_dense(self, phase: Phase) -> bool:
        """Whether the dense model may be measured though a job failed, for if that cannot be, it is the cause to name.
        Raises the reason for the failure where it was measured, or will not be."""
        if any(trial.user_attrs.get(keys.LABEL) == DENSE for trial in self.in_flight.trials.values()):
            return False
        may = phase.searching and phase.exploring and waiting_dense(phase.state) is not None
        if not may and self.failure is not None:
            raise self.failure
        return may

    def check_tokens(self, phase: Phase) -> None:
        """Raise `InputError` where the limit was spent before anything was measured."""
        state, limit = phase.state, self.budget.limit[1]
        spent = np.isfinite(limit) and (limit <= state.tokens or not phase.exploring)
        if spent and not (self.in_flight.searching or state.spent):
            enough = state.tokens + (len(self.strategy.jobs(state)) + ENOUGH) * self.budget.trial
            raise InputError(
                f"search.tokens = {int(limit):,} is spent on the menu, which took {state.tokens:,} so far, and no plan"
                f" was measured: set it to {enough:,} or more"
            )
