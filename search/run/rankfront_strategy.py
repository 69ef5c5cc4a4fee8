"""Our sampler's schedule: latency table, menu and dense model, the front that they predict, slopes, proposals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig, quality_of
from rankfront.search.optimise.budgets import uses_up
from rankfront.search.optimise.goal import make_goal, menu_of
from rankfront.search.optimise.opening import anchors_to_beat, opening_budgets, warm_start
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.rankfront_sampler import RankfrontSampler
from rankfront.search.optimise.samplers import make_sampler
from rankfront.search.plain import plain
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.latency_table import timed_objectives, timings_of
from rankfront.search.plans.menu import Places
from rankfront.search.plans.menu_jobs import MenuJobs, menu_record
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.run.strategy import enqueue_anchors
from rankfront.search.storage.front import StudyState, dense_row
from rankfront.search.storage.trials import enqueue, enqueue_missing, labelled
from rankfront.search.tuning import TUNING

SlopeTokens = Callable[[StudyState], int]
log = logging.getLogger(__name__)
REFERENCE_LABEL = "centre"  # of the plan around which the first slopes are measured; on disk


def said_unscored(unscored: Mapping[str, str], space: Space) -> Iterator[str]:
    """A line for every kind of site that leaves the menu, and why."""
    left = ((place.kind, unscored[site.name]) for site, place in space.sites.items() if site.name in unscored)
    for (kind, reason), count in Counter(left).items():
        what = f"{count} sites {plain(kind)}" if count > 1 else f"1 site {plain(kind)}"
        yield f"{what} cannot be scored and {'stay' if count > 1 else 'stays'} dense: {plain(reason)}"


class RankfrontStrategy:
    """The dense model, the menu and, for latencies, their table first: what is predicted is made of them. Then the
    predicted front, slopes and proposals; see `Proposals`.

    Args:
        study: whose queue is filled.
        config: of the study; `InputError` where no objective can be modelled.
        space: what trials draw from.
        slope_tokens: of how many tokens slopes may be measured now; 0 where they may not.
        state: the study as it is.
    """

    def __init__(
        self, study: optuna.Study, config: StudyConfig, space: Space, slope_tokens: SlopeTokens, state: StudyState
    ) -> None:
        quality_of(config)
        self.study = study
        self.config = config
        self.space = space
        self.slope_tokens = slope_tokens
        self.menu_jobs = MenuJobs(space, config.search.menu)
        tabulated = any(objective.engine is None for objective in timed_objectives(config.objectives).values())
        self.wants_timing = tabulated and keys.TIMING not in state.known.get(keys.TIMING, {})  # or one that failed
        self.proposals: Proposals | None = None  # once what they are made of is measured
        study.sampler = make_sampler("random", config.search.seed, len(state.trials))  # until then; never asked

    def jobs(self, state: StudyState) -> list[Job]:
        if self.wants_timing:
            return [Job("timing", 0, Plan(()))]
        return [] if self.proposals is not None else self.menu_jobs.missing(state.known)

    def keep(self, job: Job, record: Record, state: StudyState) -> None:
        if job.kind == "timing":
            self.wants_timing = False
            self.study.set_user_attr(keys.TIMING, record)  # a failure too: latency is then read off the trials alone
        else:
            kept = self.menu_jobs.kept(job.number, record, state.known)
            for line in said_unscored(kept.get("unscored", {}), self.space):
                log.warning(line)
            self.study.set_user_attr(keys.menu_part(job.number), kept)

    def advance(self, state: StudyState) -> None:
        if self.proposals is not None:
            return
        enqueue_anchors(self.study, state, self.space, self.space.anchors(()))
        dense, record = dense_row(state.rows, rung=0), menu_record(state.known)
        if dense is None or record is None or self.wants_timing:
            return
        timings = timings_of(self.config.objectives, state.known)
        menu = menu_of(self.config, self.space, record, dense.value_bytes, timings)
        if not menu.lines:
            faster = " that is faster than dense" if timings else ""
            raise InputError(
                f"search.menu = {self.config.search.menu!r} predicts no option of this space{faster}: use another"
                " source or sampler, or other methods"
            )
        predictor = Predictor(menu, self.space, make_goal(self.config, self.space, dense, timings))
        self.study.sampler = sampler = RankfrontSampler(predictor, self.config.search.seed)
        self.proposals = Proposals(self.study, sampler, self.slope_tokens)
        self.proposals.fill(state)
        anchors = anchors_to_beat(menu, self.space, self.config.search.anchors)
        enqueue_anchors(self.study, state, self.space, anchors)

    def ready(self, state: StudyState) -> bool:
        return bool(state.waiting) or (self.proposals is not None and self.proposals.opened)

    def fill(self, state: StudyState) -> bool:
        return self.proposals is not None and self.proposals.fill(state)

    def predictions(self, plan: Plan, state: StudyState) -> dict[str, Any]:
        return {} if self.proposals is None else {keys.PREDICTED: self.proposals.predict(plan, state)}


class Proposals:
    """What our sampler wants measured beside its proposals: the plan at the menu's reference and slopes around it, the
    front that menu and slopes predict, then more slopes.

    Args:
        study: whose queue is filled.
        sampler: ours.
        slope_tokens: of how many tokens slopes may be measured now; 0 where they may not.
    """

    def __init__(self, study: optuna.Study, sampler: RankfrontSampler, slope_tokens: SlopeTokens) -> None:
        self.study = study
        self.sampler = sampler
        self.predictor = sampler.predictor
        self.slope_tokens = slope_tokens
        self.budgets = opening_budgets(sampler.targets, sampler.menu.even.dense)
        self.opened = False  # whether all of the predicted front was queued

    def fill(self, state: StudyState) -> bool:
        """Queue the predicted front and what it waits for, later slopes that are due; whether anything was queued."""
        return self._refine(state) if self.opened else self._open(state)

    def _open(self, state: StudyState) -> bool:
        """Queue the predicted front, once slopes around the plan at its reference are measured or cannot be, for they
        decide what the others are; until then what is missing of those. Whether anything was queued."""
        trials = [t for t in state.trials if not is_void(t.user_attrs)]
        reference = next((t for t in reversed(trials) if t.user_attrs.get(keys.LABEL) == REFERENCE_LABEL), None)
        if reference is None:
            if self._enqueue_reference():
                return True
        else:
            asked = [t for t in trials if t.user_attrs.get(keys.SLOPES_OF) == reference.number]
            if not all(t.state.is_finished() for t in (reference, *asked)):
                return False
            if not asked and reference.state == TrialState.COMPLETE:
                if state.waiting:
                    return False  # what waits comes first, and what the limits leave for slopes is known after it
                if self._enqueue_slopes(reference.number, state):
                    return True
        self.opened = True
        return self._enqueue_front(state)

    def _enqueue_reference(self) -> bool:
        """Queue the plan of the budget that is nearest to the reference, of those that the limits allow, if any is."""
        dense = self.predictor.menu.even.dense
        nearest = sorted(self.budgets, key=lambda budget: abs(budget / dense - TUNING.reference_fraction))
        found = next(warm_start(self.predictor, nearest), None)
        if found is not None:
            enqueue(self.study, found[1], {keys.ORIGIN: "menu", keys.LABEL: REFERENCE_LABEL})
        return found is not None

    def _enqueue_front(self, state: StudyState) -> bool:
        """Queue the predicted front; after proposals only what was interrupted is due, by its label."""
        self.predictor.learn(state.trials)
        labels = {trial.user_attrs.get(keys.LABEL) for trial in state.trials}
        proposed = any(trial.user_attrs.get(keys.ORIGIN) == OURS for trial in state.trials)
        known = labelled(state.trials, "menu")
        count = len(known)
        for label, draws in warm_start(self.predictor, self.budgets):
            if label in labels or not proposed:
                enqueue_missing(self.study, known, "menu", label, draws)
        return len(known) > count

    def _refine(self, state: StudyState) -> bool:
        """Queue slopes around the plan where most is to gain, if any are due and the limits leave tokens for them and a
        trial; whether they were queued."""
        if state.waiting:
            return False
        self.predictor.learn(state.trials)
        number = next_reference(state.trials, self.predictor, self.sampler.targets)
        return number is not None and self._enqueue_slopes(number, state)

    def _enqueue_slopes(self, number: int, state: StudyState) -> bool:
        """Queue slopes around the plan of trial ``number``, where the limits leave tokens for them; whether they do."""
        tokens = self.slope_tokens(state)
        if tokens:
            attributes = {keys.SLOPES_OF: number, keys.ORIGIN: keys.SLOPES, keys.SLOPE_TOKENS: tokens}
            enqueue(self.study, state.trials[number].params, attributes)
        return tokens > 0

    def predict(self, plan: Plan, state: StudyState) -> float | None:
        """The quality objective's value that is expected of ``plan``."""
        self.predictor.learn(state.trials)  # which a queued trial does not bring about
        return self.predictor.predict(plan)


def next_reference(trials: Sequence[FrozenTrial], predictor: Predictor, targets: np.ndarray) -> int | None:
    """The trial whose plan slopes should be measured around next, of a study's ``trials``, which ``predictor`` has
    learned from; None where proposals should be measured first.

    After `Tuning.steps_after_slopes` proposals: of the front members without slopes, the one where most is to gain, by
    its divergence and the gap between its neighbours, and where slopes were measured least nearby; those at ``targets``
    first, for steps end there.
    """
    asked = [t for t in trials if keys.SLOPES_OF in t.user_attrs and not is_void(t.user_attrs)]
    if any(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in asked):
        return None
    last = max((t.number for t in asked), default=-1)
    since = sum(t.number > last and t.state == TrialState.COMPLETE for t in trials)
    enough = TUNING.steps_after_slopes
    if since < enough[len(asked) % len(enough)]:
        return None
    done = {predictor.history.plan(t) for t in asked}
    return _most_to_gain(predictor, targets, done)


def _most_to_gain(predictor: Predictor, targets: np.ndarray, done: set[Places | None]) -> int | None:
    """The trial of the front member where slopes promise most, those ``done`` and hopeless ones aside."""
    menu, goal, history = predictor.menu, predictor.goal, predictor.history
    front = sorted(history.front(), key=menu.size)
    stored = np.array([menu.least, *map(menu.size, front), menu.dense]) / menu.dense
    references = np.array([menu.size(taylor.places) for taylor in history.taylor_models])
    levels = np.array([history.measured[plan].level for plan in front])
    ranks: list[tuple[bool, float, int]] = []
    for i, plan in enumerate(front, start=1):
        found = history.measured[plan]
        if (levels[stored[1:-1] <= stored[i] + TUNING.slack] < found.level - TUNING.same).any():
            continue  # for hardly more storage there is something better
        inside = float(goal.unit(np.array([found.values]))[0, goal.quality])
        nearby = int((np.abs(references / menu.dense - stored[i]) < TUNING.near_slopes).sum())
        gap = min(stored[i + 1] - stored[i - 1], TUNING.widest_gap)
        gain = float(np.sqrt(min(inside, 1.0))) * gap / (1 + nearby) ** 2
        if plan not in done and inside < 1:
            ranks.append((uses_up(menu.size(plan), targets, TUNING.slack * menu.dense), gain, found.trial))
    return max(ranks, key=lambda rank: rank[:2])[2] if ranks else None
