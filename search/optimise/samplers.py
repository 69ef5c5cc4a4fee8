"""Optuna's samplers by name, made with a seed that a resumed study continues; ours is in `rankfront_sampler`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import FrozenTrial

from rankfront.search.tuning import TUNING


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


OPTUNA_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=TUNING.population),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=TUNING.population),
    "gp": lambda seed: RelaxedGPSampler(seed=seed),
}


def make_sampler(name: str, seed: int, finished: int) -> BaseSampler:
    """The Optuna sampler called ``name``. A resumed study continues a seed's sequence from the ``finished`` trials on,
    instead of drawing again what it drew at the first launch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OPTUNA_SAMPLERS[name](seed + finished)
