"""The surrogate of a plan's log-divergence: the menu as prior mean, corrected by every measured trial.

    log D(plan) = a + c · log S(plan),    measured with noise
    S(plan) = Σ_i d_i(o_i) f_i(o_i) exp(θ_i(o_i))

d is the menu's prediction for each site alone; f what slopes around plans of about this size make of it (see
`corrections`); θ corrects one (site, method), and is shared in part by the sites of a kind and of a block; a and c let
divergences add up faster or slower than linearly, which they do as plans get cheaper. Noise is of the logarithm and of
nats: near dense a few thousandths of a nat are most of what is measured, and say little. All coefficients are Gaussian
a priori, so fitting is a Gauss-Newton iteration of ridge regressions in the space of trials.

Source: ridge / Gaussian-process regression (Rasmussen & Williams 2006, equations 2.11 and 2.25) on the Gauss-Newton
linearisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankfront.search.optimise.terms import Terms, prior_root
from rankfront.search.plans.menu import TINY, Menu
from rankfront.search.tuning import TUNING


@dataclass(frozen=True)
class Coefficients:
    """One setting of the model: ``offset`` a, ``slope`` c, and θ by (line, method), (F,)."""

    offset: float
    slope: float
    theta: np.ndarray


class Surrogate:
    """Fitted to measured plans; predicts the log-divergence of any plan on the menu.

    Args:
        menu: predicted divergence of every option alone.
        kinds: the kind of projection of each line.
        blocks: the block of each line; -1 outside.
    """

    def __init__(self, menu: Menu, kinds: Sequence[str], blocks: Sequence[int]) -> None:
        self.terms = Terms(menu)
        self.root = prior_root(kinds, blocks, list(self.terms.features))
        self._plans = np.zeros((0, len(menu.lines)), dtype=int)
        self._observed = np.zeros(0)
        self.noise = np.zeros(0)  # standard deviation of each of them
        self.mean = self._unpack(np.zeros(self.root.shape[0]))

    # -- prediction

    def losses(self, share: float = 1.0) -> list[np.ndarray]:
        """Each line's corrected divergences d f exp(θ) in plans whose size is ``share`` of dense, for an allocator."""
        return self.terms.losses(self.mean.theta, share)

    def predict(self, plans: np.ndarray, coefficients: Coefficients | None = None) -> np.ndarray:
        """a + c log S of plans (T, lines) given as places in the menu, (T,)."""
        used = coefficients or self.mean
        logs: np.ndarray = np.log(self.terms.of(plans, used.theta).sum(1) + TINY)
        return used.offset + used.slope * logs

    # -- fitting

    def fit(
        self, plans: np.ndarray, log_divergence: np.ndarray, spread: float | np.ndarray = TUNING.loss_spread
    ) -> None:
        """Fit to measured ``plans`` (T, lines), places in the menu, and their log-divergences (T,).

        ``spread`` is the standard deviation of the divergences in nats, of all or of each, (T,). What was measured
        below it is only known to be small: it counts as ``spread``, give or take a factor of e. In the logarithm the
        spread is relative to the lesser of measured and expected, for what noise made large is no surer for it.
        """
        self._plans = plans
        self._observed = np.maximum(log_divergence, np.log(np.asarray(spread) + TINY))
        self.noise = np.hypot(TUNING.unexplained, spread * np.exp(-self._observed))
        expected = self.predict(plans, self._mode())
        self.noise = np.hypot(TUNING.unexplained, spread * np.exp(-np.minimum(self._observed, expected)))
        self.mean = self._mode()

    def linearised(self, at: Coefficients) -> tuple[np.ndarray, np.ndarray]:
        """What was measured, less what the prior's mean predicts by the tangent at ``at``, (T,); its covariance."""
        jacobian = self.jacobian(at)
        moved = np.array([*at.theta, at.offset, at.slope - 1.0])
        gap = self._observed - self.predict(self._plans, at) + jacobian @ moved
        reach = jacobian @ self.root
        return gap, reach @ reach.T + np.diag(self.noise**2)

    def ahead(self) -> np.ndarray:
        """By how much each measured log-divergence missed what the ones before it had predicted, (T,).

        L_tt [L⁻¹ gap]_t with L Lᵀ the covariance of the linearised model: a trial's innovation given the earlier ones.
        """
        gap, covariance = self.linearised(self.mean)
        root = np.linalg.cholesky(covariance)
        missed: np.ndarray = np.diag(root) * np.linalg.solve(root, gap)
        return missed

    def _mode(self) -> Coefficients:
        """The mode of the posterior."""
        effects = np.zeros(self.root.shape[1])
        for _ in range(TUNING.newton_steps):
            current = self._unpack(self.root @ effects)
            jacobian = self.jacobian(current) @ self.root  # (T, P)
            gap = self._observed - self.predict(self._plans, current) + jacobian @ effects
            effects = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + np.diag(self.noise**2), gap)
        return self._unpack(self.root @ effects)

    def _unpack(self, values: np.ndarray) -> Coefficients:
        return Coefficients(float(values[-2]), float(max(1.0 + values[-1], 0.1)), values[:-2])

    def jacobian(self, at: Coefficients) -> np.ndarray:
        """∂ log D / ∂ (θ, a, c) for the measured plans, (T, F + 2)."""
        terms = self.terms.of(self._plans, at.theta)  # (T, lines)
        sums = terms.sum(1) + TINY
        moved = at.slope * terms / sums[:, None]  # ∂ log D / ∂ θ_i
        jacobian = np.zeros((len(terms), self.root.shape[0]))
        chosen = self.terms.chosen(self._plans)  # no two lines have a feature in common
        rows, lines = np.nonzero(chosen >= 0)
        jacobian[rows, chosen[rows, lines]] = moved[rows, lines]
        jacobian[:, -2] = 1.0
        jacobian[:, -1] = np.log(sums)
        return jacobian
