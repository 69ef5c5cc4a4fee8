"""The menu: the table (site, option) -> stored parameters and predicted divergence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankfront.methods import DENSE_OPTION, Option, Site, get_method

TINY = 1e-9  # nats; a prediction of nothing at all would make an option look free
Predictions = Mapping[str, Mapping[str, float]]  # site name -> option label -> predicted divergence


@dataclass(frozen=True)
class Line:
    """Everything one site may take, dense first, then by falling cost.

    Attributes:
        site: its name.
        options: K of them.
        parameters: stored values of each, (K,) integers.
        divergence: predicted divergence of each alone, (K,), nats a token; 0 for dense.
    """

    site: str
    options: tuple[Option, ...]
    parameters: np.ndarray
    divergence: np.ndarray


@dataclass(frozen=True)
class Menu:
    """One line per site that may be treated; what is outside them is not counted here."""

    lines: tuple[Line, ...]

    @cached_property
    def dense(self) -> int:
        """Stored values with every site dense."""
        return int(sum(line.parameters[0] for line in self.lines))

    @cached_property
    def _sites(self) -> frozenset[str]:
        return frozenset(line.site for line in self.lines)

    @cached_property
    def least(self) -> int:
        """Stored values with every site at its cheapest option."""
        return int(sum(line.parameters.min() for line in self.lines))

    def parameters(self, places: Sequence[int]) -> int:
        """Stored values of the choice ``places``: an index into each line's options."""
        return int(sum(line.parameters[place] for line, place in zip(self.lines, places, strict=True)))

    def divergence(self, places: Sequence[int]) -> float:
        """Predicted divergence of ``places``, taken as additive."""
        return float(sum(line.divergence[place] for line, place in zip(self.lines, places, strict=True)))

    def choices(self, places: Sequence[int]) -> dict[str, Option]:
        """Site name -> option."""
        return {line.site: line.options[place] for line, place in zip(self.lines, places, strict=True)}

    def places(self, option_of: Mapping[str, Option]) -> list[int] | None:
        """Where a plan's options stand in the lines; None where a treatment is not on the menu."""
        if any(option != DENSE_OPTION for site, option in option_of.items() if site not in self._sites):
            return None
        found = []
        for line in self.lines:
            option = option_of.get(line.site, DENSE_OPTION)
            if option not in line.options:
                return None
            found.append(line.options.index(option))
        return found


def make_menu(wanted: Mapping[Site, Iterable[Option]], predictions: Predictions) -> Menu:
    """The menu of ``wanted`` under ``predictions``; predictions never fall as an option gets cheaper.

    Within a method, a level that stores less cannot be better: predictions are made monotone by a running
    maximum from the largest level down. Options without a prediction are left out.
    """
    lines = []
    for site, options in wanted.items():
        known = predictions.get(site.name, {})
        by_method: dict[str, list[tuple[int, Option, float]]] = {}
        for option in options:
            if np.isfinite(known.get(option.label, np.nan)):
                stored = get_method(option.method).storage(site, option).parameters
                by_method.setdefault(option.method, []).append((stored, option, max(known[option.label], TINY)))
        entries: list[tuple[int, Option, float]] = []
        for found in by_method.values():
            worst = 0.0
            for stored, option, divergence in sorted(found, key=lambda entry: -entry[0]):
                worst = max(worst, divergence)
                entries.append((stored, option, worst))
        if entries:
            entries.sort(key=lambda entry: (-entry[0], entry[2], entry[1].label))
            entries.insert(0, (site.storage.parameters, DENSE_OPTION, 0.0))
            stored_values, chosen, divergences = zip(*entries, strict=True)
            lines.append(Line(site.name, chosen, np.array(stored_values), np.array(divergences)))
    return Menu(tuple(lines))
