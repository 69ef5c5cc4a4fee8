"""Trials that run: taken from the queue or proposed, and told what they measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.errors import GaveUp
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.plan import Plan
from rankfront.search.run.in_flight import InFlight
from rankfront.search.run.phase import Phase
from rankfront.search.run.strategy import Strategy
from rankfront.search.storage.trials import (
    claim,
    tell_failed,
    tell_measured,
    tell_repeated,
    tell_slopes,
    waiting_dense,
)
from rankfront.search.tuning import TUNING

MAX_REPEATS = 20  # proposals in a row that were measured before: then the space is taken to be exhausted


class Trials:
    """Starts and tells the trials of a study.

    Args:
        study: whose trials they are.
        config: of it.
        origin: what plans say of where they come from.
        strategy: fills the queue, and says what it expects of plans.
        in_flight: where those that run are kept.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        origin: Mapping[str, str],
        strategy: Strategy,
        in_flight: InFlight,
    ) -> None:
        self.study = study
        self.sampler = config.search.sampler
        self.origin = origin
        self.strategy = strategy
        self.limits = [Constraint.parse(text) for text in config.search.where]
        self.in_flight = in_flight
        self.exhausted = False  # whether proposals only repeat what was measured

    def next(self, phase: Phase, begun: float, again: Callable[[], Phase]) -> Job | None:
        """The next trial whose plan was not measured before, with the seconds that proposing took since ``begun``; None
        where none can start now. The study is read ``again`` after each that repeats one."""
        for _ in range(MAX_REPEATS):
            trial = self._ask(phase)
            if trial is None:
                return None
            plan, state = self.strategy.space.suggest(trial, self.origin), phase.state
            if keys.SLOPES_OF in trial.user_attrs:
                return self._start_slopes(trial, plan)
            if plan.key not in state.measured:
                return self._start(trial, plan, begun, self.strategy.predictions(plan, state))
            tell_repeated(self.study, trial)
            phase = again()
        self.exhausted = True
        return None

    def _ask(self, phase: Phase) -> optuna.Trial | None:
        """The next of the queue, the one that alone is measured, or a proposal; None where none can start now."""
        state = phase.state
        if not phase.exploring:
            return next((claim(self.study, waiting) for waiting in state.waiting if waiting.number == phase.only), None)
        dense = waiting_dense(state)
        if dense is not None:
            return claim(self.study, dense)
        # Not ready where what was asked for last was a repetition, and what follows from it is not queued yet.
        return self.study.ask() if self.strategy.ready(state) else None

    def _start(self, trial: optuna.Trial, plan: Plan, begun: float, expected: Mapping[str, Any]) -> Job:
        """The job that measures ``plan``, which ``trial`` drew, with what is ``expected`` of it and the seconds that
        proposing it took since ``begun``."""
        self.in_flight.trials[trial.number] = trial
        if keys.ORIGIN not in trial.user_attrs:
            trial.set_user_attr(keys.ORIGIN, self.sampler)
        drawn = {keys.PLAN: plan.to_json(), keys.PLAN_KEY: plan.key}
        for key, value in {**expected, **drawn, keys.SECONDS: {"propose": time.monotonic() - begun}}.items():
            trial.set_user_attr(key, value)
        return Job("trial", trial.number, plan)

    def _start_slopes(self, trial: optuna.Trial, plan: Plan) -> Job:
        """The job that measures slopes around ``plan``."""
        self.in_flight.trials[trial.number] = trial
        return Job("slopes", trial.number, plan, tokens=trial.user_attrs.get(keys.SLOPE_TOKENS, TUNING.slope_tokens))

    def finish(self, job: Job, record: Record) -> None:
        """Tell a trial, or one that measured slopes, what came back. Raises `InputError` or `GaveUp` where that is a
        failure of the dense model."""
        trial = self.in_flight.trials.pop(job.number)
        if job.kind == "slopes":
            tell_slopes(self.study, trial, record)
        elif keys.FAILURE not in record:
            tell_measured(self.study, trial, record, self.limits)
        else:
            lost = keys.LOST in record
            tell_failed(self.study, trial, record[keys.FAILURE], lost, record.get(keys.PLACE))
            if not job.plan.choices:
                where = f" at {record[keys.PLACE]}" if keys.PLACE in record else ""
                failure = f"{record[keys.FAILURE]}{where}"
                message = f"the dense model could not be measured ({failure}): nothing to compare with"
                raise GaveUp(f"{message}; give a trial more memory") if lost else InputError(message)

    def abandon(self) -> None:
        """Mark what still runs as interrupted; it is measured again at the next launch."""
        while self.in_flight.trials:
            tell_failed(self.study, self.in_flight.trials.popitem()[1], INTERRUPTED)
        self.in_flight.reports.clear()
