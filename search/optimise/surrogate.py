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
from scipy.sparse import csr_array

from rankfront.search.optimise.corrections import Corrections, factors_at
from rankfront.search.plans.menu import TINY, Menu
from rankfront.search.tuning import TUNING


class Surrogate:
    """Fitted to measured plans; predicts the log-divergence of any plan on the menu.

    Args:
        menu: predicted divergence of every option alone.
        kinds: the kind of projection of each line.
        blocks: the block of each line; None outside.

    Attributes:
        features: the place of each (line, method) in θ, F of them.
        corrections: what slopes around plans said so far.
    """

    def __init__(self, menu: Menu, kinds: Sequence[str], blocks: Sequence[int | None]) -> None:
        self.menu = menu
        treatments = [(i, option.method) for i, line in enumerate(menu.lines) for option in line.options[1:]]
        self.features = {key: place for place, key in enumerate(dict.fromkeys(treatments))}
        self.corrections: list[Corrections] = []
        self.root = prior_root(kinds, blocks, list(self.features))
        # Of every option, (lines, the most options): its feature, its divergence, and what it adds to the size of a
        # plan over the dense one. Dense and what a line lacks have no feature.
        widest = max(len(line.options) for line in menu.lines)
        self._lines = np.arange(len(menu.lines))
        self._feature = np.full((len(menu.lines), widest), -1)
        self._divergence, self._sizes = np.zeros((2, len(menu.lines), widest))
        for i, line in enumerate(menu.lines):
            self._feature[i, 1 : len(line.options)] = [self.features[i, option.method] for option in line.options[1:]]
            self._divergence[i, : len(line.options)] = line.divergence
            self._sizes[i, : len(line.options)] = (line.sizes - line.sizes[0] * bool(line.weights)) / menu.dense
        self._plans = np.zeros((0, len(menu.lines)), dtype=int)
        self._observed = np.zeros(0)
        self.noise = np.zeros(0)  # standard deviation of each of them
        self.mean = np.zeros(self.root.shape[0])  # of θ by (line, method), a and c − 1, (F + 2,)

    # -- prediction

    def losses(self, share: float = 1.0) -> list[np.ndarray]:
        """Each line's corrected divergences d f exp(θ) in plans whose size is ``share`` of dense, for an allocator."""
        logs = self.mean[:-2] + factors_at(self.corrections, np.array([share]), len(self.features))[0]
        rows = zip(self._scaled(logs), self.menu.lines, strict=True)
        return [row[: len(line.options)] for row, line in rows]

    def predict(self, plans: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """a + c log S of plans (T, lines) given as places in the menu, (T,), ``at`` coefficients (F + 2,), the mean."""
        used = self.mean if at is None else at
        logs = np.log(self._terms(plans, used[:-2]).sum(1) + TINY)
        levels: np.ndarray = used[-2] + _slope(used) * logs
        return levels

    def _terms(self, plans: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """d f exp(θ) of what every line has in plans (T, lines), (T, lines)."""
        terms: np.ndarray = self._scaled(theta)[self._lines, plans]
        if self.corrections:
            logs = factors_at(self.corrections, self._sizes[self._lines, plans].sum(1), len(self.features))  # (T, F)
            chosen = np.maximum(self._feature[self._lines, plans], 0)  # of dense any: its term is 0
            terms *= np.exp(np.take_along_axis(logs, chosen, axis=1))
        return terms

    def _scaled(self, logs: np.ndarray) -> np.ndarray:
        """d exp(logs) of every option, (lines, the most options), for ``logs`` by feature, (F,)."""
        factors = np.append(np.exp(logs), 1.0)  # the last one serves dense, whose feature is -1
        scaled: np.ndarray = self._divergence * factors[self._feature]
        return scaled

    # -- fitting

    def fit(self, plans: np.ndarray, log_divergence: np.ndarray, spread: np.ndarray) -> None:
        """Fit to measured ``plans`` (T, lines), places in the menu, and their log-divergences (T,).

        ``spread`` is the standard deviation of each divergence in nats, (T,). What was measured below it is only known
        to be small: it counts as ``spread``, give or take a factor of e. In the logarithm the spread is relative to the
        lesser of measured and expected, for what noise made large is no surer for it.
        """
        self._plans = plans
        self._observed = np.maximum(log_divergence, np.log(spread + TINY))
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
        terms = self._terms(self._plans, at[:-2])  # (T, lines)
        sums = terms.sum(1) + TINY
        moved = _slope(at) * terms / sums[:, None]  # ∂ log D / ∂ θ_i
        jacobian = np.zeros((len(terms), self.root.shape[0]))
        chosen = self._feature[self._lines, self._plans]  # -1 for dense; no two lines have a feature in common
        rows, lines = np.nonzero(chosen >= 0)
        jacobian[rows, chosen[rows, lines]] = moved[rows, lines]
        jacobian[:, -2] = 1.0
        jacobian[:, -1] = np.log(sums)
        return jacobian


def _slope(at: np.ndarray) -> float:
    """c of coefficients (F + 2,), never below 0.1."""
    return max(1.0 + float(at[-1]), 0.1)


def prior_root(kinds: Sequence[str], blocks: Sequence[int | None], features: Sequence[tuple[int, str]]) -> csr_array:
    """R (F + 2, P) of the prior covariance R Rᵀ of θ by ``features`` and of a and c: a column for each independent
    effect. ``kinds`` and ``blocks`` are those of each line."""
    size = len(features)
    groups: list[tuple[float, list[object]]] = [
        (TUNING.site_deviation / np.sqrt(2), [line for line, _ in features]),
        (TUNING.site_deviation / np.sqrt(2), list(features)),
        (TUNING.kind_deviation, [kinds[line] for line, _ in features]),
        (TUNING.block_deviation, [blocks[line] for line, _ in features]),
        (TUNING.method_deviation, [(kinds[line], method) for line, method in features]),
    ]
    columns = []
    for scale, labels in groups:
        names = {label: column for column, label in enumerate(dict.fromkeys(labels))}
        block = np.zeros((size + 2, len(names)))
        block[np.arange(size), [names[label] for label in labels]] = scale
        columns.append(block)
    ends = np.zeros((size + 2, 2))
    ends[[size, size + 1], [0, 1]] = TUNING.offset_deviation, TUNING.slope_deviation
    return csr_array(np.hstack([*columns, ends]))
