"""Multi-fidelity: plans start on few tokens, and those in front are measured again on more, fresh ones.

Successive halving, asynchronous as in ASHA (Li et al. 1810.05934, algorithm 2), with Pareto rank in place of a loss: of
the plans measured at one rung, one in ``reduction`` goes on to the next. Plans of one rung are compared on the same
windows, and no window serves two rungs, so that a plan that was lucky at one rung is not lucky again.

What a search returns is a front, and a front is of one rung. So a search keeps back what it takes to measure the front
as it stands on the higher rungs too, and spends that once nothing else fits into its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import moocore
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.storage.front import DENSE_KEY, Row, comparable, compressed_front, dense_row, front_rung

KEPT = (keys.ORIGIN, keys.LABEL)  # attributes of a trial that its promotion has too
CLOSING_SHARE = 0.5  # of the limits: the most that promoting the front may take, a plan that joins it included


class Promotion(NamedTuple):
    """The plan of trial ``number`` is to be measured at ``rung``; at rung 0 the trial itself, which waits."""

    number: int
    rung: int


@dataclass(frozen=True)
class SuccessiveHalving:
    """Asynchronous successive halving of a study's plans, by queueing the next measurement in its storage.

    What is spent and left is a pair (trials, tokens), as an array.

    Attributes:
        study: where trials are queued; trials carry ``rung``, and ``promoted``: the trial they continue.
        tokens: what a trial at each rung runs through the model; with one rung nothing is promoted.
        reduction: of the compressed plans measured at a rung, one in so many goes on.
        limit: of the whole study, (trials, tokens).
        teacher_tokens: what this launch will run through the dense model at each rung, for its divergences.
    """

    study: optuna.Study
    tokens: Sequence[int]
    reduction: int
    limit: np.ndarray
    teacher_tokens: list[int]

    def taught(self, rung: int) -> None:
        """A trial was measured at ``rung``, and its worker knows what the dense model predicts there."""
        self.teacher_tokens[rung] = max(self.teacher_tokens[rung] - self.tokens[rung], 0)

    # -- while the search goes on

    def promote(self, rows: Sequence[Row]) -> None:
        """Queue what is due at every rung but the first, and before it the dense model there.

        Of the plans in the best ``1 / reduction`` of a rung as it stands, those that were not moved on before, as long
        as no more than that share have moved on in all. Plans beyond the study's limits stay where they are.
        """
        if len(self.tokens) == 1:
            return
        queued, dense = self._queued(), dense_row(rows, rung=0)
        for rung in range(self._reach(rows)) if dense else ():
            here = [row for row in comparable(rows, rung) if row.within and not row.is_dense]
            due = len(here) // self.reduction
            best = _in_order(here)[:due]
            moved = sum((row.number, rung + 1) in queued for row in here)
            fresh = [row.number for row in best if (row.number, rung + 1) not in queued]
            chosen = fresh[: max(due - moved, 0)]
            if dense and (chosen or moved) and (dense.number, rung + 1) not in queued:
                self._queue(dense.number, rung + 1)
            for number in chosen:
                self._queue(number, rung + 1)

    def explores(self, rows: Sequence[Row], left: np.ndarray) -> bool:
        """Whether what is next in the queue, or a proposal, may be measured.

        It may if the front can still be promoted afterwards, even if the plan joins it.
        """
        due = self._due(rows)
        goal = self._goal(rows, due, left, CLOSING_SHARE)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        known = waiting[0].user_attrs if waiting else {}
        rung, source = int(known.get(keys.RUNG, 0)), known.get(keys.PROMOTED)
        if rung and any(row.number == source and row.plan_key in due[rung] for row in rows) and rung <= goal:
            return True
        return bool((self._cost(due, goal) + self._entry(rung, goal) <= left).all())

    def reserve(self, rows: Sequence[Row], left: np.ndarray) -> np.ndarray:
        """What is kept back to promote the front, (trials, tokens)."""
        due = self._due(rows)
        return self._cost(due, self._goal(rows, due, left, CLOSING_SHARE))

    # -- in the end

    def next_promotion(self, rows: Sequence[Row], left: np.ndarray, exhausted: bool) -> Promotion | None:
        """The next plan to measure higher for the front to stand there: the lowest rung first, the dense model before
        others. None where all is done, more does not fit into ``left``, or what runs has to finish first.

        What is left then is too little to go on searching, for a plan that joined the front could not be promoted: it
        is spent as high as possible on those next in order, unless the search was ``exhausted``.
        """
        due = self._due(rows)
        goal = self._goal(rows, due, left, 1.0 if exhausted else CLOSING_SHARE)
        rung = next((rung for rung in range(1, goal + 1) if due[rung]), None)
        if rung is not None:
            if DENSE_KEY in due[rung]:
                dense = dense_row(rows, rung=0)
                return Promotion(dense.number, rung) if dense else None
            ready = [row for row in comparable(rows, rung - 1) if row.plan_key in due[rung] and not row.is_dense]
            return Promotion(_in_order(ready)[0].number, rung) if ready else None
        for rung in range(goal, 0, -1) if not exhausted else ():
            known = _known(rows, rung)
            others = [row for row in comparable(rows, rung - 1) if row.within and row.plan_key not in known]
            if others and (self._cost(due, goal) + self._entry(rung, goal) <= left).all():
                return Promotion(_in_order(others)[0].number, rung)
        return None

    def claim(self, promotion: Promotion) -> optuna.Trial:
        """The running trial that measures ``promotion``; whatever else is queued waits."""
        if promotion.rung and promotion not in self._queued():
            self._queue(*promotion)
        trial = next(
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if promotion == (trial.user_attrs.get(keys.PROMOTED, trial.number), trial.user_attrs.get(keys.RUNG, 0))
        )
        return claim(self.study, trial)

    # -- what promoting takes

    def _reach(self, rows: Sequence[Row]) -> int:
        """The highest rung that plans may go to: below those at which the dense model failed."""
        failed = [row.rung for row in rows if row.is_dense and row.state == "failed" and row.counts]
        return max(min([len(self.tokens), *failed]) - 1, 0)

    def _due(self, rows: Sequence[Row]) -> list[set[str | None]]:
        """Keys of the plans that each rung still has to start on for the front to stand there; none at the first.

        What is due at a rung or runs there is taken to join its front.
        """
        due: list[set[str | None]] = [set()]
        for rung in range(1, len(self.tokens)):
            running = {row.plan_key for row in rows if row.rung == rung - 1 and row.state == "running"}
            below = {row.plan_key for row in compressed_front(rows, rung - 1)} | due[-1] | running
            due.append((below | {DENSE_KEY}) - _known(rows, rung) if below - {DENSE_KEY} else set())
        return due

    def _goal(self, rows: Sequence[Row], due: Sequence[set[str | None]], left: np.ndarray, share: float) -> int:
        """The highest rung that the front can be promoted to with what is ``left`` and a ``share`` of the limits."""
        for rung in range(self._reach(rows), 0, -1):
            cost = self._cost(due, rung)
            if (cost <= left).all() and (cost + self._entry(0, rung) <= share * self.limit).all():
                return rung
        return 0

    def _cost(self, due: Sequence[set[str | None]], goal: int) -> np.ndarray:
        counts = np.array([len(plans) for plans in due[: goal + 1]])
        tokens = counts @ np.array(self.tokens[: goal + 1]) + sum(self.teacher_tokens[: goal + 1])
        return np.array([counts.sum(), tokens])

    def _entry(self, rung: int, goal: int) -> np.ndarray:
        """What a plan takes that is measured at ``rung`` and goes on to ``goal``."""
        above = sum(self.teacher_tokens[goal + 1 : rung + 1])
        return np.array([max(goal - rung, 0) + 1, sum(self.tokens[rung : max(goal, rung) + 1]) + above])

    # -- the queue

    def _queued(self) -> set[tuple[int, int]]:
        """(trial, rung) of all that wait, run or were measured at a higher rung; interrupted ones are due again."""
        return {
            (trial.user_attrs[keys.PROMOTED], trial.user_attrs[keys.RUNG])
            for trial in self.study.get_trials(deepcopy=False)
            if keys.PROMOTED in trial.user_attrs and not is_void(trial.user_attrs)
        }

    def _queue(self, number: int, rung: int) -> None:
        source = self.study.get_trials(deepcopy=False)[number]
        kept = {key: source.user_attrs[key] for key in KEPT if key in source.user_attrs}
        self.study.enqueue_trial(source.params, user_attrs=kept | {keys.RUNG: rung, keys.PROMOTED: number})


def claim(study: optuna.Study, waiting: FrozenTrial) -> optuna.Trial:
    """A trial of the queue, which runs from now on, as `Study.ask` does with the first."""
    study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    return optuna.Trial(study, waiting._trial_id)


def promotion_of(rows: Sequence[Row], number: int) -> Promotion | None:
    """The next measurement of one trial's plan on its way to where the front stands without it; None at its end."""
    row = next((row for row in rows if row.number == number), None)
    if row is None:
        return None
    if row.state == "waiting":
        return Promotion(number, 0)
    others = [other for other in rows if other.plan_key != row.plan_key]
    for rung in range(1, max(front_rung(rows), front_rung(others)) + 1):
        if row.plan_key not in _known(rows, rung):
            below = [other for other in comparable(rows, rung - 1) if other.plan_key == row.plan_key]
            return Promotion(below[0].number, rung) if below else None
    return None


def _known(rows: Sequence[Row], rung: int) -> set[str | None]:
    """Keys of the plans that were measured at ``rung``, failed there by themselves, or run there."""
    return {row.plan_key for row in rows if row.rung == rung and (row.counts or row.state == "running")}


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Complete rows of one rung by `pareto_order`."""
    values = np.array([list(row.values.values()) for row in rows])
    return [rows[place] for place in pareto_order(values)] if rows else []


def pareto_order(values: np.ndarray) -> list[int]:
    """The rows of ``values`` (N, d), all minimised, by Pareto rank; within a rank the least crowded first.

    Crowding is NSGA-II's distance (Deb et al. 2002, section III-B): extremes of an objective are never crowded.
    """
    rank = moocore.pareto_rank(values, maximise=False)
    order: list[int] = []
    for level in np.unique(rank):
        members = np.flatnonzero(rank == level)
        distance = _crowding(values[members])
        order += [int(members[i]) for i in np.lexsort((members, -distance))]
    return order


def _crowding(values: np.ndarray) -> np.ndarray:
    """The sum over objectives of the gap between each row's neighbours, in units of the range, (N,)."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        gaps = np.full(len(column), np.inf)
        if width > 0 and len(column) > 2:
            gaps[1:-1] = (column[order[2:]] - column[order[:-2]]) / width
        distance[order] += gaps
    return distance
