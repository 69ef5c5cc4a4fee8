"""Studies: launch, solve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfront.search import attributes as keys
from rankfront.search.commands.console import RunArgument, output, print_json, say, terminal
from rankfront.search.commands.reading import print_front

if TYPE_CHECKING:  # each command imports what it needs
    from rankfront.search.optimise.answer import Answer

app = typer.Typer()


@app.command(
    epilog="Example: rankfront launch studies/demo.toml --set search.trials=12",
)
def launch(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="the study file")],
    run: Annotated[Path | None, typer.Option(help="run folder; runs/<study file's name> by default")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as search.trials=6")] = None,
    trials: Annotated[int | None, typer.Option(help="trials in all")] = None,
    time: Annotated[str | None, typer.Option(help="how long to search, such as 20m")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="trials at once; by default one for each device; 0 is without Ray"),
    ] = None,
    address: Annotated[str | None, typer.Option(help="an existing Ray cluster, such as auto or 10.0.0.1:6379")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="factor everything again")] = False,
) -> None:
    """Run a study, or go on with it where an earlier launch stopped."""
    from rankfront.search.study import Study

    limits = {"trials": trials, "time": None if time is None else json.dumps(time), "workers": workers}
    settings = [*(overrides or []), *(f"search.{k}={v}" for k, v in limits.items() if v is not None)]
    found = Study(study, run, settings)
    found.launch(terminal(), address, rebuild)
    print_front(found.read(), [])


@app.command(
    epilog="Example: rankfront solve runs/demo 'parameters<=0.85'",
)
def solve(
    run: RunArgument,
    limits: Annotated[list[str], typer.Argument(metavar="LIMIT...", help="such as 'block_parameters<=0.73'")],
    measure: Annotated[bool, typer.Option(help="measure the plan as one more trial")] = True,
) -> None:
    """Answer a budget that was never searched, from what the run has learned."""
    from rankfront.search.study import Study

    study = Study.open(run)
    if not measure:
        print_json(answer_json(study.answer(*limits)))
        return
    row = study.solve(*limits, console=terminal())
    values = ", ".join(f"{name} {value:.4g}" for name, value in row.values.items())
    kept = row.attributes[keys.BLOCK_PARAMETERS]
    say(output(), f"trial {row.number} ({row.origin}): {values}, block_parameters {kept:.4g}")


def answer_json(found: Answer) -> dict[str, Any]:
    """The documented shape of ``rankfront solve --no-measure``."""
    return {
        "predicted": found.predicted,
        "measured_by": found.trial,
        "figures": found.figures,
        "plan": json.loads(found.plan.to_json()),
    }
