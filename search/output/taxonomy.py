"""What ``rankfront methods`` prints: every method in its place in the taxonomy."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from rankfront.methods import DENSE, FAMILIES, Site, describe_methods, get_method
from rankfront.search.plain import literal

DENSE_ROW: dict[str, Any] = {
    "name": DENSE,
    "paper": "",
    "family": "dense",
    "geometry": "all of the space",
    "metric": "none",
    "formula": "Ŵ = W, an option of every site without being named",
    "needs": [],
    "nested": True,
}


def methods_json(model: str | None = None, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """The documented shape of ``rankfront methods --json``: by family, in the order of the taxonomy.

    With a ``model``, ``refuses`` says of every kind of site that it has why the method cannot treat it, or null.
    """
    order = list(FAMILIES)
    methods = sorted(describe_methods(), key=lambda described: order.index(described["family"]))
    found = [DENSE_ROW | {"needs": []}, *methods]  # a caller's own to change, as those of the methods are
    if model is None:
        return found
    from rankfront.search.inputs.model import skeleton
    from rankfront.search.inputs.resolve import resolve
    from rankfront.search.inputs.sites import find_sites

    kinds: dict[str, Site] = {}
    for site, place in find_sites(skeleton(resolve(model, trust_remote_code))).items():
        kinds.setdefault(place.kind, site)
    refusals: list[dict[str, str | None]] = [dict.fromkeys(kinds)]
    for described in methods:
        refuses = get_method(described["name"]).refuses
        refusals.append({kind: refuses(site) for kind, site in kinds.items()})
    return [row | {"refuses": refused} for row, refused in zip(found, refusals, strict=True)]


def methods_table(model: str | None = None, trust_remote_code: bool = False) -> Table:
    """The taxonomy as a rich table: every family, and under it its methods with a line of geometry each."""
    table = Table(title="methods", title_justify="left")
    names = ("name", "geometry", "metric", "needs", "paper")
    for name in names:
        table.add_column(name, no_wrap=name == "name")
    if model is not None:
        table.add_column(literal(f"sites of {model}"), justify="right")
    family = None
    for method in methods_json(model, trust_remote_code):
        if method["family"] != family:
            family = method["family"]
            table.add_section()
            if family in FAMILIES:
                table.add_row(f"[bold]{family}", f"[bold]{FAMILIES[family]}")
        shown = method | {"needs": ", ".join(method["needs"]) or "-"}
        cells = [shown[name] for name in names]
        if model is not None:
            treated = [kind for kind, reason in method["refuses"].items() if reason is None]
            cells.append(f"{len(treated)} of {len(method['refuses'])} kinds")
        table.add_row(*cells)
    return table
