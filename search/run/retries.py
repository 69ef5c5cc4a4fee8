"""What a worker's death or a shortage of memory took is measured again, a few times in this launch; see `recovery` for
the next."""

from __future__ import annotations

from collections import Counter

from rankfront.search import attributes as keys
from rankfront.search.plans.job import Job, Record

ATTEMPTS = 3  # at a job in one launch, guess: a passing shortage passes, a job that is too large costs two more workers
MAX_ALIKE = 5  # trials in succession that one line of code failed with one message, guess: then it is not the plans
MAX_LOST = 3  # jobs in succession whose workers died at every attempt, guess: then it is not the jobs


class Retries:
    """Jobs of one launch that are due once more."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.attempts: Counter[tuple[str, int]] = Counter()
        self.reason: tuple[str, str] | None = None  # and place of the last trial's failure, and how many had it
        self.alike = 0
        self.dead: set[tuple[str, int]] = set()  # whose workers died at every attempt, since anything was measured

    def next(self) -> Job | None:
        """The next of them, those of the dense model first."""
        job = min(self.waiting, key=lambda job: len(job.plan.choices) > 0, default=None)
        if job is not None:
            self.waiting.remove(job)
        return job

    def again(self, job: Job) -> bool:
        """Whether ``job``, which was lost, is measured again: it waits from now on."""
        self.attempts[job.kind, job.number] += 1
        if self._spent(job):
            return False
        self.waiting.append(job)
        return True

    def hopeless(self, job: Job) -> bool:
        """Whether the worker that died at ``job`` is one too many: it is not the plans that kill them."""
        if self._spent(job):
            self.dead.add((job.kind, job.number))
        return len(self.dead) >= MAX_LOST

    def measured(self) -> None:
        """A job was measured: what died before died of its plan."""
        self.dead.clear()

    def failed(self, record: Record) -> bool:
        """Note how a trial failed; whether `MAX_ALIKE` in succession have failed so, where one line of code did."""
        reason = (record[keys.FAILURE], record[keys.PLACE]) if keys.PLACE in record else None
        self.alike = self.alike + 1 if reason is not None and reason == self.reason else 1
        self.reason = reason
        return reason is not None and self.alike >= MAX_ALIKE

    def succeeded(self) -> None:
        """A trial was measured: what failed before failed of its plan."""
        self.reason, self.alike = None, 0

    def _spent(self, job: Job) -> bool:
        return self.attempts[job.kind, job.number] >= ATTEMPTS
