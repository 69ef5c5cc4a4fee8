"""The space: which options each site may take, and the plans that samplers' variables stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import optuna

from rankfront.methods import (
    DENSE,
    INTEGER_BITS,
    InputError,
    Option,
    Site,
    get_method,
    narrow_name,
    narrowed,
    rounding_whole,
)
from rankfront.search.config import FULL_BITS, SpaceConfig
from rankfront.search.names import Place
from rankfront.search.plans.alike import Groups, alike
from rankfront.search.plans.linked import servable
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.variables import DENSE_KEEP, Choices, Linked, Parameters, Single, Tied, Variable
from rankfront.search.servable import held_by_all


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

    Args:
        sites: every site of the model, and where it is.
        config: the patterns and rules.
        groups: bands of depth in which the sites of a kind share a variable; 0 gives each site its own.
        alone: groups whose sites have variables of their own all the same.

    Raises `InputError` where nothing is left to choose.
    """

    linked: Sequence[Linked] = ()

    def __init__(
        self, sites: Mapping[Site, Place], config: SpaceConfig, groups: int, alone: frozenset[str] = frozenset()
    ) -> None:
        self.sites = sites
        self.config = config
        self.groups = groups
        self.alone = alone
        self.choices, self.linked = _choices(sites, config)

    @property
    def methods(self) -> list[str]:
        """Every method that some site may take."""
        return sorted({name for choices in self.choices.values() for name in choices.methods})

    def wanted(self) -> dict[Site, list[Option]]:
        """Every option of every site, each once."""
        return {
            site: sorted(set(choices.options.values()), key=lambda o: o.label) for site, choices in self.choices.items()
        }

    @cached_property
    def variables(self) -> list[Variable]:
        """One variable per kind of projection and band of depth; one per site where ``groups`` is 0, or for those that
        are `alike`.

        Sites of a group that differ in what they may choose (by a rule, say) get variables of their own. Where a format
        wants sites to agree, `Linked` ones stand for all.
        """
        if self.linked:
            return list(self.linked)
        if self.groups == 0:
            return [
                Single.of(members[0], self.choices[members[0]], name, members) for name, members in self.alike.items()
            ]
        grouped: dict[tuple[str, tuple[str, ...], tuple[float, ...]], dict[str, Choices]] = {}
        for site, choices in self.choices.items():
            group = self._group(site, self.groups)
            key = (site.name if group in self.alone else group, choices.methods, choices.keep)
            grouped.setdefault(key, {})[site.name] = choices
        seen: dict[str, int] = {}
        variables: list[Variable] = []
        for (name, _, _), members in grouped.items():
            seen[name] = seen.get(name, 0) + 1
            variables.append(Tied(name if seen[name] == 1 else f"{name} ({seen[name]})", members))
        return variables

    @cached_property
    def alike(self) -> Groups:
        """Name -> the sites that our sampler decides for at once: experts of a layer, unless the study wants them
        apart; each other site by itself."""
        return alike(self.choices, self.sites, self.config.experts == "together")

    @cached_property
    def _depth(self) -> int:
        return 1 + max((place.block for place in self.sites.values() if place.block is not None), default=0)

    def untied(self, predictions: Mapping[str, Mapping[str, float]], count: int) -> Space:
        """The space in which the sites of the ``count`` most sensitive groups have variables of their own.

        A group is as sensitive as its sites are predicted to hurt together, each at its middle option.
        """
        hurt: dict[str, float] = {}
        for site in self.choices:
            group, known = self._group(site, self.groups), sorted(predictions.get(site.name, {}).values())
            hurt[group] = hurt.get(group, 0.0) + (known[len(known) // 2] if known else 0.0)
        alone = frozenset(sorted(hurt, key=lambda group: -hurt[group])[:count])
        return Space(self.sites, self.config, self.groups, alone)

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

    @cached_property
    def options(self) -> dict[str, tuple[Option, ...]]:
        """The options of each site that is decided for alone, or with others at once, dense first."""
        if self.linked:
            return {site.name: Single.of(site, choices).options for site, choices in self.choices.items()}
        return {variable.name: variable.options for variable in self.variables if isinstance(variable, Single)}

    @property
    def counts(self) -> dict[str, int]:
        """Variable -> how many values it has, of those that are one integer."""
        return {each.name: each.count for each in self.variables if isinstance(each, Single | Linked)}

    def encode(self, plan: Plan) -> Parameters:
        """A trial's parameters for ``plan``; ValueError where they cannot stand for it, as where variables are tied."""
        drawn: Parameters = {
            each.name: each.place(plan) for each in self.variables if isinstance(each, Single | Linked)
        }
        missed = plan.choices != self.decode(drawn).choices
        if missed:
            raise ValueError("the variables of this space are tied, and none of their values stand for this plan")
        return drawn

    def decode(self, parameters: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Plan:
        """The plan that a trial's parameters stand for. Samplers draw every variable: of sites that share weights the
        larger one is treated."""
        options: dict[str, Option] = {}
        for variable in self.variables:
            options |= variable.decode(parameters)
        return self.disjoint(Plan.of(options, origin))

    def suggest(self, trial: optuna.Trial, origin: Mapping[str, str]) -> Plan:
        """The plan that a sampler's draws for ``trial`` stand for."""
        drawn: Parameters = {}
        for variable in self.variables:
            drawn |= variable.suggest(trial)
        return self.decode(drawn, origin)

    def disjoint(self, plan: Plan) -> Plan:
        """``plan`` without the sites whose weights a larger one treats."""
        kept: dict[str, Option] = {}
        claimed: set[str] = set()
        for site in sorted(self.choices, key=lambda site: -len(site.weights)):
            paths = {weight.path for weight in site.weights}
            if site.name in plan.by_site and claimed.isdisjoint(paths):
                kept[site.name] = plan.by_site[site.name]
                claimed |= paths
        return Plan.of(kept, dict(plan.origin))

    def anchor_parameters(self, anchor: Anchor) -> Parameters:
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
        found: Parameters = {}
        for variable in self.variables:
            keep = DENSE_KEEP if yielding.issuperset(variable.members) else anchor.keep
            found |= variable.encode(anchor.method, keep)
        return found

    def anchors(self, budgets: Iterable[float]) -> list[Anchor]:
        """Dense, then every method at every budget, each level of the space's grid once; of what is offered in several
        numbers of bits, that in most."""
        found = [Anchor("dense", DENSE_KEEP)]
        levels = sorted({min(self.config.keep, key=lambda k: abs(k - budget)) for budget in budgets}, reverse=True)
        narrow = {narrow_name(method, bits) for method in self.methods for bits in INTEGER_BITS}
        methods = [method for method in self.methods if method not in narrow]
        return found + [Anchor(method, keep) for keep in levels for method in methods]


def _choices(sites: Mapping[Site, Place], config: SpaceConfig) -> tuple[dict[Site, Choices], list[Linked]]:
    """What each site may take, of those that may take anything, and what takes it together; `InputError` where none
    may."""
    chosen = [site for site, place in sites.items() if _included(site, place, config)]
    if not chosen:
        raise InputError(
            f"the space is empty: include={list(config.include)}, exclude={list(config.exclude)} leave none of"
            f" {len(sites)} sites, such as {next(iter(sites)).name!r}"
        )
    choices = {site: _choices_at(site, config) for site in chosen}
    choices = {site: found for site, found in choices.items() if found.options}
    kept, linked = servable(choices, sites, config)
    if kept:
        return kept, linked
    if choices:
        raise InputError(
            f"the space is empty: {' and '.join(config.servable)} would hold no plan at its size: plain wants an MLP in"
            " every block for one width, and attention and MLP of a block to leave it out; all formats keep the first"
            " attention"
        )
    methods = [name for name in config.methods if name != DENSE and held_by_all(config.servable, name)]
    reasons = [(name, site.name, get_method(name).refuses(site)) for site in chosen for name in methods]
    if reasons and all(reason for _, _, reason in reasons):
        name, place, reason = reasons[0]
        raise InputError(f"the space is empty: {name!r} cannot treat {place!r}, for {reason}")
    raise InputError(
        f"the space is empty: no method in {list(config.methods)} offers a rank below break-even on multiples"
        f" of {config.rank_multiple} at any of {len(chosen)} sites: lower space.rank_multiple"
    )


def _choices_at(site: Site, config: SpaceConfig) -> Choices:
    methods, keep, bits = config.methods, config.keep, config.bits
    for rule in config.rule:
        if fnmatchcase(site.name, rule.match):
            methods, keep, bits = rule.methods or methods, rule.keep or keep, rule.bits or bits
    methods = tuple(name for name in _in_bits(site, methods, bits) if held_by_all(config.servable, name))
    grid = config.grid(keep)
    offered = {name: get_method(name).options(site, grid) for name in methods}
    options = {(name, level): option for name, found in offered.items() for level, option in found.items()}
    return Choices(tuple(name for name in methods if offered[name]), keep, options)


def _in_bits(site: Site, methods: Sequence[str], bits: Sequence[int]) -> list[str]:
    """``methods`` in each of ``bits``, and the dense weight in each that is fewer than all: dense itself is an option
    everywhere, named or not."""
    named = [name for name in methods if name != DENSE]
    found: list[str] = []
    for width in bits:
        if width == FULL_BITS:
            found += named
            continue
        whole = [name for name in rounding_whole(width) if get_method(name).refuses(site) is None]
        found += whole[:1] + [narrow.name for name in named if (narrow := narrowed(name, width)) is not None]
    return list(dict.fromkeys(found))


def _included(site: Site, place: Place, config: SpaceConfig) -> bool:
    """Whether the patterns name ``site``; outside the blocks a bare wildcard is not enough."""
    names = [site.name, *(path for weight in site.weights for path in weight.tied)]

    def named(patterns: Iterable[str], accept: Callable[[str], bool]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns if accept(pattern) for name in names)

    def literal(pattern: str) -> bool:
        return bool(pattern.rpartition(".")[2].strip("*?"))

    accept = (lambda pattern: True) if place.block is not None else literal
    return named(config.include, accept) and not named(config.exclude, lambda pattern: True)
