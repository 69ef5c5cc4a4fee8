"""Our sampler: correct the menu by what was measured, solve again where it pays most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.optimise.acquisition import Acquisition
from rankfront.search.optimise.candidates import Candidates
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.menu import Places
from rankfront.search.tuning import TUNING

NOT_PROPOSED = {keys.LABEL, keys.SLOPES_OF}  # attributes of trials that were queued


class RankfrontSampler(BaseSampler):
    """Proposes plans by solving again what every measured trial corrects.

    Each proposal is the candidate with the largest predicted gain in hypervolume. Where slopes were measured the
    candidates are steps downhill from those reference plans, at round kept fractions around them, then solutions of the
    corrected menu at many of those beside them, and now and then those alone. Where plans cost several things at once,
    such as values and bytes, each proposal weighs them anew, and its budgets are in the weighed cost. Plans that were
    measured or are running are never proposed again.

    Args:
        predictor: what is known of the plans, shared with whoever asks for predictions.
        seed: of everything random here.
    """

    def __init__(self, predictor: Predictor, seed: int) -> None:
        self.predictor = predictor
        self.menu, self.space = predictor.menu, predictor.space
        self.candidates = Candidates(predictor, np.random.default_rng(seed))
        self.acquisition = Acquisition(predictor)

    @property
    def targets(self) -> np.ndarray:
        """Budgets that plans are solved for."""
        return self.candidates.targets

    # -- Optuna's interface

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(0, count - 1) for name, count in self.space.counts.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        everything = study.get_trials(deepcopy=False)
        self.predictor.learn(everything)
        others = [t for t in everything if t.number != trial.number and not is_void(t.user_attrs)]
        tried = {plan for t in others if t.params and (plan := self.predictor.history.plan(t)) is not None}
        proposed = self.propose(tried, self._mode(trial.number, everything))
        return dict(self.space.encode(self.menu.decode(proposed)))

    def _mode(self, number: int, trials: Sequence[FrozenTrial]) -> str:
        """The mode of `Candidates.groups` that is due: once the newest slopes were followed, "solve" now and then."""
        every = TUNING.global_every
        proposed = [t for t in trials if t.number < number and NOT_PROPOSED.isdisjoint(t.user_attrs)]
        passes = [t for t in trials if keys.SLOPES in t.user_attrs]
        if not passes or not self.predictor.history.taylor_of:
            return "solve"
        since = [sum(_follows(t, one) for t in proposed) for one in passes]  # those asked while it ran do not know it
        if not since[-1]:
            return "newest"
        others = len(proposed) - sum(later < earlier for earlier, later in pairwise([*since, 0]))
        return "solve" if others % every == every - 1 else "any"

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return 0  # a variable that the menu does not know stays dense

    # -- proposing

    def propose(self, tried: set[Places], mode: str) -> Places:
        """The best plan not ``tried`` of the first of `Candidates.groups` with any, which says what the modes are."""
        for group in self.candidates.groups(mode):
            fresh = {plan: worse for plan, worse in group.items() if plan not in tried}
            if fresh:
                return self.acquisition.best(fresh)
        return next(iter(group))  # the space is exhausted, which the scheduler notices


def _follows(trial: FrozenTrial, measured: FrozenTrial) -> bool:
    """Whether ``trial`` began after another was finished."""
    begun, ended = trial.datetime_start, measured.datetime_complete
    return begun is not None and ended is not None and begun >= ended
