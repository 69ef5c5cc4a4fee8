"""Terms of the surrogate: what each line of a menu adds to the divergence of a plan, d f exp(θ)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from rankfront.search.optimise.corrections import Corrections, factors_at
from rankfront.search.plans.menu import Menu
from rankfront.search.tuning import TUNING


class Terms:
    """A menu's divergences, corrected by θ and by what slopes said.

    Attributes:
        features: the place of each (line, method) in θ, F of them.
        corrections: what slopes around plans said so far.
    """

    def __init__(self, menu: Menu) -> None:
        self.menu = menu
        keys = [(i, option.method) for i, line in enumerate(menu.lines) for option in line.options[1:]]
        self.features = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        self.corrections: list[Corrections] = []
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

    def losses(self, theta: np.ndarray, share: float) -> list[np.ndarray]:
        """Each line's corrected divergences in plans whose size is ``share`` of dense, for an allocator."""
        logs = theta + factors_at(self.corrections, np.array([share]), len(self.features))[0]
        rows = zip(self._corrected(logs), self.menu.lines, strict=True)
        return [row[: len(line.options)] for row, line in rows]

    def chosen(self, plans: np.ndarray) -> np.ndarray:
        """The feature of what every line has in plans (T, lines), -1 for dense, (T, lines)."""
        chosen: np.ndarray = self._feature[self._lines, plans]
        return chosen

    def of(self, plans: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """The terms of plans (T, lines), (T, lines)."""
        terms: np.ndarray = self._corrected(theta)[self._lines, plans]
        if not self.corrections:
            return terms
        shares = self._sizes[self._lines, plans].sum(1)
        logs = factors_at(self.corrections, shares, len(self.features))  # (T, F)
        of_chosen = np.take_along_axis(logs, np.maximum(self.chosen(plans), 0), axis=1)
        shifted: np.ndarray = terms * np.exp(of_chosen)
        return shifted  # dense, whose feature is -1, has a term of 0 whatever it is multiplied by

    def _corrected(self, logs: np.ndarray) -> np.ndarray:
        """d exp(logs) of every option, (lines, the most options), for ``logs`` by feature, (F,)."""
        factors = np.append(np.exp(logs), 1.0)  # the last one serves dense, whose feature is -1
        corrected: np.ndarray = self._divergence * factors[self._feature]
        return corrected


def prior_root(kinds: Sequence[str], blocks: Sequence[int], features: Sequence[tuple[int, str]]) -> csr_array:
    """R (F + 2, P) of the prior covariance R Rᵀ of θ by ``features`` and of a and c: a column for each independent
    effect. ``kinds`` and ``blocks`` are those of each line."""
    size = len(features)
    of_line = [(line, kinds[line], blocks[line], method) for line, method in features]
    groups: list[tuple[float, list[object]]] = [
        (TUNING.site_deviation / np.sqrt(2), [line for line, _, _, _ in of_line]),
        (TUNING.site_deviation / np.sqrt(2), list(features)),
        (TUNING.kind_deviation, [kind for _, kind, _, _ in of_line]),
        (TUNING.block_deviation, [block for _, _, block, _ in of_line]),
        (TUNING.method_deviation, [(kind, method) for _, kind, _, method in of_line]),
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
