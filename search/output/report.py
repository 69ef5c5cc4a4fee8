"""The page a person looks at: the front drawn, tabled, and the knee's plan by depth. One HTML file, no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from rankfront.search.atomic import write_whole
from rankfront.search.output.results import Results
from rankfront.search.output.tables import plan_json
from rankfront.search.plain import plain
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row, comparable

GROUPS = ("dominated", "uniform anchors", "front")
COLOURS = {"dominated": "#b8bdc6", "uniform anchors": "#d98e04", "front": "#1f5fbf"}
HEALED = "#2e8540"
SPAN = 20.0  # times the front's best value: what lies above is left out of the picture, and said so
PLAIN = {"displayModeBar": False}
SIZE_AXES = ("parameters", "block_parameters", "bytes", "latency")


def front_figure(found: Results) -> go.Figure:
    """The trials in the first objective against the first size-like one; quality on a logarithmic axis."""
    names = list(found.config.objectives)
    quality = names[0] if names[0] not in SIZE_AXES else next((n for n in names if n not in SIZE_AXES), names[0])
    size = next((name for name in SIZE_AXES if name in names and name != quality), names[-1])
    rows, front = comparable(found.rows), {row.number for row in found.front()}
    ceiling = SPAN * min((row.values[quality] for row in rows), default=1.0)
    shown = [row for row in rows if row.values[quality] <= ceiling]
    figure = go.Figure()
    for group in GROUPS:
        members = sorted((row for row in shown if _group(row, front) == group), key=lambda row: row.values[size])
        figure.add_scatter(
            x=[row.values[size] for row in members],
            y=[row.values[quality] for row in members],
            name=group,
            mode="lines+markers" if group == "front" and len(names) == 2 else "markers",
            marker={"color": COLOURS[group], "size": 10 if group == "front" else 8},
            text=[_hover(row) for row in members],
            hoverinfo="text",
        )
    left_out = len(rows) - len(shown)
    note = f" ({left_out} trials above the picture)" if left_out else ""
    healed = found.healed_front()
    if healed:
        figure.add_scatter(
            x=[row.values[size] for row in healed],
            y=[row.values[quality] for row in healed],
            name="front of healed plans",
            mode="lines+markers" if len(names) == 2 else "markers",
            marker={"color": HEALED, "size": 10},
            text=[f"healed<br>{_hover(row)}" for row in healed],
            hoverinfo="text",
        )
    figure.update_layout(
        title=f"{_escaped(found.config.model.name)}: {len(rows)} trials, {len(front)} on the front{note}",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        height=480,
    )
    figure.update_xaxes(title=size)
    ticks = [digit * 10.0**power for power in range(-6, 13) for digit in (1, 2, 3, 5)]
    figure.update_yaxes(
        title=f"{quality} (search split)", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]
    )
    return figure


def _group(row: Row, front: set[int]) -> str:
    if row.number in front:
        return "front"
    return "uniform anchors" if row.origin.startswith("anchor") else "dominated"


def _escaped(text: object) -> str:
    """``text`` as HTML shows it, and plotly, which reads some of it too."""
    return html.escape(plain(text))


def _hover(row: Row) -> str:
    figures = [f"{name} {value:.4g}" for name, value in row.values.items()]
    return "<br>".join([f"trial {row.number} ({_escaped(row.origin)})", *figures])


def plan_figure(found: Results, row: Row) -> go.Figure:
    """Kept fraction of every site of ``row``'s plan: kind of projection down, depth across."""
    cells: dict[str, dict[int, tuple[float, str]]] = {}
    for site in plan_json(found, row)["sites"]:
        parts = site["site"].split(".")
        depth = next((int(part) for part in parts if part.isdigit()), None)
        if depth is not None:
            kind = ".".join(parts[parts.index(str(depth)) + 1 :])
            level = " ".join(f"{k}={v}" for k, v in site["level"].items())
            lines = (site["site"], f"{site['method']} {level}")
            cells.setdefault(kind, {})[depth] = (site["keep"], "<br>".join(map(_escaped, lines)))
    depths = sorted({depth for row_cells in cells.values() for depth in row_cells})
    figure = go.Figure(
        go.Heatmap(
            x=depths,
            y=[_escaped(kind) for kind in cells],
            z=[[cells[kind].get(depth, (None, ""))[0] for depth in depths] for kind in cells],
            text=[[cells[kind].get(depth, (None, ""))[1] for depth in depths] for kind in cells],
            hovertemplate="%{text}<br>keep %{z:.3f}<extra></extra>",
            colorscale="Blues",
            zmin=0,
            zmax=1,
            colorbar={"title": "keep"},
        )
    )
    figure.update_layout(
        title=f"The knee, trial {row.number}: kept fraction by block",
        template="plotly_white",
        margin={"l": 160, "r": 20, "t": 60, "b": 50},
        height=380,
    )
    figure.update_xaxes(title="block")
    figure.update_yaxes(autorange="reversed")
    return figure


def write_report(found: Results, path: Path) -> None:
    """Write the page to ``path``, replacing it whole."""
    knee = found.knee()
    box = found.box
    corners = ", ".join(f"{name} {low:.4g} to {box.reference[name]:.4g}" for name, low in box.ideal.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_escaped(found.path)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .25rem .6rem; border-bottom: 1px solid #e3e6ea; text-align: right }}
td:nth-child(2), th:nth-child(2), .said td, .said th {{ text-align: left }}
</style></head><body>
<h1>{_escaped(found.config.model.name)}</h1>
<p>Hypervolume {found.hypervolume():.4f} of the box {_escaped(corners)} (ideal to reference).
The search split chose these trials; the report split, which the search never saw, and the control text, which is of
another domain, give the last columns.</p>
{front_figure(found).to_html(full_html=False, include_plotlyjs=True, config=PLAIN)}
{_table(found, found.front())}
{_healed(found)}
{_continuations(found)}
{plan_figure(found, knee).to_html(full_html=False, include_plotlyjs=False, config=PLAIN)}
</body></html>
"""
    path.parent.resolve(strict=True)  # a folder that is not there is a slip, and none is made
    write_whole(path, page.encode())


def _healed(found: Results) -> str:
    """The front of healed plans, where some are."""
    rows, healing = found.healed_front(), found.healed.healing
    if not rows:
        return ""
    settings = healing["settings"]
    whose = "of each size, together with those that halving left behind" if "halving" in healing else "each"
    said = f"Plans healed by {settings['tokens']:,} tokens {whose}, on a front of their own; figures are after healing."
    return f"<p>{_escaped(said)}</p>{_table(found, rows)}"


def _table(found: Results, rows: Sequence[Row]) -> str:
    names = list(found.config.objectives)
    reported = {"perplexity": "report perplexity"}
    control = found.config.data.control
    if control.windows:
        reported["control"] = f"perplexity on {control.label}"
    head = "".join(f"<th>{_escaped(name)}</th>" for name in ["trial", "origin", *names, *reported.values()])
    lines = []
    for row in rows:
        cells = [str(row.number), row.origin, *(f"{value:.4g}" for value in row.values.values())]
        measured = [(row.report or {}).get(name) for name in reported]
        cells += ["-" if value is None else f"{value:.4g}" for value in measured]
        lines.append("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


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
    return f'<p>{warning}</p><table class="said"><tr><th>likeliest</th>{head}</tr>{"".join(lines)}</table>'
