"""Which measured plan slopes are measured around next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.optimise.budgets import uses_up
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.menu import Places
from rankfront.search.tuning import TUNING


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
    best: tuple[bool, float, int] | None = None
    for i, plan in enumerate(front, start=1):
        found = history.measured[plan]
        if (levels[stored[1:-1] <= stored[i] + TUNING.slack] < found.level - TUNING.same).any():
            continue  # for hardly more storage there is something better
        inside = float(goal.unit(np.array([found.values]))[0, goal.quality])
        nearby = int((np.abs(references / menu.dense - stored[i]) < TUNING.near_slopes).sum())
        gap = min(stored[i + 1] - stored[i - 1], TUNING.widest_gap)
        gain = float(np.sqrt(min(inside, 1.0))) * gap / (1 + nearby) ** 2
        rank = uses_up(menu.size(plan), targets, TUNING.slack * menu.dense), gain, found.trial
        if plan not in done and inside < 1 and (best is None or rank[:2] > best[:2]):
            best = rank
    return None if best is None else best[2]
