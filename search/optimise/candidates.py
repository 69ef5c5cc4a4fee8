"""Candidates: the plans that a proposal is chosen from. They solve what a predictor knows: the corrected menu at any
budget, and steps along slopes around measured plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from rankfront.search.optimise.budgets import target_budgets, uses_up
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.agreed import neighbour
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING


class Candidates:
    """Solutions of the corrected menu, and steps downhill from plans with slopes.

    Args:
        predictor: what is known of the plans.
        random: what budgets and weights of costs are drawn from.
    """

    def __init__(self, predictor: Predictor, random: np.random.Generator) -> None:
        self.predictor = predictor
        self.menu = predictor.menu
        self.random = random

    def groups(self, mode: str) -> Iterator[dict[Places, float]]:
        """Plans to choose a proposal from, and should all of them be tried, others, at any budget and then random steps
        away: each with the standard deviations by which its kind turns out worse than predicted (the winner's curse).

        ``mode`` is "newest" for steps from the newest slopes first, "any" for those from all recent ones beside
        solutions, "solve" for solutions alone.
        """
        costs, models = self.menu.count, self.predictor.history.taylor_models
        priced = self.menu.weighed(list(self.random.dirichlet([1.0] * costs))) if costs > 1 else self.menu
        if mode == "newest":
            newest = dict.fromkeys(self._downhill(models[-1:], priced), TUNING.steps_worse)
            yield self.at_targets(newest)
            yield newest
        references = [] if mode == "solve" else models[-TUNING.references :]
        steps = dict.fromkeys(self._downhill(references, priced), TUNING.steps_worse)
        both = dict.fromkeys(self._solutions(priced, to_targets=True), TUNING.solutions_worse) | steps
        yield self.at_targets(both)
        yield both
        others = dict.fromkeys(self._solutions(priced), TUNING.solutions_worse) | steps
        yield others
        stepped = list(others)
        for _ in range(TUNING.random_steps):
            stepped = [self.step(plan) for plan in stepped]
            yield dict.fromkeys(stepped, TUNING.steps_worse)

    def _solutions(self, priced: Menu, to_targets: bool = False) -> list[Places]:
        """The corrected menu solved at budgets spread over the whole range, moved a little each time, or to targets."""
        count, shift = TUNING.solutions, self.random.uniform()
        budgets = priced.least + (np.arange(count) + shift) / count * (priced.dense - priced.least)
        wanted = self._to_targets(budgets) if to_targets else budgets
        return [corrected(self.predictor, budget, priced) for budget in wanted]

    def _downhill(self, references: Sequence[TaylorModel], priced: Menu) -> list[Places]:
        """The slopes of ``references``, solved at budgets around each."""
        found = []
        for taylor in references:
            moved = TUNING.stretch * self.random.uniform(-1, 1, TUNING.around)
            budgets = self._to_targets(priced.size(taylor.places) * np.array([1.0, *(1 + moved)]))
            found += downhill(self.predictor, taylor, budgets, priced)
        return found

    # -- budgets

    @cached_property
    def targets(self) -> np.ndarray:
        """Target budgets of this study, found once: neither costs nor limits change."""
        return target_budgets(self.predictor)

    def _to_targets(self, budgets: np.ndarray) -> list[float]:
        """``budgets`` moved to the nearest target, each once."""
        if not len(self.targets):
            return list(map(float, budgets))
        return sorted({float(self.targets[np.abs(self.targets - budget).argmin()]) for budget in budgets})

    def at_targets(self, candidates: Mapping[Places, float]) -> dict[Places, float]:
        """Those of ``candidates`` that use up what a target allows: cautious steps up stop short of it."""
        slack = TUNING.slack * self.menu.dense
        return {c: worse for c, worse in candidates.items() if uses_up(self.menu.size(c), self.targets, slack)}

    def step(self, plan: Places) -> Places:
        """``plan`` with one site at another of its options, and its rivals at dense."""
        if self.menu.bases:
            return neighbour(self.menu, plan, self.random)
        stepped, site = list(plan), int(self.random.integers(len(plan)))
        count = len(self.menu.lines[site].options)
        stepped[site] = (plan[site] + int(self.random.integers(1, max(count, 2)))) % count
        for rival in self.menu.rivals[site] if stepped[site] else ():
            stepped[rival] = 0
        return tuple(stepped)


def corrected(predictor: Predictor, budget: float, priced: Menu) -> Places:
    """The plan of nearly least divergence within ``budget`` by the predictor's menu as the trials corrected it.

    ``priced`` is that menu, or the same with its costs weighed, and ``budget`` in its size. What options hurt depends
    on the plan's own size: where costs are weighed that is known once it is solved for, so that it is solved for again.
    """
    share, places = budget / priced.dense, priced.cheapest
    for _ in range(TUNING.share_rounds if predictor.menu.count > 1 else 1):
        places = Lagrangian(priced, predictor.surrogate.losses(share)).solve(budget)
        share = predictor.menu.size(places) / predictor.menu.dense
    return places


def downhill(predictor: Predictor, taylor: TaylorModel, budgets: Sequence[float], priced: Menu) -> list[Places]:
    """The slopes of ``taylor``, solved at ``budgets`` in the size of ``priced``, by steps of `Tuning.lengths`."""
    scaling = predictor.scalings[predictor.history.taylor_models.index(taylor)]
    solved, _, promised = damped(taylor, scaling, priced, np.geomspace(*TUNING.dampings))
    reached = [np.flatnonzero(promised >= length) for length in TUNING.lengths]  # the last: the shortest step
    chosen = dict.fromkeys(int(places[-1]) for places in reached if len(places)) or {0: None}
    within = np.clip(budgets, priced.least, priced.dense)
    return [solved[place].solve(budget) for place in chosen for budget in within]


def nearby(predictor: Predictor, budgets: Sequence[float]) -> list[Places]:
    """Steps downhill to ``budgets`` of stored values from the references nearest to the first of them."""
    models, menu = predictor.history.taylor_models, predictor.menu
    by_distance = sorted(models, key=lambda taylor: abs(menu.size(taylor.places) - budgets[0]))
    return [plan for taylor in by_distance[: TUNING.nearest] for plan in downhill(predictor, taylor, budgets, menu)]


def damped(
    taylor: TaylorModel, scaling: Scaling, menu: Menu, dampings: np.ndarray
) -> tuple[list[Lagrangian], list[Places], np.ndarray]:
    """The slopes of ``taylor`` under each of ``dampings``: what solves them, the step at the reference's own size, and
    the share of the reference's divergence that it promises by that damping."""
    solved = [Lagrangian(menu, taylor.losses(scaling, damping)) for damping in dampings]
    own = max(menu.size(taylor.places), menu.least)
    steps = [one.solve(own) for one in solved]
    a, b = taylor.sums(np.array(steps))
    return solved, steps, -(scaling.first * a + dampings * scaling.second * b) / taylor.divergence
