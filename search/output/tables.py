"""What the command line prints: rich tables for people, plain data for --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rankfront.methods import DENSE_OPTION, InputError
from rankfront.objectives import make_objective
from rankfront.search.attributes import SECONDS
from rankfront.search.constraint import Constraint
from rankfront.search.output.results import Results
from rankfront.search.plain import literal
from rankfront.search.plans.menu import values_stored
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row, dense_row
from rankfront.search.storage.picking import holding

if TYPE_CHECKING:
    import pandas as pd

REPORTED = ("perplexity", "refitted", "control", "continuations")


def front_json(found: Results, where: Sequence[str]) -> dict[str, Any]:
    """The documented shape of ``rankfront front --json``: every trial, or the complete ones that meet ``where``."""
    members = found.front()
    front = {row.number for row in members}
    dense = dense_row(found.rows)
    settings, control = found.config.objectives, found.config.data.control
    calibration = found.calibration()
    constraints = [Constraint.parse(text) for text in where]
    rows = [row for row in found.rows if row.state == "complete"] if where else found.rows
    return {
        "objectives": list(settings),
        "units": {name: make_objective(name, options).unit for name, options in settings.items()},
        "dense": trial_json(dense, front) if dense else None,
        "hypervolume": found.hypervolume() if dense else None,
        "calibration": asdict(calibration) if calibration else None,
        "latency": {name: predicted.figures() for name, predicted in found.latency().items()},
        "damaged": found.damages,
        "control": control.label if control.windows else None,
        "prompts": list(PROMPTS),
        "warning": found.warning(members),
        "ideal": found.box.ideal if dense else None,
        "reference": found.box.reference if dense else None,
        "trials": [trial_json(row, front) for row in holding(rows, constraints)],
    }


def trial_json(row: Row, front: set[int]) -> dict[str, Any]:
    """One trial, as ``rankfront front --json`` lists it."""
    report = row.report or {}
    names = (
        "parameters",
        "block_parameters",
        "parameter_count",
        "bytes",
        "perplexity",
        "notes",
        "tokens",
        "fidelity",
        "seed",
        "split",
    )
    return {
        "number": row.number,
        "state": row.state,
        "origin": row.origin,
        "values": row.values,
        "report": {name: report[name] for name in REPORTED if name in report} or {"perplexity": None},
        **{name: row.attributes.get(name) for name in names},
        "pareto": row.number in front,
        "seconds": row.attributes.get(SECONDS, {}),
        "failure": row.failure,
    }


def front_table(found: Results, rows: Sequence[Row]) -> Table:
    """The front as a rich table: number, origin, objectives, kept fractions, perplexity on the report split."""
    names = list(found.config.objectives)
    more = [name for name in ("parameters", "block_parameters") if name not in names]
    table = Table(title=literal(f"Pareto front of {found.path}: {len(rows)} trials"), title_justify="left")
    reported = {"perplexity": "report perplexity"}
    if found.config.search.refit != "none":
        reported["refitted"] = "refitted"
    if found.config.data.control.windows:
        reported["control"] = "control perplexity"
    for name in ["trial", "origin", *names, *more, *reported.values()]:
        table.add_column(name, justify="left" if name == "origin" else "right")
    for row in rows:
        figures = [f"{row.figure(name):.4g}" for name in [*names, *more]]
        measured = [(row.report or {}).get(name) for name in reported]
        table.add_row(
            str(row.number), literal(row.origin), *figures, *("-" if m is None else f"{m:.4g}" for m in measured)
        )
    return table


def plan_json(found: Results, row: Row) -> dict[str, Any]:
    """The documented shape of ``rankfront show --json``: every site with its method, level and cost."""
    plan = row.plan if row.stored is None else row.plan_to_show  # what no trial measured is worked out by the methods
    unknown = plan.by_site.keys() - {site.name for site in found.sites}
    if unknown:
        raise InputError(
            f"the plan of trial {row.number} names {min(unknown)!r}, which {found.config.model.name} has not"
        )
    stored = {} if row.stored is None else dict(zip(plan.by_site, row.stored, strict=True))
    sites = []
    for site in found.sites:
        option, dense = plan.option(site.name), values_stored(site, DENSE_OPTION)
        own = stored[site.name] if site.name in stored else values_stored(site, option)
        sites.append(
            {
                "site": site.name,
                "method": option.method,
                "level": dict(option.level),
                "parameters": own,
                "keep": round(own / dense, 4),
            }
        )
    return {"number": row.number, "origin": row.origin, "values": row.values, "sites": sites}


def plan_table(plan: dict[str, Any]) -> Table:
    """A plan by site as a rich table."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in plan["values"].items())
    table = Table(title=literal(f"trial {plan['number']} ({plan['origin']}): {values}"), title_justify="left")
    for name in ("site", "method", "level", "parameters", "keep"):
        table.add_column(name, justify="right" if name in ("parameters", "keep") else "left")
    for site in plan["sites"]:
        level = " ".join(f"{name}={value}" for name, value in site["level"].items())
        named = (literal(each) for each in (site["site"], site["method"], level))
        table.add_row(*named, f"{site['parameters']:,}", f"{site['keep']:.3f}")
    return table


def menu_table(frame: pd.DataFrame) -> Table:
    """A run's menu as a rich table."""
    table = Table(title="menu: what each option stores, and its predicted divergence alone", title_justify="left")
    latencies = [name for name in frame.columns if name.startswith("latency")]
    for name in ("site", "option", "parameters", "bytes", "divergence", *latencies):
        table.add_column(name, justify="left" if name in ("site", "option") else "right")
    for row in frame.to_dict("records"):
        figures = [f"{row['parameters']:,}", f"{row['bytes']:,}", f"{row['divergence']:.3g}"]
        table.add_row(
            literal(row["site"]), literal(row["option"]), *figures, *(f"{row[name]:.4f}" for name in latencies)
        )
    return table
