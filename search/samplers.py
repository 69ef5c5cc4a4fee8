"""Samplers by name: Optuna's, made with a seed that a resumed study continues, and ours, which `sampler` has."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler

OURS = "rankfront"
INTERRUPTED = "interrupted: the launcher or its worker stopped before the trial was done"
POPULATION = 16  # a study is tens to hundreds of trials; Optuna's default of 50 would see few generations
OPTUNA_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}
SAMPLERS = (OURS, *OPTUNA_SAMPLERS)


def make_sampler(name: str, seed: int, finished: int) -> BaseSampler:
    """The Optuna sampler called ``name``.

    A resumed study continues a seed's sequence from the ``finished`` trials on, instead of drawing again what it
    drew at the first launch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OPTUNA_SAMPLERS[name](seed + finished)
