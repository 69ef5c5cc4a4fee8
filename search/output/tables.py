"""What the command line prints: rich tables for people, plain data for --json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rankfront.methods import DENSE_OPTION, InputError
from rankfront.objectives import make_objective
from rankfront.search.attributes import FAILURE, PLACE, SECONDS, task_scores_of
from rankfront.search.config import QUALITY
from rankfront.search.constraint import Constraint
from rankfront.search.output.results import Results
from rankfront.search.plain import literal
from rankfront.search.plans.menu import values_stored
from rankfront.search.splits import PROMPTS
from rankfront.search.storage.front import Row, dense_row
from rankfront.search.storage.healed import Healed
from rankfront.search.storage.picking import holding

if TYPE_CHECKING:
    import pandas as pd

REPORTED = ("perplexity", "error_rate", "refitted", "control", "continuations", "tasks")


def front_json(found: Results, where: Sequence[str]) -> dict[str, Any]:
    """The documented shape of ``rankfront front --json``: every trial, or the complete ones that meet ``where``."""
    members = found.front()
    front = {row.number for row in members}
    dense = dense_row(found.rows)
    settings, control = found.config.objectives, found.config.data.control
    calibration = found.calibration()
    constraints = [Constraint.parse(text) for text in where]
    rows = [row for row in found.rows if row.state == "complete"] if where else found.rows
    healed = healed_json(found)
    return {
        "objectives": list(settings),
        "units": {name: make_objective(name, options).unit for name, options in settings.items()},
        "dense": trial_json(dense, front, healed) if dense else None,
        "hypervolume": found.hypervolume() if dense else None,
        "calibration": asdict(calibration) if calibration else None,
        "latency": {name: predicted.figures() for name, predicted in found.latency().items()},
        "damaged": found.damages,
        "control": control.label if control.windows else None,
        "prompts": list(PROMPTS),
        "warning": found.warning(members),
        "ideal": found.box.ideal if dense else None,
        "reference": found.box.reference if dense else None,
        "healed": _healing_json(found) if found.healed.healing else None,
        "trials": [trial_json(row, front, healed) for row in holding(rows, constraints)],
    }


def _healing_json(found: Results) -> dict[str, Any]:
    """How plans were healed, and the hypervolume of their own front."""
    healing = {name: found.healed.healing.get(name) for name in ("settings", "text", "windows", "halving")}
    return healing | {"hypervolume": found.healed_hypervolume(), "others": found.healed.others}


def healed_json(found: Results) -> dict[int, dict[str, Any]]:
    """Trial -> what became of its plan when it was healed."""
    front = {row.number for row in found.healed_front()}
    records = {
        number: {
            "values": healed.row.values,
            "perplexity": healed.row.figure("perplexity"),
            "report": _reported(healed.row.report),
            "pareto": number in front,
            "closed": closed(found, healed),
            "tokens": healed.record["tokens"],
            "stages": healed.record["stages"],
            "halving": healed.record.get("halving"),
            "failure": None,
        }
        for number, healed in found.healed.members.items()
    }
    failed = found.healed.failed.items()
    return records | {number: {name: record.get(name) for name in (FAILURE, PLACE)} for number, record in failed}


def closed(found: Results, healed: Healed) -> float | None:
    """The share of a plan's excess over dense that healing closed on what trials read, of its divergence or its log
    perplexity; None where it had none."""
    quality, before, dense = healed_quality(found), found.trial(healed.row.number), dense_row(found.rows)
    if quality is None or dense is None:
        return None
    was, now, least = (row.values[quality] for row in (before, healed.row, dense))
    if quality == "perplexity":
        was, now, least = math.log(was), math.log(now), math.log(least)
    return 1 - (now - least) / (was - least) if was > least else None


def healed_quality(found: Results) -> str | None:
    """The objective that healing changes, the study's first; None where nothing is healed."""
    objectives = found.config.objectives
    return next((name for name in objectives if name in QUALITY), None) if found.healed.members else None


def _reported(report: Mapping[str, Any] | None) -> dict[str, Any]:
    known = report or {}
    return {name: known[name] for name in REPORTED if name in known} or {"perplexity": None}


def trial_json(row: Row, front: set[int], healed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """One trial, as ``rankfront front --json`` lists it."""
    names = (
        "parameters",
        "block_parameters",
        "parameter_count",
        "block_parameter_count",
        "bytes",
        "perplexity",
        "notes",
        "tokens",
        "fidelity",
        "seed",
        "split",
        "place",
    )
    return {
        "number": row.number,
        "state": row.state,
        "origin": row.origin,
        "values": row.values,
        "report": _reported(row.report),
        **{name: row.attributes.get(name) for name in names},
        "pareto": row.number in front,
        "healed": healed.get(row.number),
        "seconds": row.attributes.get(SECONDS, {}),
        "failure": row.failure,
    }


def front_table(found: Results, rows: Sequence[Row]) -> Table:
    """The front as a rich table: number, origin, objectives, kept fractions, perplexity on the report split; and the
    loss after healing, which the front is not made of."""
    title = f"Pareto front of {found.path}: {len(rows)} trials"
    quality, healed = healed_quality(found), found.healed.members
    if quality is None:
        return _table_of(found, rows, title, {})
    after = {n: f"{member.row.values[quality]:.4g}" for n, member in healed.items()}
    return _table_of(found, rows, title, {f"healed {quality}": after})


def healed_table(found: Results, rows: Sequence[Row]) -> Table:
    """The front of healed plans, likewise: all figures are those after healing."""
    members = found.healed.members
    tokens = {number: f"{member.record['tokens']:,}" for number, member in members.items()}
    shares = {number: closed(found, member) for number, member in members.items()}
    gained = {number: f"{share:.0%}" for number, share in shares.items() if share is not None}
    title = f"Pareto front of healed plans, by themselves: {len(rows)} of {len(members)}"
    return _table_of(found, rows, title, {"tokens": tokens, "excess closed": gained})


def _table_of(found: Results, rows: Sequence[Row], title: str, more: Mapping[str, Mapping[int, str]]) -> Table:
    """``rows`` as a table, with ``more`` columns: name -> trial -> what it says there."""
    names = list(found.config.objectives)
    names += [name for name in ("parameters", "block_parameters") if name not in names]
    reported = {"perplexity": "report perplexity"}
    if found.config.search.refit != "none":
        reported["refitted"] = "refitted"
    if found.config.data.control.windows:
        reported["control"] = "control perplexity"
    table = Table(title=literal(title), title_justify="left")
    for name in ["trial", "origin", *names, *reported.values(), *more]:
        table.add_column(name, justify="left" if name == "origin" else "right")
    tasks = found.config.task_names
    for name in tasks:
        table.add_column(literal(name), justify="right")
    for row in rows:
        figures = [f"{row.figure(name):.4g}" for name in names]
        measured = [(row.report or {}).get(name) for name in reported]
        measured += [task_scores_of(row.report).get(name) for name in tasks]
        cells = ["-" if value is None else f"{value:.4g}" for value in measured]
        cells += [column.get(row.number, "-") for column in more.values()]
        table.add_row(str(row.number), literal(row.origin), *figures, *cells)
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
    healed = healed_json(found).get(row.number)
    return {"number": row.number, "origin": row.origin, "values": row.values, "healed": healed, "sites": sites}


def plan_table(plan: dict[str, Any]) -> Table:
    """A plan by site as a rich table."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in plan["values"].items())
    title = f"trial {plan['number']} ({plan['origin']}): {values}{_healed_line(plan['healed'])}"
    table = Table(title=literal(title), title_justify="left")
    for name in ("site", "method", "level", "parameters", "keep"):
        table.add_column(name, justify="right" if name in ("parameters", "keep") else "left")
    for site in plan["sites"]:
        level = " ".join(f"{name}={value}" for name, value in site["level"].items())
        named = (literal(each) for each in (site["site"], site["method"], level))
        table.add_row(*named, f"{site['parameters']:,}", f"{site['keep']:.3f}")
    return table


def _healed_line(healed: dict[str, Any] | None) -> str:
    if healed is None:
        return ""
    if healed["failure"] is not None:
        return f"; not healed: {healed['failure']}"
    values = ", ".join(f"{name} {value:.4g}" for name, value in healed["values"].items())
    return f"; healed by {healed['tokens']:,} tokens: {values}"


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
