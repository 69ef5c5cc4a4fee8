"""What the trials of a study measured: levels of divergence by plan, and Taylor models around some plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rankfront.search import attributes as keys
from rankfront.search.optimise.goal import Goal
from rankfront.search.optimise.taylor import EARLIER_TOKENS, TaylorModel
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.plans.space import Space
from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Measured:
    """A plan that is known: its trial, log-divergence, and values.

    ``spread`` is the standard deviation of the divergence, in nats.
    """

    trial: int
    level: float
    values: list[float]
    spread: float = 0.0


class History:
    """The plans of a menu that the trials of a study measured, at the first fidelity.

    Args:
        menu: what plans are looked up in.
        space: what trials drew from.
        goal: the objectives.
    """

    def __init__(self, menu: Menu, space: Space, goal: Goal) -> None:
        self.menu = menu
        self.space = space
        self.goal = goal
        self.measured: dict[Places, Measured] = {}
        self.taylor_of: dict[int, TaylorModel] = {}  # by the trial that measured them
        self._finished = 0
        self._plans: dict[int, Places | None] = {}  # by trial; a finished one never changes
        self._slopes: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}  # a and b by trial

    def read(self, trials: Sequence[FrozenTrial]) -> bool:
        """Read what ``trials`` measured; whether more of them are finished than when it was read last."""
        finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if len(finished) == self._finished:
            return False
        self._finished = len(finished)
        complete = [t for t in finished if t.state == TrialState.COMPLETE and not t.user_attrs.get(keys.RUNG)]
        plans = [(self.plan(trial), trial) for trial in complete]
        self.measured = {plan: self._measured(trial) for plan, trial in plans if plan is not None}
        if any(map(any, self.measured)):
            asked = [(self.plan(trial), trial) for trial in finished if keys.SLOPES in trial.user_attrs]
            self.taylor_of = {t.number: self._taylor_model(t, plan) for plan, t in asked if plan in self.measured}
        return True

    def _measured(self, trial: FrozenTrial) -> Measured:
        level = self.goal.log_divergence(trial.values[self.goal.quality])
        most = TUNING.spread_tokens
        spread = self.goal.spread * math.sqrt(most / trial.user_attrs.get(keys.FIDELITY, most))
        return Measured(trial.number, level, trial.values, spread)

    def plan(self, trial: FrozenTrial) -> Places | None:
        """A trial's parameters as a choice of the menu, worked out once where it is finished; None where it took an
        option that is not on it."""
        if trial.number in self._plans:
            return self._plans[trial.number]
        plan = self.menu.encode(self.space.decode(trial.params))
        if trial.state.is_finished():
            self._plans[trial.number] = plan
        return plan

    # -- slopes

    @property
    def taylor_models(self) -> list[TaylorModel]:
        """Those around measured plans, in the order of the trials that measured their slopes."""
        return list(self.taylor_of.values())

    def _taylor_model(self, trial: FrozenTrial, plan: Places) -> TaylorModel:
        """The slopes that a trial measured around a ``plan`` whose divergence is known."""
        if trial.number not in self._slopes:
            self._slopes[trial.number] = self._unpacked(trial.user_attrs[keys.SLOPES], plan)
        tokens = trial.user_attrs.get(keys.SLOPE_TOKENS, EARLIER_TOKENS)
        return TaylorModel(np.array(plan), math.exp(self.measured[plan].level), *self._slopes[trial.number], tokens)

    def _unpacked(self, packed: Mapping[str, Sequence[Any]], plan: Places) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """a and b of every option, line by line, around ``plan``."""
        first, second = [], []
        for line, place in zip(self.menu.lines, plan, strict=True):
            drawn = self.space.options.get(line.site, ())  # none for a weight that only joint sites treat
            known = dict(zip(drawn, zip(*packed.get(line.site, ((), ())), strict=True), strict=False))
            a, b = np.array([known.get(option, (None, None)) for option in line.options], dtype=float).T
            a[place] = b[place] = 0.0
            first.append(np.where(np.isnan(a), 0.0, a))
            second.append(np.where(np.isnan(b), np.inf, b))
        return first, second

    # -- values

    @property
    def values(self) -> np.ndarray:
        """Of the measured plans, (N, d)."""
        values = np.array([found.values for found in self.measured.values()], dtype=float)
        return values.reshape(-1, self.goal.count)

    def met(self) -> np.ndarray:
        """Of those that meet the study's limits, (N, d)."""
        values = self.values
        met: np.ndarray = values[self.goal.excess(values) == 0]
        return met

    def front(self) -> list[Places]:
        """The non-dominated plans that meet the study's limits, without the dense one."""
        values = self.values
        within = np.flatnonzero(self.goal.excess(values) == 0)
        plans = list(self.measured)
        kept = within[moocore.is_nondominated(values[within])] if len(within) else within
        return [plans[number] for number in kept if any(plans[number])]

    def excess_rate(self, column: int, dense: float) -> float:
        """Nats by which the loss rises for each nat of divergence, with the perplexity of objective ``column``: the
        median over measured plans; 1 where there is none."""
        pairs = [(known.values[column], known.level) for plan, known in self.measured.items() if any(plan)]
        rates = [math.log(value / dense) / math.exp(level) for value, level in pairs if value > dense]
        return float(np.median(rates)) if rates else 1.0
