"""Samplers by name: Optuna's, made with a seed that a resumed study continues, and ours, which `sampler` has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import FrozenTrial, TrialState

from rankfront.search import attributes as keys
from rankfront.search.tuning import DEFAULT


class RelaxedGPSampler(GPSampler):
    """Optuna's Gaussian process, for which integers are real numbers that are rounded once its acquisition function
    has been optimised.

    Levels have an order and gradients lead there; Optuna searches along every integer variable in turn instead, which
    takes tens of seconds a proposal where there are tens of them.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        integers = {name: known for name, known in search_space.items() if isinstance(known, IntDistribution)}
        relaxed = {name: FloatDistribution(known.low - 0.5, known.high + 0.5) for name, known in integers.items()}
        found: dict[str, Any] = super().sample_relative(study, trial, search_space | relaxed)
        for name in integers.keys() & found.keys():
            found[name] = min(max(round(found[name]), integers[name].low), integers[name].high)
        return found


class _FirstRung(optuna.Study):
    """A study without the trials that measure a plan again at a higher rung."""

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__ = study.__dict__  # the same study

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in found if keys.PROMOTED not in trial.user_attrs]


class FirstRungSampler(BaseSampler):
    """Another sampler, which learns from first measurements only: at higher rungs the windows are others, and with them
    the values of the same plan."""

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = self.sampler.infer_relative_search_space(_FirstRung(study), trial)
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        found: dict[str, Any] = self.sampler.sample_relative(_FirstRung(study), trial, search_space)
        return found

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(_FirstRung(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(_FirstRung(study), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.sampler.after_trial(_FirstRung(study), trial, state, values)

    def reseed_rng(self) -> None:
        self.sampler.reseed_rng()


OPTUNA_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=DEFAULT.population),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=DEFAULT.population),
    "gp": lambda seed: RelaxedGPSampler(seed=seed),
}


def make_sampler(name: str, seed: int, finished: int) -> BaseSampler:
    """The Optuna sampler called ``name``.

    A resumed study continues a seed's sequence from the ``finished`` trials on, instead of drawing again what it
    drew at the first launch. It never sees a trial of a higher rung.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return FirstRungSampler(OPTUNA_SAMPLERS[name](seed + finished))
