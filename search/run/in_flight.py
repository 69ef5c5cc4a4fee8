"""What is being measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import optuna

from rankfront.search.plans.job import Job


@dataclass
class InFlight:
    """Jobs of this launch that were handed out and are not back yet; those that wait for another attempt among them.

    Attributes:
        trials: trials and slopes by number.
        reports: numbers of the trials whose plans are measured on the report split.
        menu: numbers of the jobs of the menu.
        timing: whether the latency table is timed.
    """

    trials: dict[int, optuna.Trial] = field(default_factory=dict)
    reports: set[int] = field(default_factory=set)
    menu: set[int] = field(default_factory=set)
    timing: bool = False

    @property
    def searching(self) -> bool:
        """Whether anything runs but reports."""
        return bool(self.trials or self.menu or self.timing)

    def prepare(self, job: Job) -> Job:
        """``job``, of the menu or the latency table, which runs from now on."""
        if job.kind == "timing":
            self.timing = True
        else:
            self.menu.add(job.number)
        return job

    def prepared(self, job: Job) -> None:
        """It is back."""
        if job.kind == "timing":
            self.timing = False
        else:
            self.menu.discard(job.number)
