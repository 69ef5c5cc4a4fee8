"""What methods that treat heads share: the grid of widths, and key heads seen from the query heads that share them."""

from __future__ import annotations

from torch import Tensor

from rankfront.methods._method import Grid, Heads, Site


def heads_of(site: Site) -> Heads:
    """The site's heads; ValueError where it has none."""
    if site.heads is None:
        raise ValueError(f"site {site.name!r} does not say how its projections split into heads")
    return site.heads


def width_step(site: Site, grid: Grid) -> int:
    """Widths are multiples of this: the grid's, or an eighth of a head where heads are narrow."""
    return max(1, min(grid.rank_multiple, heads_of(site).width // 8))


def by_query(heads: Heads, by_key: Tensor) -> Tensor:
    """(r, keys, d) for the query heads that share each: (r, queries, d)."""
    return by_key.repeat_interleave(heads.queries // heads.keys, dim=1)
