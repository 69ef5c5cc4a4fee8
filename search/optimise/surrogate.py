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

import numpy as np

from rankfront.search.optimise.terms import Terms, prior_root
from rankfront.search.plans.menu import TINY, Menu
from rankfront.search.tuning import TUNING


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
        self.mean = np.zeros(self.root.shape[0])  # of θ by (line, method), a and c − 1, (F + 2,)

    # -- prediction

    def losses(self, share: float = 1.0) -> list[np.ndarray]:
        """Each line's corrected divergences d f exp(θ) in plans whose size is ``share`` of dense, for an allocator."""
        return self.terms.losses(self.mean[:-2], share)

    def predict(self, plans: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """a + c log S of plans (T, lines) given as places in the menu, (T,), ``at`` coefficients (F + 2,), the mean."""
        used = self.mean if at is None else at
        logs = np.log(self.terms.of(plans, used[:-2]).sum(1) + TINY)
        levels: np.ndarray = used[-2] + _slope(used) * logs
        return levels

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

    def linearised(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was measured, less what the prior's mean predicts by the tangent at ``at``, (T,); its covariance; and
        that tangent in the prior's independent effects, (T, P)."""
        jacobian = self.jacobian(at)
        reach = jacobian @ self.root
        gap = self._observed - self.predict(self._plans, at) + jacobian @ at
        return gap, reach @ reach.T + np.diag(self.noise**2), reach

    def ahead(self) -> np.ndarray:
        """By how much each measured log-divergence missed what the ones before it had predicted, (T,).

        L_tt [L⁻¹ gap]_t with L Lᵀ the covariance of the linearised model: a trial's innovation given the earlier ones.
        """
        gap, covariance, _ = self.linearised(self.mean)
        root = np.linalg.cholesky(covariance)
        missed: np.ndarray = np.diag(root) * np.linalg.solve(root, gap)
        return missed

    def _mode(self) -> np.ndarray:
        """The mode of the posterior, (F + 2,)."""
        at = np.zeros(self.root.shape[0])
        for _ in range(TUNING.newton_steps):
            gap, covariance, reach = self.linearised(at)
            at = self.root @ (reach.T @ np.linalg.solve(covariance, gap))
        return at

    def jacobian(self, at: np.ndarray) -> np.ndarray:
        """∂ log D / ∂ (θ, a, c) for the measured plans, (T, F + 2)."""
        terms = self.terms.of(self._plans, at[:-2])  # (T, lines)
        sums = terms.sum(1) + TINY
        moved = _slope(at) * terms / sums[:, None]  # ∂ log D / ∂ θ_i
        jacobian = np.zeros((len(terms), self.root.shape[0]))
        chosen = self.terms.chosen(self._plans)  # no two lines have a feature in common
        rows, lines = np.nonzero(chosen >= 0)
        jacobian[rows, chosen[rows, lines]] = moved[rows, lines]
        jacobian[:, -2] = 1.0
        jacobian[:, -1] = np.log(sums)
        return jacobian


def _slope(at: np.ndarray) -> float:
    """c of coefficients (F + 2,), never below 0.1."""
    return max(1.0 + float(at[-1]), 0.1)
