"""Second-order Taylor models of option switches around measured plans, and the step scaling that trials teach.

    D(plan) ≈ D(reference) + α Σ_i a_i(o_i) + κ Σ_i b_i(o_i)

a and b are the slopes (see `slopes`), summed over sites; α and κ are learned from the plans that were measured near a
reference. a is a mean over few tokens, and choosing by it has a winner's curse: α falls below 1. b leaves out what
switches at different sites do together: κ lies above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankfront.search.tuning import TUNING

EARLIER_TOKENS = 2048  # of slopes that do not say of how many they are


@dataclass(frozen=True, eq=False)
class TaylorModel:
    """A second-order Taylor model of option switches around one measured plan, the reference.

    Attributes:
        places: the plan, (lines,).
        divergence: measured there, in nats; for perplexity its logarithm's excess over dense.
        first, second: a and b of every option, line by line; infinite where nothing is known.
        tokens: that they are a mean over.
    """

    places: np.ndarray
    divergence: float
    first: Sequence[np.ndarray]
    second: Sequence[np.ndarray]
    tokens: int = EARLIER_TOKENS

    def sums(self, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Σ a and Σ b of plans (T, lines), (T,) each."""
        a = np.stack([values[plans[:, i]] for i, values in enumerate(self.first)], axis=1)
        b = np.stack([values[plans[:, i]] for i, values in enumerate(self.second)], axis=1)
        return a.sum(1), b.sum(1)

    def losses(self, scaling: Scaling, damping: float = 1.0) -> list[np.ndarray]:
        """Each line's predicted change of D, for an allocator; ``damping`` above 1 asks for shorter steps."""
        return [scaling.first * a + damping * scaling.second * b for a, b in zip(self.first, self.second, strict=True)]

    def predict(self, plans: np.ndarray, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
        """log D of plans (T, lines) and its standard deviation, (T,) each: that of D over the reference's, for boldness
        that promises much is not less sure of the direction."""
        a, b = self.sums(plans)
        change = scaling.first * a + scaling.second * b
        divergence = np.maximum(self.divergence + change, TUNING.least_left * self.divergence)
        errors = np.full(len(plans), np.inf)
        known = np.isfinite(divergence)
        errors[known] = error_of(a, b)[known] / self.divergence
        return np.log(divergence), errors


@dataclass(frozen=True)
class Scaling:
    """α and κ."""

    first: float
    second: float


def error_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The standard deviation of a predicted change of D with the sums ``a`` and ``b``, in nats."""
    terms = abs(TUNING.first_order[0] * a) + TUNING.second_order[0] * b
    return TUNING.change_floor + TUNING.change_error * terms


def surest(
    found: Sequence[TaylorModel], plans: np.ndarray, scalings: Sequence[Scaling]
) -> tuple[np.ndarray, np.ndarray]:
    """log D of plans (T, lines) by the reference that is surest of each, and its standard deviation, (T,) each."""
    logs, errors = np.zeros(len(plans)), np.full(len(plans), np.inf)
    for taylor, scaling in zip(found, scalings, strict=True):
        value, error = taylor.predict(plans, scaling)
        better = error < errors
        logs[better], errors[better] = value[better], error[better]
    return logs, errors


def learn_scalings(found: Sequence[TaylorModel], plans: np.ndarray, divergence: np.ndarray) -> list[Scaling]:
    """The posterior mode of α and κ for the slopes of each, by measured ``plans`` (T, lines) and their ``divergence``
    (T,).

    Each plan is read through every reference but itself; the error of a change is Gaussian, in proportion to its terms.
    For the slopes of one reference, what was learned around others says less.
    """
    taught = [_taught(taylor, plans, divergence) for taylor in found]
    return [_fitted(found, taught, own) for own in found]


def _taught(taylor: TaylorModel, plans: np.ndarray, divergence: np.ndarray) -> np.ndarray:
    """Σ a, Σ b, what came of it, and the error of that, (4, plans other than the reference)."""
    others = (plans != taylor.places).any(1)
    a, b = taylor.sums(plans[others])
    return np.stack([a, b, divergence[others] - taylor.divergence, error_of(a, b)])


def _fitted(found: Sequence[TaylorModel], taught: Sequence[np.ndarray], own: TaylorModel) -> Scaling:
    """Ridge regression on what every one ``found`` has ``taught``."""
    means, deviations = np.array([TUNING.first_order, TUNING.second_order]).T
    rows, targets = [np.diag(1 / deviations)], [means / deviations]
    for taylor, (a, b, change, error) in zip(found, taught, strict=True):
        error = error * (1.0 if taylor is own else TUNING.taught_elsewhere)
        sure = error < TUNING.taught_below * taylor.divergence
        rows.append(np.stack([a[sure], b[sure]], axis=1) / error[sure, None])
        targets.append(change[sure] / error[sure])
    fitted = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    return Scaling(float(np.clip(fitted[0], *TUNING.first_bounds)), float(np.clip(fitted[1], *TUNING.second_bounds)))
