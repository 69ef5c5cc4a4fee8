"""The menu: the table (site, option) -> size and predicted divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rankfront.methods import DENSE_OPTION, Option, Site, Storage, get_method
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.regions import Region, regions_of, rivals_of
from rankfront.search.tuning import TUNING

TINY = 1e-9  # nats; a prediction of nothing at all would make an option look free
Places = tuple[int, ...]  # a plan as an index into the options of each line of a menu
Predictions = Mapping[str, Mapping[str, float]]  # site name -> option label -> predicted divergence
Entry = tuple[tuple[int, ...], Option, float]  # of a line: costs, option, predicted divergence


@dataclass(frozen=True)
class Line:
    """Everything one site may take, or several together, dense first, then by falling cost.

    Attributes:
        site: its name, or that of them all.
        options: K of them.
        sizes: stored values, or bytes, of each, (K,) integers.
        divergence: predicted divergence of each alone, (K,), nats a token; 0 for dense.
        weights: what the site claims where it treats several weights jointly; empty where it is one weight.
        more: further costs of each, (K,) integers each, such as bytes beside stored values.
        sites: those that take an option together; empty where it is one.
    """

    site: str
    options: tuple[Option, ...]
    sizes: np.ndarray
    divergence: np.ndarray
    weights: tuple[str, ...] = ()
    more: tuple[np.ndarray, ...] = ()
    sites: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The sites that the line is of."""
        return self.sites or (self.site,)

    def treated(self, option: Option) -> dict[str, Option]:
        """Site -> ``option``, of all its sites."""
        return dict.fromkeys(self.members, option)

    @cached_property
    def costs(self) -> np.ndarray:
        """Every cost of each option, the size first, (costs, K)."""
        return np.array([self.sizes, *self.more])

    @property
    def claims(self) -> tuple[str, ...]:
        """The weights of the site, by the names of their own sites."""
        return self.weights or (self.site,)


@dataclass(frozen=True)
class Menu:
    """One line per site that may be treated; what is outside them is not counted here.

    A choice is an index into each line's options (`Places`): `encode` makes it of a plan, `decode` the plan of it.
    Lines that share weights are rivals: of those at most one is treated, and the others stand at dense, index 0,
    whatever becomes of their weights. Every weight that a joint line claims has a line of its own, if only with dense
    on it; ValueError otherwise.

    Attributes:
        lines: them.
        bases: where lines have to agree, the choices that every plan is one of, but for ``moves``; the first is dense.
        moves: what may be done to a base, at the lines where it is not 0; no two at one line.
    """

    lines: tuple[Line, ...]
    bases: tuple[Places, ...] = ()
    moves: tuple[Places, ...] = ()

    def __post_init__(self) -> None:
        alone = {line.site for line in self.lines if not line.weights}
        missing = {weight for line in self.lines for weight in line.claims} - alone
        if missing:
            raise ValueError(f"{min(missing)!r} is claimed by a joint line and has no line of its own: add one")

    @cached_property
    def dense(self) -> int:
        """Size with every site dense, each weight once."""
        return int(sum(line.sizes[0] for line in self.lines if not line.weights))

    @property
    def untreated(self) -> Places:
        """The choice that leaves every site dense."""
        return (0,) * len(self.lines)

    @property
    def count(self) -> int:
        """How many costs every option has, the size among them."""
        return 1 + (len(self.lines[0].more) if self.lines else 0)

    def weighed(self, weights: Sequence[float]) -> Menu:
        """The menu whose size is Σ_j w_j cost_j / cost_j(dense), in `Tuning.grains`; ``weights`` (`count`,).

        What is solved under it at some budget is a point of the front of all costs, and of divergence.
        """
        if self.count == 1:
            return self
        share = np.asarray(weights) / np.sum(weights) / np.maximum(self.costs(self.untreated), 1)
        sizes = [np.ceil(TUNING.grains * np.minimum(share @ line.costs, 1)).astype(int) for line in self.lines]
        lines = tuple(replace(line, sizes=own, more=()) for line, own in zip(self.lines, sizes, strict=True))
        return replace(self, lines=lines)

    @cached_property
    def even(self) -> Menu:
        """All costs weighed alike."""
        return self.weighed([1.0] * self.count)

    def costs(self, places: Sequence[int]) -> list[int]:
        """Every cost of the choice ``places``, the size first."""
        total = np.zeros(self.count, dtype=int)
        for line, place in zip(self.lines, places, strict=True):
            total += line.costs[:, place] - line.costs[:, 0] * bool(line.weights)
        return [int(cost) for cost in total]

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Lines grouped by the weights that they share."""
        return regions_of(tuple(line.claims for line in self.lines))

    @cached_property
    def rivals(self) -> tuple[tuple[int, ...], ...]:
        """For each line, the other lines that share a weight with it."""
        return rivals_of(tuple(line.claims for line in self.lines))

    @cached_property
    def least(self) -> int:
        """Size of the cheapest choice."""
        return self.size(self.cheapest)

    @cached_property
    def cheapest(self) -> Places:
        """The choice that stores least."""
        if self.bases:
            return min((moved(base, self.moves) for base in self.bases), key=self.size)
        # A joint line at dense is its single ones at dense, which are options of their own.
        sizes = [np.append(np.inf, line.sizes[1:]) if line.weights else line.sizes for line in self.lines]
        least = [float(own.min()) for own in sizes]
        taken = {line for region in self.regions for line in region.cover(least)}
        return tuple(int(own.argmin()) if line in taken else 0 for line, own in enumerate(sizes))

    def size(self, places: Sequence[int] | np.ndarray) -> int:
        """Size of the choice ``places``."""
        saved = sum(line.sizes[0] - line.sizes[k] for line, k in zip(self.lines, places, strict=True) if k)
        return self.dense - int(saved)

    def divergence(self, places: Sequence[int]) -> float:
        """Predicted divergence of ``places``, taken as additive."""
        return float(sum(line.divergence[place] for line, place in zip(self.lines, places, strict=True)))

    def decode(self, places: Sequence[int]) -> Plan:
        """The plan that a choice stands for."""
        treated = [line.treated(line.options[place]) for line, place in zip(self.lines, places, strict=True)]
        return Plan.of({site: option for own in treated for site, option in own.items()})

    def encode(self, plan: Plan) -> Places | None:
        """The choice that is ``plan``; None where a treatment is not on the menu, or not at all sites of a line."""
        found, treated = [0] * len(self.lines), [0] * len(self.lines)
        for choice in plan.choices:
            if choice not in self._places:
                return None
            line, place = self._places[choice]
            if treated[line] and found[line] != place:
                return None
            found[line] = place
            treated[line] += 1
        missed = any(count not in (0, len(line.members)) for count, line in zip(treated, self.lines, strict=True))
        return None if missed else tuple(found)

    @cached_property
    def _places(self) -> dict[tuple[str, Option], tuple[int, int]]:
        """(site, option) -> (line, place)."""
        return {
            (site, option): (line, place)
            for line, own in enumerate(self.lines)
            for place, option in enumerate(own.options)
            for site in own.members
        }


def moved(base: Places, moves: Iterable[Places]) -> Places:
    """The choice ``base`` with ``moves`` made."""
    found = list(base)
    for move in moves:
        found = [there or here for here, there in zip(found, move, strict=True)]
    return tuple(found)


Size = Callable[[Site, Option], int]  # what budgets count, of an option or dense


def stored(site: Site, option: Option) -> Storage:
    """What an option stores at a site, or dense, with the site's biases: an option that drops them saves them."""
    own = site.storage if option == DENSE_OPTION else get_method(option.method).storage(site, option)
    return own + site.biases


def values_stored(site: Site, option: Option) -> int:
    """Numbers, however many bits each has."""
    return stored(site, option).parameters


def make_menu(
    wanted: Mapping[Site, Iterable[Option]],
    predictions: Predictions,
    sizes: Sequence[Size] = (values_stored,),
    offered: Callable[[Site, Option], bool] = lambda site, option: True,
) -> Menu:
    """The menu of ``wanted`` under ``predictions``; predictions never fall as an option gets cheaper.

    Within a method, a level that stores less cannot be better: predictions are made monotone by a running
    maximum from the largest level down. ``sizes`` are the costs, what budgets count first. Options without a
    prediction, by no cost cheaper than dense, or not ``offered`` are left out. A weight that only a joint site treats
    has a line of its own with dense on it.
    """
    lines: list[Line] = []
    for site, options in wanted.items():
        known = predictions.get(site.name, {})
        dense = _costs(site, DENSE_OPTION, sizes)
        predicted = [option for option in options if np.isfinite(known.get(option.label, np.nan))]
        entries: list[Entry] = []
        worst: dict[str, float] = {}  # by method
        for own, option in sorted(((_costs(site, o, sizes), o) for o in predicted), key=lambda pair: -pair[0][0]):
            if any(a < b for a, b in zip(own, dense, strict=True)) and offered(site, option):
                worst[option.method] = max(known[option.label], worst.get(option.method, TINY))
                entries.append((own, option, worst[option.method]))
        if entries:
            entries.sort(key=lambda entry: (-entry[0][0], entry[2], entry[1].label))
            weights = tuple(weight.path for weight in site.weights) if len(site.weights) > 1 else ()
            lines.append(_line(site.name, [(dense, DENSE_OPTION, 0.0), *entries], weights))
    joint = [site for site in wanted if len(site.weights) > 1]
    lonely = {weight for line in lines for weight in line.weights} - {line.site for line in lines}
    single = {w.path: Site(w.path, (w,)) for site in joint for w in site.weights if w.path in lonely}
    lines += [_line(path, [(_costs(site, DENSE_OPTION, sizes), DENSE_OPTION, 0.0)]) for path, site in single.items()]
    return Menu(tuple(lines))


def _line(site: str, entries: Sequence[Entry], weights: tuple[str, ...] = ()) -> Line:
    costs, options, divergences = zip(*entries, strict=True)
    first, *more = np.array(costs).T
    return Line(site, options, first, np.array(divergences), weights, tuple(more))


def _costs(site: Site, option: Option, sizes: Sequence[Size]) -> tuple[int, ...]:
    """Every cost of an option; what saves biases on top of all its weights stores no less than nothing here."""
    return tuple(max(size(site, option), 0) for size in sizes)
