"""What a search reads of a model without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rankfront.methods import Site
from rankfront.search.inputs.capacity import Capacity, capacity_of
from rankfront.search.inputs.coverage import Coverage, coverage_of
from rankfront.search.inputs.model import count_parameters, skeleton, use_attention
from rankfront.search.inputs.sites import find_sites
from rankfront.search.inputs.source import Source
from rankfront.search.names import Place


@dataclass(frozen=True)
class Outline:
    """A model's shapes and names.

    Attributes:
        sites: every weight that can be treated, and where it is.
        parameters: stored values, each once.
        capacity: what it can read.
        coverage: how much of its blocks are sites.
    """

    sites: Mapping[Site, Place]
    parameters: int
    capacity: Capacity
    coverage: Coverage

    def without(self, refused: Mapping[str, str]) -> Outline:
        """The same but for the sites that are ``refused``, by name with a reason."""
        kept = {site: place for site, place in self.sites.items() if site.name not in refused}
        return replace(self, sites=kept, coverage=self.coverage.without(self.sites, refused))


def outline_of(source: Source, attention: str | None = None) -> Outline:
    """Of the model's `skeleton` with transformers' attention implementation ``attention``.

    Raises `InputError` where the model cannot be searched, or has no such implementation.
    """
    model = skeleton(source)
    use_attention(model, attention)
    sites = find_sites(model)
    return Outline(sites, count_parameters(model), capacity_of(model), coverage_of(model, sites))
