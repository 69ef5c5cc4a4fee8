"""What statistics of calibration take of memory, and the sites that are measured together under a limit on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rankfront.methods import Site, narrow_outputs

STATISTIC_BYTES = 4  # sums are kept in fp32
FORM_BYTES = 16  # of an entry of a Gram while its sites are factored: its regularised form and root in fp64


@dataclass(frozen=True)
class Held:
    """Bytes of statistics: the sums of all sites, and at most what Grams take while their sites are factored."""

    sums: int
    forms: int

    @property
    def total(self) -> int:
        return self.sums + self.forms


def held_by(sites: Sequence[Site], groups: Mapping[str, str], needs: frozenset[str]) -> Held:
    """What ``sites`` that are measured together take, while they are handed over one by one. ``groups`` as of
    `shared_inputs`; a weight that it lacks shares with none."""
    inputs = {groups.get(w.path, w.path): w.in_features for site in sites for w in site.measured}
    weights = {w.path: w for site in sites for w in site.measured}.values()
    sums = sum(n * n for n in inputs.values()) if "gram" in needs else 0
    if "gradient" in needs:
        sums += sum(w.out_features**2 for w in weights if narrow_outputs(w.out_features, w.in_features))
    vectors = sum(inputs.values()) if "absolute" in needs else 0
    if "fisher" in needs:
        vectors += sum(weight.in_features for weight in weights)
    forms = 0
    if "gram" in needs:
        left = Counter(groups.get(w.path, w.path) for site in sites for w in site.measured)
        now: set[str] = set()
        for site in sites:
            own = [groups.get(w.path, w.path) for w in site.measured]
            now |= set(own)
            forms = max(forms, sum(FORM_BYTES * inputs[lead] ** 2 for lead in now))
            left.subtract(own)
            now -= {lead for lead in own if not left[lead]}
    return Held(STATISTIC_BYTES * (sums + vectors), forms)


def passes_of(
    sites: Sequence[Site],
    groups: Mapping[str, str],
    needs: frozenset[str],
    limit: int,
    block: Callable[[Site], Any],
) -> list[list[Site]]:
    """Cut ``sites`` into runs whose statistics stay under ``limit`` bytes, those of one ``block`` at least."""
    passes: list[list[Site]] = []
    held = Held(0, 0)
    for _, own in groupby(sites, key=block):
        run = list(own)
        more = held_by(run, groups, needs)
        together = Held(held.sums + more.sums, max(held.forms, more.forms))
        if passes and together.total <= limit:
            passes[-1] += run
            held = together
        else:
            passes.append(run)
            held = more
    return passes
