"""The predictor of log-divergence: a surrogate fitted to measured plans, and Taylor models around some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from rankfront.search.optimise.corrections import Corrections, corrections_of
from rankfront.search.optimise.goal import Goal
from rankfront.search.optimise.history import History
from rankfront.search.optimise.surrogate import Surrogate
from rankfront.search.optimise.taylor import Scaling, learn_scalings, surest
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.tuning import TUNING

DEVIATION = 1.48  # of a Gaussian, in median absolute errors


class Predictor:
    """Predicts the log-divergence of any plan on the menu, from everything that the trials of a study measured.

    Args:
        menu: what each option costs and is predicted to hurt.
        space: what trials draw from, a variable for each site.
        goal: the objectives.
    """

    def __init__(self, menu: Menu, space: Space, goal: Goal) -> None:
        self.menu = menu
        self.space = space
        self.goal = goal
        self.history = History(menu, space, goal)
        # Of a weight that has no site of its own, such as a router's rows, that of the site which claims it.
        places = {weight.path: place for site, place in space.sites.items() for weight in site.weights}
        places |= {site.name: place for site, place in space.sites.items()}
        at = [places[line.members[0]] for line in menu.lines]
        self.surrogate = Surrogate(menu, [place.kind for place in at], [place.block for place in at])
        self.scalings: list[Scaling] = []  # of each Taylor model
        self.error = TUNING.prior_error  # of the surrogate's predictions, as recent trials showed it
        self._corrections: dict[int, Corrections | None] = {}  # what slopes say of the menu, by trial

    # -- learning

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Fit everything to what ``trials`` of a study measured, unless no more of them are finished than before."""
        if not self.history.read(trials):
            return
        in_turn = sorted(self.history.measured.items(), key=lambda item: item[1].trial)
        learned = {plan: (found.level, found.spread) for plan, found in in_turn if any(plan)}
        if not learned:
            return
        plans, (levels, spreads) = np.array(list(learned)), np.array(list(learned.values())).T
        for number, taylor in self.history.taylor_of.items():
            if number not in self._corrections:  # what slopes say does not depend on the level
                self._corrections[number] = corrections_of(taylor, self.menu, self.surrogate.features)
        corrections = [self._corrections[number] for number in self.history.taylor_of]
        self.surrogate.corrections = [found for found in corrections if found is not None]
        self.surrogate.fit(plans, levels, spreads)
        self._assess()
        self.scalings = learn_scalings(self.history.taylor_models, plans, np.exp(levels))

    def _assess(self) -> None:
        """Estimate the surrogate's error from what it would have predicted of recent trials."""
        missed = np.abs(self.surrogate.ahead()[self.surrogate.noise < TUNING.prior_error])[-TUNING.recent :]
        median = float(np.median(missed)) if len(missed) else 0.0
        variances = [TUNING.prior_error**2] * TUNING.prior_trials + [(DEVIATION * median) ** 2] * len(missed)
        self.error = math.sqrt(sum(variances) / len(variances))

    # -- predicting

    def predict(self, plan: Plan) -> float | None:
        """The quality objective's predicted value for a plan; None where an option is not on the menu."""
        places = self.menu.encode(plan)
        if places is None:
            return None
        if not any(places):
            return self.goal.dense
        return self.goal.loss(float(self.levels([places])[0][0]))

    def levels(self, plans: Sequence[Places]) -> tuple[np.ndarray, np.ndarray]:
        """Predicted log-divergence of plans, (T,), and its standard deviation: the surrogate's and that of slopes
        nearby, weighted by their precision.

        A poor surrogate has less weight, but no plan's deviation exceeds the one a priori: held against all plans
        alike it would only hide which of them is the best.
        """
        places = np.array(plans)
        logs = self.surrogate.predict(places)
        near, errors = surest(self.history.taylor_models, places, self.scalings)
        weight = self.error**2 / (self.error**2 + errors**2)
        mixed: np.ndarray = (1 - weight) * logs + weight * np.where(weight > 0, near, 0.0)
        return mixed, np.minimum(self.error * np.sqrt(1 - weight), TUNING.prior_error)

    def may_meet(self, plan: Plan) -> bool:
        """Whether a plan meets the study's limits on what the plan alone decides."""
        values = np.array([[-math.inf] * self.goal.count, [math.inf] * self.goal.count])  # what is not known may be any
        for column, value in self.goal.costs(plan).items():
            values[:, column] = value
        return bool(self.goal.excess(values).min() == 0)
