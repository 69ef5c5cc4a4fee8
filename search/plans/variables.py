"""Variables of a space: what a sampler decides, for one site or for a group of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna

from rankfront.methods import DENSE_OPTION, Option, Site, get_method
from rankfront.search.plans.plan import Plan

DENSE_KEEP = 1.0
Parameters = dict[str, int | str]  # of a trial: variable -> what was drawn


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

    def suggest(self, trial: optuna.Trial) -> Parameters:
        """What the sampler draws."""

    def encode(self, method: str, keep: float) -> Parameters:
        """What has to be drawn for ``method`` at ``keep``."""

    def decode(self, parameters: Mapping[str, Any]) -> dict[str, Option]:
        """Site name -> option, as ``parameters`` have it; dense where they do not."""


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

    def suggest(self, trial: optuna.Trial) -> Parameters:
        drawn: Parameters = {self._keep: trial.suggest_int(self._keep, 0, len(self.levels) - 1)}
        if len(self.choices.methods) > 1:
            drawn[self._method] = str(trial.suggest_categorical(self._method, self.choices.methods))
        return drawn

    def encode(self, method: str, keep: float) -> Parameters:
        levels, methods = self.levels, self.choices.methods
        near = min(range(len(levels) - 1), key=lambda place: abs(levels[place] - keep))
        drawn: Parameters = {self._keep: len(levels) - 1 if keep >= DENSE_KEEP else near}
        if len(methods) > 1:
            drawn[self._method] = method if method in methods else methods[0]
        return drawn

    def decode(self, parameters: Mapping[str, Any]) -> dict[str, Option]:
        keep = self.levels[int(parameters.get(self._keep, -1))]
        method = str(parameters.get(self._method, self.choices.methods[0]))
        return {site: choices.option(method, keep) for site, choices in self.sites.items()}

    @property
    def _keep(self) -> str:
        return f"{self.name} keep"

    @property
    def _method(self) -> str:
        return f"{self.name} method"


@dataclass(frozen=True)
class Single:
    """One site's option, or that of several ``sites`` alike, by its place in ``options``: dense first, then by falling
    cost."""

    name: str
    choices: Choices
    options: tuple[Option, ...]
    sites: tuple[str, ...] = ()

    @classmethod
    def of(cls, site: Site, choices: Choices, name: str | None = None, sites: Sequence[Site] = ()) -> Single:
        """That of ``site``; or the one called ``name``, of ``sites`` that ``site`` is one of."""
        options = set(choices.options.values())
        cost = {option: get_method(option.method).storage(site, option).parameters for option in options}
        ordered = sorted(options, key=lambda option: (-cost[option], option.label))
        return cls(name or site.name, choices, (DENSE_OPTION, *ordered), tuple(each.name for each in sites))

    @property
    def members(self) -> Collection[str]:
        return self.sites or (self.name,)

    @property
    def count(self) -> int:
        return len(self.options)

    def place(self, plan: Plan) -> int:
        return self.options.index(plan.option(next(iter(self.members))))

    def suggest(self, trial: optuna.Trial) -> Parameters:
        return {self.name: trial.suggest_int(self.name, 0, self.count - 1)}

    def encode(self, method: str, keep: float) -> Parameters:
        own = method if method in self.choices.methods else self.choices.methods[0]
        return {self.name: self.options.index(self.choices.option(own, keep))}

    def decode(self, parameters: Mapping[str, Any]) -> dict[str, Option]:
        return dict.fromkeys(self.members, self.options[int(parameters.get(self.name, 0))])


@dataclass(frozen=True)
class Linked:
    """What several sites take together, by its place in ``together``: nothing first, then by falling cost.

    Attributes:
        anchor: the site that a plan's value is read off.
        method: of all options.
        levels: kept fraction -> the place of what is offered there, 0 where nothing is.
        together: site -> option, of all sites or of none.
        common: whether it is what others are exceptions from.
    """

    name: str
    anchor: str
    method: str
    levels: Mapping[float, int]
    together: tuple[Mapping[str, Option], ...]
    common: bool = False

    @property
    def members(self) -> Collection[str]:
        return self.together[-1].keys()

    @property
    def count(self) -> int:
        return len(self.together)

    def place(self, plan: Plan) -> int:
        own = plan.option(self.anchor)
        return next((place for place, each in enumerate(self.together) if each.get(self.anchor) == own), 0)

    def suggest(self, trial: optuna.Trial) -> Parameters:
        return {self.name: trial.suggest_int(self.name, 0, self.count - 1)}

    def encode(self, method: str, keep: float) -> Parameters:
        near = min(self.levels, key=lambda level: abs(level - keep))
        return {self.name: self.levels[near] if method == self.method and keep < DENSE_KEEP else 0}

    def decode(self, parameters: Mapping[str, Any]) -> dict[str, Option]:
        return dict(self.together[int(parameters.get(self.name, 0))])
