"""What rounding does to sites of several weights: the sum of what it does to each of them.

Errors of rounding at different matrices are independent, to good approximation, so that their second-order effects
add up: of a joint option in fewer bits,

    d(o) = d(o in all bits) + Σ_w s_w d_w(W_w in as many bits),

with s_w the values of the matrix that takes the place of W_w over those of W_w.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rankfront.methods import DENSE_OPTION, Option, Site, get_method, narrow_of, rounding_whole


class Part(NamedTuple):
    """``share`` times what the option ``label`` does at the single ``site``."""

    site: str
    label: str
    share: float


def rounded_parts(wanted: Mapping[Site, Iterable[Option]]) -> dict[tuple[str, str], list[Part]]:
    """(joint site, label) -> the parts that rounding adds; empty where the single weights are not rounded so."""
    singles = {site.weights[0].path: site for site in wanted if len(site.weights) == 1}
    found: dict[tuple[str, str], list[Part]] = {}
    for site, options in wanted.items():
        for option in options:
            narrow = narrow_of(get_method(option.method)) if len(site.weights) > 1 else None
            if narrow is None:
                continue
            parts = []
            matrices = narrow.base.matrices(site, narrow.plain(option))
            for weight, (rows, columns) in zip(site.weights, matrices, strict=True):
                single = singles.get(weight.path)
                names = rounding_whole(narrow.bits)
                whole = [] if single is None else [own for own in wanted[single] if own.method in names]
                if single is not None and whole:
                    parts.append(Part(single.name, whole[0].label, rows * columns / weight.storage.values))
            found[site.name, option.label] = parts if len(parts) == len(site.weights) else []
    return found


def add_rounding(found: dict[str, dict[str, tuple[float, ...]]], wanted: Mapping[Site, Iterable[Option]]) -> None:
    """Add to ``found``, site -> label -> effects beside dense or beside the same of `DENSE_OPTION`, what rounding does
    to joint sites; where that is unknown, the option goes."""
    for (site, label), parts in rounded_parts(wanted).items():
        own = found.get(site, {})
        if label not in own:
            continue
        if not parts or any(part.label not in found.get(part.site, {}) for part in parts):
            del own[label]
            continue
        effects = list(own[label])
        for part in parts:
            here = found[part.site]
            dense = here.get(DENSE_OPTION.label, (0.0,) * len(effects))
            effects = [e + part.share * (r - d) for e, r, d in zip(effects, here[part.label], dense, strict=True)]
        own[label] = tuple(effects)
