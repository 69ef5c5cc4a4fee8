"""The sites of a study's model, as its first launch kept them: whoever reads a run needs no model for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rankfront.methods import Heads, Site, Weight
from rankfront.search.attributes import SITES, Attributes
from rankfront.search.config import ModelConfig
from rankfront.search.names import Place

Sites = Mapping[Site, Place]


def pack_sites(sites: Sites) -> list[dict[str, Any]]:
    """``sites`` as plain data, in their order, by the names of their fields; those at their defaults are left out."""
    return [
        {
            "name": site.name,
            "weights": [_without_defaults(asdict(weight), Weight) for weight in site.weights],
            "place": [place.block, place.kind],
            **({"heads": asdict(site.heads)} if site.heads else {}),
            **({"separate": True} if site.separate else {}),
            **({"places": site.places} if site.places else {}),
        }
        for site, place in sites.items()
    ]


def _without_defaults(record: dict[str, Any], kind: type) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value != getattr(kind, key, None)}


def unpack_sites(record: list[dict[str, Any]]) -> dict[Site, Place]:
    """What `pack_sites` packed, out of JSON too."""
    return {
        Site(
            each["name"],
            tuple(
                Weight(**weight | {name: tuple(weight.get(name, ())) for name in ("tied", "shared")})
                for weight in each["weights"]
            ),
            _heads(each.get("heads")),
            each.get("separate", False),
            tuple(each.get("places", ())),
        ): Place(*each["place"])
        for each in record
    }


def _heads(record: dict[str, Any] | None) -> Heads | None:
    if record is None:
        return None
    planes = record["planes"]
    return Heads(**record | {"planes": None if planes is None else tuple(tuple(pair) for pair in planes)})


def known_sites(known: Attributes, model: ModelConfig) -> Sites:
    """The sites that a study's attributes hold; for runs of earlier versions those of the model's skeleton, which takes
    seconds to import what builds it."""
    if SITES in known:
        return unpack_sites(known[SITES])
    from rankfront.search.inputs.outline import outline_of
    from rankfront.search.inputs.resolve import resolve

    return outline_of(resolve(model.name, model.trust_remote_code, model.task)).sites
