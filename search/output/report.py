"""The page a person looks at: the front drawn, plans by block, what limits cost. One HTML file, which needs no network.

What it shows is data in the page, drawn by the code of report.html with plotly. Other tables are plain HTML.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from rankfront.methods import DENSE, DENSE_OPTION, Site
from rankfront.objectives import make_objective
from rankfront.search.atomic import write_whole
from rankfront.search.attributes import task_scores_of
from rankfront.search.output.results import Results
from rankfront.search.output.tables import closed
from rankfront.search.plain import plain
from rankfront.search.plans.menu import values_stored
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row, comparable

SIZES = ("parameters", "block_parameters", "bytes", "latency")  # objectives that a page draws across, the first of them
CELLS = 400_000  # of plans that a page holds at most, about 5 MB: those of the front first; a guess


def write_report(found: Results, path: Path) -> None:
    """Write the page to ``path``, replacing it whole."""
    path.parent.resolve(strict=True)  # a folder that is not there is a slip, and none is made
    write_whole(path, report_page(found).encode())


def report_page(found: Results) -> str:
    """The whole page."""
    template = Template(files("rankfront.search.output").joinpath("report.html").read_text(encoding="utf-8"))
    data = json.dumps(_data(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    box = found.box
    corners = ", ".join(f"{name} {low:.4g} to {box.reference[name]:.4g}" for name, low in box.ideal.items())
    return template.substitute(
        title=_escaped(found.config.model.name),
        said=_escaped(f"{len(comparable(found.rows))} trials, {len(found.front())} on the front."),
        volume=_escaped(f"Hypervolume {found.hypervolume():.4f} of the box {corners} (ideal to reference)."),
        front=_table(found, found.front()),
        healed=_healed(found),
        continuations=_continuations(found),
        data=data,
        plotly=get_plotlyjs(),
    )


def _data(found: Results) -> dict[str, Any]:
    """What the page's code draws: axes, trials, plans. Every string in it is `plain`."""
    axes = _axes(found)
    front = [row.number for row in found.front()]
    shown = comparable(found.rows)
    grid = Grid(found)
    order = sorted(shown, key=lambda row: (row.number not in front, not _is_uniform(row), row.number))
    held = order[: max(CELLS // max(grid.cells, 1), len(front))]
    healed = found.healed.members
    return {
        "axes": axes,
        "start": _start(found),
        "trials": [
            {
                "number": row.number,
                "origin": plain(row.origin),
                "group": _group(row, front),
                "uniform": row.is_dense or _is_uniform(row),
                "values": [_finite(row.figure(axis["name"])) for axis in axes],
            }
            for row in shown
        ],
        "healed": [
            {
                "number": number,
                "values": [_finite(each.row.figure(axis["name"])) for axis in axes],
                "closed": closed(found, each),
            }
            for number, each in healed.items()
        ],
        "kinds": [plain(kind) for kind in grid.kinds],
        "blocks": grid.blocks,
        "outside": [plain(name) for name in grid.outside],
        "plans": {row.number: grid.plan(row) for row in held if row.plan_json is not None},
        "labels": [plain(label) for label in grid.labels],
        "knee": found.knee().number,
        "commands": _commands(found),
    }


def _axes(found: Results) -> list[dict[str, Any]]:
    """What a trial has figures of: the objectives, and the two counts of parameters."""
    objectives = found.config.objectives
    made = {name: make_objective(name, options) for name, options in objectives.items()}
    axes = [{"name": name, "unit": plain(made[name].unit), "log": made[name].logarithmic} for name in objectives]
    rows = comparable(found.rows)
    more = [
        name
        for name in ("parameters", "block_parameters", "bytes", "perplexity")
        if name not in objectives and rows and all(isinstance(row.attributes.get(name), int | float) for row in rows)
    ]
    return axes + [{"name": name, "unit": "", "log": name == "perplexity"} for name in more]


def _start(found: Results) -> dict[str, str]:
    """The axes that the page shows first: a size across, a quality up."""
    names = list(found.config.objectives)
    size = next((name for name in SIZES if name in names), names[-1])
    return {"x": size, "y": next((name for name in names if name not in SIZES), names[0])}


def _is_uniform(row: Row) -> bool:
    return row.origin.startswith("anchor") and not row.is_dense


def _group(row: Row, front: Sequence[int]) -> str:
    if row.is_dense:
        return "dense"
    if row.number in front:
        return "front"
    return "uniform" if _is_uniform(row) else "dominated"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


def _commands(found: Results) -> list[list[str]]:
    """(what it does, the command), with ``TRIAL`` where the number of a trial goes."""
    run = shlex.quote(plain(found.path))
    export = f"rankfront export {run} --trial TRIAL"
    return [
        ["the plan, site by site", f"rankfront show {run} --trial TRIAL"],
        ["a folder to load and serve", f"{export} --out small"],
        ["healed by training first", f"{export} --heal 1M --out small"],
        ["for llama.cpp, where its methods allow", f"{export} --format gguf --out small"],
    ]


class Grid:
    """Kept fractions of plans by kind of weight and block. A site that treats several weights is folded onto the
    weights that it claims: each shows what the joint treatment keeps of all of them."""

    def __init__(self, found: Results) -> None:
        self.sites = found.sites
        alone = {site.name: place for site, place in self.sites.items() if len(site.weights) == 1}
        inside = {name: place for name, place in alone.items() if place.block is not None}
        self.kinds = list(dict.fromkeys(place.kind for place in inside.values()))
        self.blocks = sorted({place.block for place in inside.values() if place.block is not None})
        self.outside = [name for name, place in alone.items() if place.block is None]
        self._place = alone
        self._labels: dict[str, int] = {DENSE: 0}

    @property
    def cells(self) -> int:
        """Weights of a plan."""
        return len(self._place)

    @property
    def labels(self) -> list[str]:
        """What is done to a weight, by the numbers that plans use."""
        return list(self._labels)

    @cached_property
    def _dense(self) -> Mapping[Site, int]:
        return {site: values_stored(site, DENSE_OPTION) for site in self.sites}

    def plan(self, row: Row) -> dict[str, list[float | int | None]]:
        """For every weight, kinds by blocks and then those outside: the fraction kept, and the number of a label."""
        plan = row.plan if row.stored is None else row.plan_to_show  # what no trial measured its methods work out
        stored = {} if row.stored is None else dict(zip(plan.by_site, row.stored, strict=True))
        keeps: dict[str, tuple[float, int]] = {}
        for site, dense in self._dense.items():
            if site.name in plan.by_site:
                option = plan.option(site.name)
                own = stored.get(site.name)
                kept = (values_stored(site, option) if own is None else own) / dense
                joint = f" ({site.name})" if len(site.weights) > 1 else ""
                label = self._labels.setdefault(f"{option.label}{joint}", len(self._labels))
                keeps |= {weight.path: (round(kept, 4), label) for weight in site.weights}
        cells: dict[tuple[str, int | None], tuple[float, int]] = {
            (place.kind, place.block): keeps.get(name, (1.0, 0)) for name, place in self._place.items()
        }
        order = [(kind, block) for kind in self.kinds for block in self.blocks]
        flat = [cells.get(place) for place in [*order, *((name, None) for name in self.outside)]]
        return {
            "keep": [None if cell is None else cell[0] for cell in flat],
            "label": [None if cell is None else cell[1] for cell in flat],
        }


def _escaped(text: object) -> str:
    return html.escape(plain(text))


def _healed(found: Results) -> str:
    """The front of healed plans, where some are."""
    rows, healing = found.healed_front(), found.healed.healing
    if not rows:
        return ""
    settings = healing["settings"]
    whose = "of each size, together with those that halving left behind" if "halving" in healing else "each"
    said = f"Plans healed by {settings['tokens']:,} tokens {whose}, on a front of their own; figures are after healing."
    return f"<h2>Healed</h2><p>{_escaped(said)}</p>{_table(found, rows)}"


def _table(found: Results, rows: Sequence[Row]) -> str:
    names = list(found.config.objectives)
    reported = {"perplexity": "report perplexity"}
    control = found.config.data.control
    if control.windows:
        reported["control"] = f"perplexity on {control.label}"
    tasks = found.config.task_names
    head = "".join(f"<th>{_escaped(name)}</th>" for name in ["trial", "origin", *names, *reported.values(), *tasks])
    lines = []
    for row in rows:
        cells = [str(row.number), row.origin, *(f"{value:.4g}" for value in row.values.values())]
        measured = [(row.report or {}).get(name) for name in reported]
        measured += [task_scores_of(row.report).get(name) for name in tasks]
        cells += ["-" if value is None else f"{value:.4g}" for value in measured]
        lines.append("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _continuations(found: Results) -> str:
    """What dense and every member of the front say after `PROMPTS`, and a line where the control text lost much."""
    said = {"dense": (found.dense_report or {}).get("continuations")}
    said |= {f"trial {row.number}": (row.report or {}).get("continuations") for row in found.front()}
    lines = [
        "<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in (name, *texts)) + "</tr>"
        for name, texts in said.items()
        if texts
    ]
    head = "".join(f"<th>{_escaped(prompt)} …</th>" for prompt in PROMPTS)
    warning = _escaped(found.warning(found.front()) or "")
    table = f'<table class="said"><tr><th>likeliest</th>{head}</tr>{"".join(lines)}</table>'
    return f'<p>{warning}</p><div class="wide">{table}</div>'
