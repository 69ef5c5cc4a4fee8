"""What measured plans say of others that share many options with them: what missed the ones will miss the others.

    log D(p) − predicted(p) ~ GP(0, σ(p) σ(q) exp(−share of lines that differ / `Tuning.alike`)),    measured with noise

with σ the standard deviation that a prediction claims for itself. Steps of one length from one plan, say, are all as
much worse than their slopes promise, which the slopes of a single step cannot teach. What it gains is in
studies/results/predictions.md.

Source: Gaussian-process regression, Rasmussen & Williams (2006), equations 2.23 and 2.24.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

from rankfront.search.tuning import TUNING


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(−share of lines that differ / `Tuning.alike`) of plans (A, lines) and (B, lines), (A, B)."""
    kernel: np.ndarray = np.exp(-cdist(a, b, "hamming") / TUNING.alike)
    return kernel


class Neighbours:
    """Measured plans, to correct the predictions of others by what predictions missed of them.

    Args:
        plans: the measured ones, (T, lines).
        missed: their log-divergence less what was predicted of it, (T,).
        errors: standard deviations that are claimed for those predictions, (T,).
        spreads: standard deviations of what was measured, (T,).
    """

    def __init__(self, plans: np.ndarray, missed: np.ndarray, errors: np.ndarray, spreads: np.ndarray) -> None:
        self.plans, self.errors = plans, errors
        noise = np.diag(TUNING.alike_noise**2 + spreads**2)
        self._factor = cho_factor(np.outer(errors, errors) * alike(plans, plans) + noise)
        self._weights = cho_solve(self._factor, missed)

    def correct(self, plans: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What to add to predictions of ``plans`` (N, lines) that claim ``errors`` (N,), and the errors after it."""
        shared = np.outer(errors, self.errors) * alike(plans, self.plans)  # (N, T)
        correction: np.ndarray = shared @ self._weights
        explained = (shared * cho_solve(self._factor, shared.T).T).sum(1)
        return correction, np.sqrt(np.maximum(errors**2 - explained, 0.0))
