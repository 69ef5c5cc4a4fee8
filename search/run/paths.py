"""When continuation goes on: paths from near dense to smaller plans, one stop after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import optuna
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.optimise.continuation import next_plan, path_sizes
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.solvers import corrected
from rankfront.search.plans.space import Space
from rankfront.search.run.budget import Budget
from rankfront.search.run.in_flight import InFlight
from rankfront.search.storage.front import StudyState
from rankfront.search.storage.trials import enqueue, enqueue_missing, labelled

FEWEST = 1536  # tokens of a stop; with 1,024 the plan at 0.9 is worse than the menu's; study: results/paths.md
SHARE = 0.3  # of what a study has spent: the cost of a path; guess
MORE = 2  # times the tokens of the path before, for another to be worth its own; guess
PATH = keys.PATH  # origin of the plans that are measured along one, and the attribute of its stops that numbers it


@dataclass(frozen=True, eq=False)
class Paths:
    """Queues the stops of paths, one after the other. The study's storage is its only state.

    The first path is begun once it costs no more than `SHARE` of what was spent, each later one when it can read `MORE`
    times as much. A path ends early where slopes fail.

    Attributes:
        study: where trials are queued.
        space: what they draw from.
        predictor: of our sampler.
        targets: sizes at which plans on a path are measured, if they may meet the study's limits; where it ends.
        budget, in_flight: what a path may spend.
    """

    study: optuna.Study
    space: Space
    predictor: Predictor
    targets: Sequence[float]
    budget: Budget
    in_flight: InFlight

    @cached_property
    def sizes(self) -> list[float]:
        """Where a path stops."""
        return path_sizes(self.predictor, self.targets)

    def resume(self, state: StudyState) -> bool:
        """Queue the plans at targets of stops that were interrupted, unless they wait already; whether any was."""
        asked, known = self._asked(state), labelled(state.trials, PATH)
        if not self.sizes or not all(t.state.is_finished() for t in asked):
            return False
        count = len(known)
        for stop in asked:
            reference = stop.user_attrs[keys.SLOPES_OF]
            if reference is not None and is_void(state.trials[reference].user_attrs):
                label = state.trials[reference].user_attrs[keys.LABEL]
                enqueue_missing(self.study, known, PATH, label, stop.params)
        return len(known) > count

    def advance(self, state: StudyState) -> bool:
        """Queue the next stop, if one is due; whether it is."""
        asked = self._asked(state)
        if not self.sizes or not all(t.state.is_finished() for t in asked):
            return False
        number = max((t.user_attrs[PATH] for t in asked), default=0)
        on_it = [t for t in asked if t.user_attrs[PATH] == number]
        tokens = int(on_it[0].user_attrs[keys.SLOPE_TOKENS]) if on_it else 0
        left, passes, trial = self.budget.unreserved(state, self.in_flight), self.budget.passes, self.budget.tokens[0]
        if not on_it or len(on_it) == len(self.sizes) or any(keys.FAILURE in t.user_attrs for t in on_it):
            least = max(FEWEST, MORE * tokens)
            tokens = min(int(SHARE * state.tokens / (passes * len(self.sizes))), self.budget.readable)
            trials_on_it = 1 + sum(size in self.targets for size in self.sizes[1:])
            whole = trials_on_it, passes * tokens * len(self.sizes) + trial * trials_on_it
            if tokens < least or (left < whole).any():
                return False
            number, on_it = number + 1, []
        if (left < (1, passes * tokens + trial)).any():
            return False
        self._stop(state, number, tokens, on_it)
        return True

    def _asked(self, state: StudyState) -> list[FrozenTrial]:
        """The stops so far; those that were interrupted are due again."""
        return [t for t in state.trials if PATH in t.user_attrs and not is_void(t.user_attrs)]

    def _stop(self, state: StudyState, number: int, tokens: int, before: Sequence[FrozenTrial]) -> None:
        """Queue slopes at the stop after those ``before`` it, and at a target its plan first."""
        even, size = self.predictor.menu.even, self.sizes[len(before)]
        found = self.predictor.history.along(before)
        places = next_plan(found, even, size) if found else corrected(self.predictor, menu=even).solve(size)
        chosen = even.decode(places)
        draws, reference = self.space.encode(chosen), None
        if before and size in self.targets and self.predictor.may_meet(chosen):
            label = f"{number}, keep={size / even.dense:.3g}"
            reference = enqueue_missing(self.study, labelled(state.trials, PATH), PATH, label, draws)
        attributes = {keys.ORIGIN: keys.SLOPES, keys.SLOPES_OF: reference, PATH: number, keys.SLOPE_TOKENS: tokens}
        enqueue(self.study, draws, attributes)
