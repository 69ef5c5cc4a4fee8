"""The space: which options each site may take, and the variables that samplers choose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Protocol

import optuna

from rankfront.methods import DENSE, DENSE_OPTION, InputError, Option, Site, get_method
from rankfront.search.config import SpaceConfig
from rankfront.search.names import Place
from rankfront.search.plans.plan import Plan

DENSE_KEEP = 1.0


@dataclass(frozen=True)
class Choices:
    """What one site may take: method -> kept fraction asked for -> option. Dense is always allowed."""

    methods: tuple[str, ...]
    keep: tuple[float, ...]
    options: Mapping[tuple[str, float], Option]

    def option(self, method: str, keep: float) -> Option:
        """``method`` at the level nearest ``keep``; dense at 1.0 and where the method offers nothing here."""
        if keep >= DENSE_KEEP:
            return DENSE_OPTION
        level = min(self.keep, key=lambda offered: abs(offered - keep))
        return self.options.get((method, level), DENSE_OPTION)


class Variable(Protocol):
    """One decision that a sampler takes: for a group of sites, or for one."""

    @property
    def name(self) -> str: ...
    @property
    def members(self) -> Collection[str]:
        """The sites that it decides for."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Option]:
        """Site name -> option, as the sampler draws."""

    def parameters(self, method: str, keep: float) -> dict[str, int | str]:
        """What `suggest` would have to draw for ``method`` at ``keep``, to enqueue it."""


@dataclass(frozen=True)
class Tied:
    """A method, and a kept fraction or dense, for all of ``sites``. Levels are drawn by their place in the sorted
    list, so that samplers see an order."""

    name: str
    sites: Mapping[str, Choices]

    @property
    def members(self) -> Collection[str]:
        return self.sites.keys()

    @property
    def choices(self) -> Choices:
        """What the sites of a group have in common: names of methods and kept fractions."""
        return next(iter(self.sites.values()))

    @property
    def levels(self) -> list[float]:
        return [*sorted(self.choices.keep), DENSE_KEEP]

    def suggest(self, trial: optuna.Trial) -> dict[str, Option]:
        methods = self.choices.methods
        keep = self.levels[trial.suggest_int(f"{self.name} keep", 0, len(self.levels) - 1)]
        method = trial.suggest_categorical(f"{self.name} method", methods) if len(methods) > 1 else methods[0]
        return {site: choices.option(str(method), keep) for site, choices in self.sites.items()}

    def parameters(self, method: str, keep: float) -> dict[str, int | str]:
        levels = self.levels
        near = min(range(len(levels) - 1), key=lambda place: abs(levels[place] - keep))
        chosen: dict[str, int | str] = {f"{self.name} keep": len(levels) - 1 if keep >= DENSE_KEEP else near}
        if len(self.choices.methods) > 1:
            chosen[f"{self.name} method"] = method if method in self.choices.methods else self.choices.methods[0]
        return chosen


@dataclass(frozen=True)
class Single:
    """One site's option by its place in ``options``: dense first, then by falling cost."""

    name: str
    choices: Choices
    options: tuple[Option, ...]

    @property
    def members(self) -> Collection[str]:
        return (self.name,)

    def suggest(self, trial: optuna.Trial) -> dict[str, Option]:
        return {self.name: self.options[trial.suggest_int(self.name, 0, len(self.options) - 1)]}

    def parameters(self, method: str, keep: float) -> dict[str, int | str]:
        own = method if method in self.choices.methods else self.choices.methods[0]
        return {self.name: self.options.index(self.choices.option(own, keep))}


@dataclass(frozen=True)
class Anchor:
    """A uniform plan that every study measures first."""

    method: str
    keep: float

    @property
    def label(self) -> str:
        return "dense" if self.keep >= DENSE_KEEP else f"{self.method} keep={self.keep:g}"


class Space:
    """Sites with their choices, under the study's patterns and rules.

    Raises `InputError` where nothing is left to choose.
    """

    def __init__(self, sites: Mapping[Site, Place], config: SpaceConfig, groups: int) -> None:
        self.sites = sites
        self.config = config
        self.groups = groups
        self.untied: frozenset[str] = frozenset()  # groups whose sites have variables of their own
        chosen = [site for site, place in sites.items() if _included(site, place, config)]
        if not chosen:
            raise InputError(
                f"the space is empty: include={list(config.include)}, exclude={list(config.exclude)} leave none of"
                f" {len(sites)} sites, such as {next(iter(sites)).name!r}"
            )
        choices = {site: self._choices(site) for site in chosen}
        self.choices = {site: found for site, found in choices.items() if found.options}
        if not self.choices:
            methods = [name for name in config.methods if name != DENSE]
            reasons = [(name, site.name, get_method(name).refuses(site)) for site in chosen for name in methods]
            if reasons and all(reason for _, _, reason in reasons):
                name, place, reason = reasons[0]
                raise InputError(f"the space is empty: {name!r} cannot treat {place!r}, for {reason}")
            raise InputError(
                f"the space is empty: no method in {list(config.methods)} offers a rank below break-even on multiples"
                f" of {config.rank_multiple} at any of {len(chosen)} sites: lower space.rank_multiple"
            )

    def _choices(self, site: Site) -> Choices:
        methods, keep = self.config.methods, self.config.keep
        for rule in self.config.rule:
            if fnmatchcase(site.name, rule.match):
                methods, keep = rule.methods or methods, rule.keep or keep
        methods = tuple(name for name in methods if name != DENSE)  # dense is an option everywhere, named or not
        grid = self.config.grid(keep)
        offered = {name: get_method(name).options(site, grid) for name in methods}
        options = {(name, level): option for name, found in offered.items() for level, option in found.items()}
        return Choices(tuple(name for name in methods if offered[name]), keep, options)

    @property
    def methods(self) -> list[str]:
        """Every method that some site may take."""
        return sorted({name for choices in self.choices.values() for name in choices.methods})

    @property
    def needs(self) -> frozenset[str]:
        """Every statistic that some method needs."""
        return frozenset(need for name in self.methods for need in get_method(name).needs)

    def wanted(self) -> dict[Site, list[Option]]:
        """Every option of every site, each once."""
        return {
            site: sorted(set(choices.options.values()), key=lambda o: o.label) for site, choices in self.choices.items()
        }

    @cached_property
    def variables(self) -> list[Variable]:
        """One variable per kind of projection and band of depth; one per site where ``groups`` is 0.

        Sites of a group that differ in what they may choose (by a rule, say) get variables of their own.
        """
        if self.groups == 0:
            return [self._single(site) for site in self.choices]
        grouped: dict[tuple[str, tuple[str, ...], tuple[float, ...]], dict[str, Choices]] = {}
        for site, choices in self.choices.items():
            group = self._group(site, self.groups)
            key = (site.name if group in self.untied else group, choices.methods, choices.keep)
            grouped.setdefault(key, {})[site.name] = choices
        seen: dict[str, int] = {}
        variables: list[Variable] = []
        for (name, _, _), members in grouped.items():
            seen[name] = seen.get(name, 0) + 1
            variables.append(Tied(name if seen[name] == 1 else f"{name} ({seen[name]})", members))
        return variables

    @cached_property
    def _depth(self) -> int:
        return 1 + max((place.block for place in self.sites.values() if place.block is not None), default=0)

    def untie(self, predictions: Mapping[str, Mapping[str, float]], count: int) -> None:
        """Give the sites of the ``count`` most sensitive groups variables of their own.

        A group is as sensitive as its sites are predicted to hurt together, each at its middle option.
        """
        hurt: dict[str, float] = {}
        for site in self.choices:
            group, known = self._group(site, self.groups), sorted(predictions.get(site.name, {}).values())
            hurt[group] = hurt.get(group, 0.0) + (known[len(known) // 2] if known else 0.0)
        self.untied = frozenset(sorted(hurt, key=lambda group: -hurt[group])[:count])
        self.__dict__.pop("variables", None)  # made anew

    def _single(self, site: Site) -> Single:
        options = set(self.choices[site].options.values())
        cost = {option: get_method(option.method).storage(site, option).parameters for option in options}
        ordered = sorted(options, key=lambda option: (-cost[option], option.label))
        return Single(site.name, self.choices[site], (DENSE_OPTION, *ordered))

    def _group(self, site: Site, bands: int) -> str:
        place, depth = self.sites[site], self._depth
        if place.block is None:
            return place.kind
        return f"{place.kind} {place.block * bands // depth + 1}/{min(bands, depth)}"

    def bands(self, count: int) -> list[list[Site]]:
        """The sites to choose for, by kind of projection and ``count`` bands of depth."""
        groups: dict[str, list[Site]] = {}
        for site in self.choices:
            groups.setdefault(self._group(site, count), []).append(site)
        return list(groups.values())

    def place(self, site: str, option: Option) -> int:
        """Where ``option`` stands among the values of the variable that is ``site``'s own."""
        variable = next(variable for variable in self.variables if variable.name == site)
        if not isinstance(variable, Single):
            raise ValueError(f"the variables of this space are tied: {site!r} has none of its own")
        return variable.options.index(option)

    def draws(self, options: Mapping[str, Option]) -> dict[str, int]:
        """What every variable has to draw for ``options`` by site, the others dense; each site has its own variable."""
        treated = {site: option for site, option in options.items() if option != DENSE_OPTION}
        return {v.name: 0 for v in self.variables} | {site: self.place(site, o) for site, o in treated.items()}

    def suggest(self, trial: optuna.Trial, origin: Mapping[str, str]) -> Plan:
        """The plan that a sampler's draws for ``trial`` describe."""
        options: dict[str, Option] = {}
        for variable in self.variables:
            options |= variable.suggest(trial)
        return Plan.of(self.disjoint(options), origin)

    def disjoint(self, options: Mapping[str, Option]) -> dict[str, Option]:
        """``options`` without dense ones and those whose weights a larger site treats: samplers draw every variable."""
        kept: dict[str, Option] = {}
        claimed: set[str] = set()
        for site in self._largest_first:
            option = options.get(site.name, DENSE_OPTION)
            paths = {weight.path for weight in site.weights}
            if option != DENSE_OPTION and claimed.isdisjoint(paths):
                kept[site.name] = option
                claimed |= paths
        return kept

    @cached_property
    def _largest_first(self) -> list[Site]:
        return sorted(self.choices, key=lambda site: -len(site.weights))

    def anchor_parameters(self, anchor: Anchor) -> dict[str, int | str]:
        """The draws that give the same method and kept fraction everywhere, to enqueue so that samplers learn from it.

        Where a site does not offer the method, its own first method stands in; a joint site stays dense instead where
        one of its weights takes the method alone.
        """
        taken = {w.path for s, c in self.choices.items() if anchor.method in c.methods for w in s.weights}
        yielding = {
            site.name
            for site, choices in self.choices.items()
            if anchor.method not in choices.methods and any(weight.path in taken for weight in site.weights)
        }
        found: dict[str, int | str] = {}
        for variable in self.variables:
            keep = DENSE_KEEP if yielding.issuperset(variable.members) else anchor.keep
            found |= variable.parameters(anchor.method, keep)
        return found

    def anchors(self, budgets: Iterable[float]) -> list[Anchor]:
        """Dense, then every method at every budget, each level of the space's grid once."""
        found = [Anchor("dense", DENSE_KEEP)]
        levels = sorted({min(self.config.keep, key=lambda k: abs(k - budget)) for budget in budgets}, reverse=True)
        return found + [Anchor(method, keep) for keep in levels for method in self.methods]


def _included(site: Site, place: Place, config: SpaceConfig) -> bool:
    """Whether the patterns name ``site``; outside the blocks a bare wildcard is not enough."""
    names = [site.name, *(path for weight in site.weights for path in weight.tied)]

    def named(patterns: Iterable[str], accept: Callable[[str], bool]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns if accept(pattern) for name in names)

    def literal(pattern: str) -> bool:
        return bool(pattern.rpartition(".")[2].strip("*?"))

    accept = (lambda pattern: True) if place.block is not None else literal
    return named(config.include, accept) and not named(config.exclude, lambda pattern: True)
