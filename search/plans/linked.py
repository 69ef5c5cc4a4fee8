"""Options that formats of exports ask for together: one width for all blocks, whole blocks left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rankfront.methods import DENSE_OPTION, Option, Site
from rankfront.search.config import SpaceConfig
from rankfront.search.names import Place
from rankfront.search.plans.variables import Choices, Linked
from rankfront.search.servable import FIRST_ATTENTION

ATTENTION = ("query", "key", "value", "output")
MLP = (("gate", "up", "down"), ("up", "down"))
WIDTH, GONE = "nystrom", "drop-block"  # methods that make an MLP narrower, and that leave a half of a block out


@dataclass(frozen=True)
class Halves:
    """The sites of one block that are all of its attention, and all of its MLP; None where it has none such."""

    attention: Site | None = None
    mlp: Site | None = None


def halves(sites: Mapping[Site, Place]) -> list[Halves]:
    """Those of every block, in order."""
    found: dict[int, Halves] = {place.block: Halves() for place in sites.values() if place.block is not None}
    for site, place in sites.items():
        if place.block is not None and site.roles == ATTENTION:
            found[place.block] = replace(found[place.block], attention=site)
        elif place.block is not None and site.roles in MLP:
            found[place.block] = replace(found[place.block], mlp=site)
    return [found[number] for number in sorted(found)]


def servable(
    choices: Mapping[Site, Choices], sites: Mapping[Site, Place], config: SpaceConfig
) -> tuple[dict[Site, Choices], list[Linked]]:
    """What of ``choices`` the study's formats hold; what sites take together there, empty where they need not.

    The first block keeps its attention, which engines count their caches by; in the format plain it is never left out.
    vLLM runs factors inside blocks alone.
    """
    kept, blocks = dict(choices), halves(sites)
    if "vllm" in config.servable:
        kept = {site: own for site, own in kept.items() if sites[site].block is not None}
    first = blocks[0] if blocks else Halves()
    if any(form in config.servable for form in FIRST_ATTENTION):
        kept = without(kept, GONE, [first.attention])
    if "plain" not in config.servable:
        return kept, []
    widths = common_widths(kept, [block.mlp for block in blocks])
    found = [_width(kept, [block.mlp for block in blocks if block.mlp], widths, config)] if widths else []
    kept = without(kept, WIDTH, kept, but=widths)
    for number, block in enumerate(blocks):
        both = (block.attention, block.mlp)
        offering = [site for site in both if site in kept and GONE in kept[site].methods]
        if number and len(offering) == len(both):
            found.append(_gone(number, offering, kept, config))
        else:
            kept = without(kept, GONE, both)
    together = {name for linked in found for name in linked.members}
    return {site: own for site, own in kept.items() if site.name in together}, found


def without(
    choices: Mapping[Site, Choices], method: str, sites: Collection[Site | None], but: Collection[Option] = ()
) -> dict[Site, Choices]:
    """``choices`` without the options of ``method`` at ``sites``, ``but`` some; without sites that have no others."""
    found = {}
    for site, own in choices.items():
        options = {
            key: option for key, option in own.options.items() if site not in sites or key[0] != method or option in but
        }
        offered = {name for name, _ in options}
        if options:
            found[site] = Choices(tuple(name for name in own.methods if name in offered), own.keep, options)
    return found


def common_widths(choices: Mapping[Site, Choices], mlps: Sequence[Site | None]) -> list[Option]:
    """The widths that the MLP of every block may take, the largest first; none where a block has no MLP to narrow."""
    offered = [
        {option for (method, _), option in choices[site].options.items() if method == WIDTH}
        for site in mlps
        if site is not None and site in choices
    ]
    common = set.intersection(*offered) if len(offered) == len(mlps) > 0 else set()
    return sorted(common, key=lambda option: -int(option["neurons"]))


def _width(
    choices: Mapping[Site, Choices], mlps: Sequence[Site], widths: Sequence[Option], config: SpaceConfig
) -> Linked:
    offered = choices[mlps[0]].options
    places = {option: place for place, option in enumerate(widths, start=1)}
    levels = {keep: places.get(offered.get((WIDTH, keep), DENSE_OPTION), 0) for keep in config.keep}
    together = ({}, *({site.name: option for site in mlps} for option in widths))
    return Linked("width of every MLP", mlps[0].name, WIDTH, levels, together, common=True)


def _gone(number: int, both: Sequence[Site], choices: Mapping[Site, Choices], config: SpaceConfig) -> Linked:
    offered = choices[both[0]].options
    levels = {keep: int((GONE, keep) in offered) for keep in config.keep}
    option = next(option for (method, _), option in offered.items() if method == GONE)
    return Linked(f"block {number}", both[0].name, GONE, levels, ({}, {site.name: option for site in both}))
