"""``rankfront engines``: formats of exports, engines that open them, and what of a plan stays small there."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from rankfront.search.plain import literal
from rankfront.search.serve.doors import DOORS, ENGINES, Door


def engines_json() -> list[dict[str, Any]]:
    """The documented shape of ``rankfront engines --json``."""
    return [
        {
            "engine": name,
            "installed": engine.installed,
            "tried": engine.tried,
            "formats": {
                form: {"asks_for": door.engines[name].replace("`", "") or None, "keeps": dict(door.keeps)}
                for form, door in DOORS.items()
                if name in door.engines
            },
        }
        for name, engine in ENGINES.items()
    ]


def kept(door: Door) -> str:
    """What of a plan a format holds at its size, in a line."""
    methods: dict[str, list[str]] = {}
    for method, what in door.keeps.items():
        methods.setdefault(what, []).append(method)
    return "; ".join(f"{', '.join(named)}: {what}" for what, named in methods.items()) or "nothing"


def engines_table() -> Table:
    """A line for each engine and format."""
    table = Table(caption="Methods that a format does not keep are multiplied out to dense weights, heads whole.")
    for heading in ("engine", "installed", "run by us", "format", "asks for", "keeps small"):
        table.add_column(heading)
    for name, engine in ENGINES.items():
        for number, (form, door) in enumerate((form, door) for form, door in DOORS.items() if name in door.engines):
            own = ("", "", "") if number else (name, engine.installed or "no", "yes" if engine.tried else "no")
            cells = (*own, form, door.engines[name].replace("`", ""), kept(door))
            table.add_row(*(literal(cell) for cell in cells))
    return table
