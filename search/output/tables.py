"""What the command line prints: rich tables for people, plain data for --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.table import Table

from rankfront.methods import DENSE_OPTION, InputError
from rankfront.objectives import make_objective
from rankfront.search.attributes import SECONDS
from rankfront.search.constraint import Constraint
from rankfront.search.inputs.model import skeleton
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.control import PROMPTS
from rankfront.search.plain import literal
from rankfront.search.plans.menu import values_stored
from rankfront.search.storage.front import Row, box_of, dense_row, hypervolume
from rankfront.search.storage.picking import holding
from rankfront.search.study import Study

REPORTED = ("perplexity", "refitted", "control", "continuations")


def front_json(study: Study, where: Sequence[str]) -> dict[str, Any]:
    """The documented shape of ``rankfront front --json``: every trial, or the complete ones that meet ``where``."""
    everything = study.rows()
    members = study.front()
    front = {row.number for row in members}
    dense = dense_row(everything)
    settings = study.config.objectives
    box = box_of(settings, dense) if dense else None
    calibration = study.calibration()
    constraints = [Constraint.parse(text) for text in where]
    rows = [row for row in everything if row.state == "complete"] if where else everything
    return {
        "objectives": list(settings),
        "units": {name: make_objective(name, options).unit for name, options in settings.items()},
        "dense": trial_json(dense, front) if dense else None,
        "hypervolume": hypervolume(members, box) if box else None,
        "calibration": asdict(calibration) if calibration else None,
        "latency": {name: found.figures() for name, found in study.latency().items()},
        "damaged": study.damages(),
        "control": study.config.data.control.label if study.config.data.control.windows else None,
        "prompts": list(PROMPTS),
        "warning": study.warning(members),
        "ideal": box.ideal if box else None,
        "reference": box.reference if box else None,
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
        "rung",
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


def front_table(study: Study, rows: Sequence[Row]) -> Table:
    """The front as a rich table: number, origin, objectives, kept fractions, perplexity on the report split."""
    names = list(study.config.objectives)
    more = [name for name in ("parameters", "block_parameters") if name not in names]
    table = Table(title=literal(f"Pareto front of {study.run.path}: {len(rows)} trials"), title_justify="left")
    reported = {"perplexity": "report perplexity"}
    if study.config.search.refit != "none":
        reported["refitted"] = "refitted"
    if study.config.data.control.windows:
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


def plan_json(study: Study, row: Row) -> dict[str, Any]:
    """The documented shape of ``rankfront show --json``: every site with its method, level and cost."""
    sites = []
    found = find_sites(skeleton(study.source))
    unknown = row.plan.by_site.keys() - {site.name for site in found}
    if unknown:
        raise InputError(
            f"the plan of trial {row.number} names {min(unknown)!r}, which {study.config.model.name} has not"
        )
    for site in found:
        option = row.plan.option(site.name)
        own, dense = (values_stored(site, each) for each in (option, DENSE_OPTION))
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
