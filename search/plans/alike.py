"""Sites that take one option together: the same projection of a layer's experts, unless a study wants each apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rankfront.methods import Site
from rankfront.search.names import Place
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.plans.variables import Choices

Groups = Mapping[str, Sequence[Site]]


def alike(choices: Mapping[Site, Choices], sites: Mapping[Site, Place], together: bool) -> Groups:
    """Name -> sites that take one option: with ``together`` those of a block that differ in a number alone, such as
    ``model.layers.0.mlp.experts.*.up_proj``, as far as they may choose the same; else each site by itself."""
    found: dict[tuple[str, frozenset[object]], list[Site]] = {}
    for site, own in choices.items():
        name = _name(site, sites[site]) if together else site.name
        found.setdefault((name, frozenset(own.options.items())), []).append(site)
    named: dict[str, list[Site]] = {}
    for (name, _), members in found.items():
        single = members[0].name if len(members) == 1 else name
        again = 1 + sum(other == single or other.startswith(f"{single} (") for other in named)
        named[single if again == 1 else f"{single} ({again})"] = members
    return named


def _name(site: Site, place: Place) -> str:
    """Its name, with ``*`` for the numbers that its kind has none of."""
    if place.block is None or "*" not in place.kind:
        return site.name
    kept = site.name.split(".")[: -len(place.kind.split("."))]
    return ".".join([*kept, place.kind])


def bundled(menu: Menu, groups: Groups) -> Menu:
    """``menu`` with one line for all sites of a group, of what every one of them may take: costs and predicted
    divergences are sums."""
    lines = {line.site: line for line in menu.lines}
    owner: dict[str, str] = {}
    members: dict[str, list[Line]] = {}
    for name, sites in groups.items():
        own = [lines[site.name] for site in sites if site.name in lines]
        if len(own) == len(sites) > 1:
            members[name] = own
            owner |= {line.site: name for line in own}
    if not members:
        return menu
    found: dict[str, Line] = {}
    for line in menu.lines:
        name = owner.get(line.site, line.site)
        if name not in found:
            made = _together(name, members[name]) if name in members else line
            found[name] = replace(made, weights=tuple(dict.fromkeys(owner.get(path, path) for path in made.weights)))
    return Menu(tuple(found.values()))


def _together(name: str, members: Sequence[Line]) -> Line:
    common = set.intersection(*(set(line.options) for line in members))
    options = tuple(option for option in members[0].options if option in common)
    at = [[line.options.index(option) for option in options] for line in members]
    costs = np.sum([line.costs[:, places] for line, places in zip(members, at, strict=True)], axis=0)
    divergence = np.sum([line.divergence[places] for line, places in zip(members, at, strict=True)], axis=0)
    order = np.lexsort((divergence[1:], -costs[0, 1:])) + 1  # as costs fall, dense first
    order = np.concatenate([[0], order])
    return Line(
        name,
        tuple(options[place] for place in order),
        costs[0, order],
        divergence[order],
        tuple(weight for line in members for weight in line.weights),
        tuple(costs[1:, order]),
        tuple(line.site for line in members),
    )
