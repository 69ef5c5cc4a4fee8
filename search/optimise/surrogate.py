"""The surrogate of a plan's log-divergence: the menu as prior mean, corrected by every measured trial.

    log D(plan) = a + c · log S(plan) + residual(plan),    measured with noise
    S(plan) = Σ_i d_i(o_i) f_i(o_i) exp(θ_i(o_i))

d is the menu's prediction for each site alone; f what slopes around plans of about this size make of it (see
`corrections`); θ corrects one (site, method), and is shared in part by the sites of a kind and of a block; a and c let
divergences add up faster or slower than linearly, which they do as plans get cheaper; the residual leans on measured
plans that share many options, the more the worse the rest explains what was measured. Noise is of the logarithm and of
nats: near dense a few thousandths of a nat are most of what is measured, and say little. All coefficients are Gaussian
a priori, so fitting is a Gauss-Newton iteration of ridge regressions in the space of trials, and a posterior sample
costs one more solve.

Source: ridge / Gaussian-process regression (Rasmussen & Williams 2006, equations 2.11 and 2.25) on the Gauss-Newton
linearisation; posterior samples by Matheron's rule (Wilson et al. 2002.09309, equation 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from rankfront.search.optimise.corrections import Corrections, factors_at
from rankfront.search.optimise.neighbours import alike
from rankfront.search.optimise.tuning import DEFAULT, Tuning
from rankfront.search.plans.menu import TINY, Menu

# Standard deviations of the prior, in log-divergence. The single-site ones follow the spread of the gradient
# prediction around measured single-site divergences on smollm2-135m (0.56).
SITE, KIND, BLOCK, METHOD = 0.4, 0.3, 0.2, 0.3
OFFSET, SLOPE = 1.0, 0.3  # of a around 0 and of c around 1
NOISE = 0.05  # of a measurement, in log-divergence: what neither terms nor neighbours can explain
SPREAD = 0.004  # of a measurement, in nats a token: the error of a difference in loss over about 4,000 tokens
ITERATIONS = 6


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
        seed: of posterior samples.
        tuning: its constants.
    """

    def __init__(
        self, menu: Menu, kinds: Sequence[str], blocks: Sequence[int], seed: int, tuning: Tuning = DEFAULT
    ) -> None:
        self.menu = menu
        self.tuning = tuning
        self.random = np.random.default_rng(seed)
        keys = [(i, option.method) for i, line in enumerate(menu.lines) for option in line.options[1:]]
        self.features = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        at = [line for line, _ in self.features]
        self._root = self._prior([kinds[i] for i in at], [blocks[i] for i in at], list(self.features))
        # Feature and divergence of every option, (lines, the most options); dense and what a line lacks have none.
        widest = max(len(line.options) for line in menu.lines)
        self._lines = np.arange(len(menu.lines))
        self._feature = np.full((len(menu.lines), widest), -1)
        self._divergence = np.zeros((len(menu.lines), widest))
        for i, line in enumerate(menu.lines):
            self._feature[i, 1 : len(line.options)] = [self.features[i, option.method] for option in line.options[1:]]
            self._divergence[i, : len(line.options)] = line.divergence
        self._sizes = np.zeros((len(menu.lines), widest))  # of what each option adds to a plan, over the dense one
        for i, line in enumerate(menu.lines):
            self._sizes[i, : len(line.options)] = (line.sizes - line.sizes[0] * bool(line.weights)) / menu.dense
        self.corrections: list[Corrections] = []  # what slopes said so far
        self._plans = np.zeros((0, len(menu.lines)), dtype=int)
        self._observed = np.zeros(0)
        self.noise = np.zeros(0)  # standard deviation of each of them
        self._near = np.zeros((0, 0))  # how much measured plans are alike
        self.residual = tuning.residuals[0]  # standard deviation of what neighbours explain
        self.mean = self._unpack(np.zeros(len(self.features) + 2))

    @staticmethod
    def _prior(kinds: list[str], blocks: list[int], features: list[tuple[int, str]]) -> csr_array:
        """R (F + 2, P), prior covariance R Rᵀ: a column for each independent effect; the last rows are a and c."""
        size = len(features)
        groups: list[tuple[float, list[object]]] = [
            (SITE / np.sqrt(2), [line for line, _ in features]),
            (SITE / np.sqrt(2), list(features)),
            (KIND, list(kinds)),
            (BLOCK, list(blocks)),
            (METHOD, [(kind, method) for kind, (_, method) in zip(kinds, features, strict=True)]),
        ]
        columns = []
        for scale, labels in groups:
            names = list(dict.fromkeys(labels))
            block = np.zeros((size + 2, len(names)))
            block[np.arange(size), [names.index(label) for label in labels]] = scale
            columns.append(block)
        ends = np.zeros((size + 2, 2))
        ends[[size, size + 1], [0, 1]] = OFFSET, SLOPE
        return csr_array(np.hstack([*columns, ends]))

    # -- prediction

    def losses(self, coefficients: Coefficients, share: float = 1.0) -> list[np.ndarray]:
        """Each line's corrected divergences d f exp(θ) in plans whose size is ``share`` of dense, for an allocator."""
        corrected = self._corrected(
            coefficients.theta + factors_at(self.corrections, np.array([share]), self._count)[0]
        )
        return [row[: len(line.options)] for row, line in zip(corrected, self.menu.lines, strict=True)]

    def _corrected(self, logs: np.ndarray) -> np.ndarray:
        """d exp(logs) of every option, (lines, the most options), for ``logs`` by feature, (F,)."""
        factors = np.append(np.exp(logs), 1.0)  # the last one serves dense, whose feature is -1
        corrected: np.ndarray = self._divergence * factors[self._feature]
        return corrected

    def _terms(self, plans: np.ndarray, coefficients: Coefficients) -> np.ndarray:
        """Corrected divergence of every line in every plan, (T, lines)."""
        terms: np.ndarray = self._corrected(coefficients.theta)[self._lines, plans]
        if not self.corrections:
            return terms
        shares = self._sizes[self._lines, plans].sum(1)
        logs = factors_at(self.corrections, shares, self._count)  # (T, F)
        chosen = self._feature[self._lines, plans]  # (T, lines)
        shifted: np.ndarray = terms * np.exp(np.take_along_axis(logs, np.maximum(chosen, 0), axis=1))
        return shifted  # dense, whose feature is -1, has a term of 0 whatever it is multiplied by

    @property
    def _count(self) -> int:
        return len(self.features)

    def explained(self, plans: np.ndarray, coefficients: Coefficients | None = None) -> np.ndarray:
        """a + c log S for plans (T, lines) given as places in the menu, (T,)."""
        used = coefficients or self.mean
        logs: np.ndarray = np.log(self._terms(plans, used).sum(1) + TINY)
        return used.offset + used.slope * logs

    def predict(self, plans: np.ndarray, coefficients: Coefficients | None = None) -> np.ndarray:
        """Log-divergence of plans (T, lines), residuals of measured neighbours included, (T,)."""
        base = self.explained(plans, coefficients)
        if not len(self._observed):
            return base
        left = self._observed - self.explained(self._plans, coefficients)
        return base + self.residual**2 * alike(plans, self._plans) @ np.linalg.solve(self._unexplained, left)

    @property
    def _unexplained(self) -> np.ndarray:
        """Covariance of what the terms do not explain of the measured plans: residuals and noise, (T, T)."""
        return self.residual**2 * self._near + np.diag(self.noise**2)

    # -- fitting

    def fit(self, plans: np.ndarray, log_divergence: np.ndarray, spread: float | np.ndarray = SPREAD) -> None:
        """Fit to measured ``plans`` (T, lines), places in the menu, and their log-divergences (T,).

        ``spread`` is the standard deviation of the divergences in nats, of all or of each, (T,). What was measured
        below it is only known to be small: it counts as ``spread``, give or take a factor of e. In the logarithm the
        spread is relative to the lesser of measured and expected, for what noise made large is no surer for it.
        """
        self._plans = plans
        self._observed = np.maximum(log_divergence, np.log(np.asarray(spread) + TINY))
        self._near = alike(plans, plans)
        self.residual, self.noise = self.tuning.residuals[0], np.hypot(NOISE, spread * np.exp(-self._observed))
        expected = self.explained(plans, self._map(np.zeros(self._root.shape[1]), self._observed))
        self.noise = np.hypot(NOISE, spread * np.exp(-np.minimum(self._observed, expected)))
        fitted = {}
        for residual in self.tuning.residuals:
            self.residual = residual
            mean = self._map(np.zeros(self._root.shape[1]), self._observed)
            fitted[residual] = self._evidence(mean), mean
        self.residual = max(self.tuning.residuals, key=lambda residual: fitted[residual][0])
        self.mean = fitted[self.residual][1]

    def _evidence(self, mean: Coefficients) -> float:
        """log p(observed) but for a constant, linearised at ``mean``: Rasmussen & Williams equation 2.30."""
        gap, covariance = self._linearised(mean)
        return float(-0.5 * gap @ np.linalg.solve(covariance, gap) - 0.5 * np.linalg.slogdet(covariance)[1])

    def _linearised(self, at: Coefficients) -> tuple[np.ndarray, np.ndarray]:
        """What was measured, less what the prior's mean predicts by the tangent at ``at``, (T,); its covariance."""
        jacobian = self._jacobian(at)
        moved = np.array([*at.theta, at.offset, at.slope - 1.0])
        gap = self._observed - self.explained(self._plans, at) + jacobian @ moved
        reach = jacobian @ self._root
        return gap, reach @ reach.T + self._unexplained

    def ahead(self) -> np.ndarray:
        """By how much each measured log-divergence missed what the ones before it had predicted, (T,).

        L_tt [L⁻¹ gap]_t with L Lᵀ the covariance of the linearised model: a trial's innovation given the earlier ones.
        """
        gap, covariance = self._linearised(self.mean)
        root = np.linalg.cholesky(covariance)
        missed: np.ndarray = np.diag(root) * np.linalg.solve(root, gap)
        return missed

    def sample(self) -> Coefficients:
        """One setting of the coefficients from their posterior, by Matheron's rule on the linearised model."""
        if not len(self._observed):
            return self._unpack(self._root @ self.random.standard_normal(self._root.shape[1]))
        start: np.ndarray = np.array(self.random.standard_normal(self._root.shape[1]))
        drawn = np.linalg.cholesky(self._unexplained) @ self.random.standard_normal(len(self._observed))
        return self._map(start, self._observed + drawn)

    def _map(self, prior: np.ndarray, observed: np.ndarray) -> Coefficients:
        """The posterior mode for prior effects centred at ``prior`` (P,), whatever the residuals are."""
        effects, unexplained = prior, self._unexplained
        for _ in range(ITERATIONS):
            current = self._unpack(self._root @ effects)
            jacobian = self._jacobian(current) @ self._root  # (T, P)
            gap = observed - self.explained(self._plans, current) + jacobian @ (effects - prior)
            effects = prior + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + unexplained, gap)
        return self._unpack(self._root @ effects)

    def _unpack(self, values: np.ndarray) -> Coefficients:
        return Coefficients(float(values[-2]), float(max(1.0 + values[-1], 0.1)), values[:-2])

    def _jacobian(self, at: Coefficients) -> np.ndarray:
        """∂ log D / ∂ (θ, a, c) for the measured plans, (T, F + 2)."""
        terms = self._terms(self._plans, at)  # (T, lines)
        sums = terms.sum(1) + TINY
        moved = at.slope * terms / sums[:, None]  # ∂ log D / ∂ θ_i
        jacobian = np.zeros((len(terms), len(self.features) + 2))
        chosen = self._feature[self._lines, self._plans]  # (T, lines): no two lines have a feature in common
        rows, lines = np.nonzero(chosen >= 0)
        jacobian[rows, chosen[rows, lines]] = moved[rows, lines]
        jacobian[:, -2] = 1.0
        jacobian[:, -1] = np.log(sums)
        return jacobian
