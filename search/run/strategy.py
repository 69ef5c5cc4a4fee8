"""What comes before proposals, and what proposes: Optuna's samplers here, ours in `rankfront_strategy`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import optuna

from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig
from rankfront.search.optimise.samplers import make_sampler
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.menu_jobs import MenuJobs, menu_record
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Anchor, Space
from rankfront.search.storage.front import StudyState
from rankfront.search.storage.trials import enqueue_missing, labelled


class Strategy(Protocol):
    """Fills the queue of a study, and sets the sampler that proposes where the queue is empty.

    Attributes:
        space: what trials draw from.
    """

    space: Space

    def jobs(self, state: StudyState) -> list[Job]:
        """What has no record yet and has to be measured before anything is proposed, in order; nothing runs beside the
        latency table."""

    def keep(self, job: Job, record: Record, state: StudyState) -> None:
        """Keep what one of those jobs measured; `InputError` where the study cannot go on without."""

    def advance(self, state: StudyState) -> None:
        """Do what has become possible by what was measured last, or by an earlier launch: queue anchors, propose."""

    def ready(self, state: StudyState) -> bool:
        """Whether the next trial can be asked for: one waits, or can be proposed."""

    def fill(self, state: StudyState) -> bool:
        """Queue what is to be measured before the next proposal; whether anything was queued."""

    def predictions(self, plan: Plan, state: StudyState) -> dict[str, Any]:
        """Attributes of a trial that is about to measure ``plan``: what is expected of it."""


class OptunaStrategy:
    """Anchors first, then what one of Optuna's samplers proposes; where variables are to be untied, a menu before.

    Args:
        study: whose queue is filled.
        config: names the sampler.
        space: what trials draw from.
        trials: how many there are.
    """

    def __init__(self, study: optuna.Study, config: StudyConfig, space: Space, trials: int) -> None:
        self.study = study
        self.search = config.search
        self.space = space
        self.menu_jobs = MenuJobs(space, config.search.menu)
        self.begun = False
        study.sampler = make_sampler(config.search.sampler, config.search.seed, trials)

    def jobs(self, state: StudyState) -> list[Job]:
        return [] if self.begun else self.menu_jobs.missing(state.known)

    def keep(self, job: Job, record: Record, state: StudyState) -> None:
        kept = self.menu_jobs.kept(job.number, record, state.known)
        self.study.set_user_attr(keys.menu_part(job.number), kept)

    def advance(self, state: StudyState) -> None:
        if self.begun:
            return
        if self.search.untie:
            record = menu_record(state.known)
            if record is None:
                return
            self.space = self.space.untied(record["predictions"], self.search.untie)
        self.begun = True
        enqueue_anchors(self.study, state, self.space, self.space.anchors(self.search.anchors))

    def ready(self, state: StudyState) -> bool:
        return self.begun or bool(state.waiting)

    def fill(self, state: StudyState) -> bool:
        return False

    def predictions(self, plan: Plan, state: StudyState) -> dict[str, Any]:
        return {}


def enqueue_anchors(study: optuna.Study, state: StudyState, space: Space, anchors: Iterable[Anchor]) -> None:
    """Queue those that were neither measured nor are waiting; an interrupted one is due again."""
    known = labelled(state.trials, "anchor")
    for anchor in anchors:
        if anchor.label not in known:
            enqueue_missing(study, known, "anchor", anchor.label, space.anchor_parameters(anchor))
