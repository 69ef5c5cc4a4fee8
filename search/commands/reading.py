"""What a run has found: front, report, menu, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankfront.search.commands.console import JsonOption, RunArgument, WhereOption, output, print_json, say, terminal

if TYPE_CHECKING:  # each command imports what it needs
    from rankfront.search.output.results import Results

app = typer.Typer()


@app.command(
    epilog="Example: rankfront front runs/demo --where 'parameters<=0.9'",
)
def front(
    run: RunArgument,
    as_json: JsonOption = False,
    csv: Annotated[Path | None, typer.Option(help="write every trial to this CSV file")] = None,
    where: WhereOption = None,
) -> None:
    """Show the Pareto front of a run, and that of its healed plans."""
    from rankfront.search.study import Study

    found = Study.open(run).read()
    if csv is not None:
        from rankfront.search.storage.front import frame

        csv = csv.expanduser()
        frame(found.rows, found.healed.columns).to_csv(csv, index=False)
        say(terminal(), f"wrote {csv}")
    if as_json:
        from rankfront.search.output.tables import front_json

        print_json(front_json(found, where or []))
    elif csv is None:
        print_front(found, where or [])


def print_front(found: Results, where: list[str]) -> None:
    from rankfront.search.output.tables import front_table

    if found.damages:
        output().print(
            "damaged, and left out until the study is launched again, which measures them anew:"
            f" {', '.join(found.damages)}",
            soft_wrap=True,
        )
    rows = found.front(*where)
    output().print(front_table(found, rows))
    box = found.box
    corners = ", ".join(f"{name} {low:.4g} to {box.reference[name]:.4g}" for name, low in box.ideal.items())
    say(output(), f"hypervolume {found.hypervolume():.4f} of the box {corners} (ideal to reference)")
    calibration = found.calibration()
    if calibration is not None:
        say(output(), calibration)
    for name, calibrated in found.latency().items():
        say(output(), f"{name}, {calibrated}")
    unmade = found.latency_failure
    if unmade is not None:
        say(output(), f"the latency table could not be made ({unmade}): launch the study again")
    failed = [row for row in found.rows if row.state == "failed" and row.counts]
    if failed:
        say(output(), f"{len(failed)} failed trials, such as {failed[0].number}: {failed[0].failure}")
    warning = found.warning(rows)
    if warning is not None:
        say(output(), warning)
    if any(row.report is None for row in rows):
        say(output(), "some members have no report perplexity yet: launch the study again to measure it")
    _print_healed(found, where)


def _print_healed(found: Results, where: list[str]) -> None:
    from rankfront.search.output.tables import healed_table

    healed = found.healed
    if healed.members:
        output().print(healed_table(found, found.healed_front(*where)))
        say(output(), f"hypervolume {found.healed_hypervolume():.4f} of the same box")
    if healed.failures:
        number = min(healed.failures)
        say(output(), f"{len(healed.failures)} could not be healed, such as trial {number}: {healed.failures[number]}")
    if healed.others:
        say(output(), f"not shown: {healed.others} that other settings, or another text, healed")


@app.command("report", epilog="Example: rankfront report runs/demo --open")
def report_command(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="the file to write, by default RUN/report.html")] = None,
    show: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
) -> None:
    """Write the report page of a run: one HTML file with the front, plans by block and what limits cost."""
    from rankfront.search.output.report import write_report
    from rankfront.search.study import Study

    found = Study.open(run).read()
    page = (out or found.path / "report.html").expanduser()
    write_report(found, page)
    say(terminal(), f"wrote {page}")
    if show and typer.launch(page.resolve().as_uri()) != 0:
        say(terminal(), "no browser could be started: open the file yourself")


@app.command(epilog="Example: rankfront menu runs/demo --csv menu.csv")
def menu(
    run: RunArgument,
    as_json: JsonOption = False,
    csv: Annotated[Path | None, typer.Option(help="write it to this CSV file")] = None,
) -> None:
    """Show what each option of each site stores and is predicted to hurt."""
    from rankfront.search.output.tables import menu_table
    from rankfront.search.study import Study

    frame = Study.open(run).menu()
    if csv is not None:
        csv = csv.expanduser()
        frame.to_csv(csv, index=False)
        say(terminal(), f"wrote {csv}")
    if as_json:
        print_json(frame.to_dict("records"))
    elif csv is None:
        output().print(menu_table(frame))


@app.command(epilog="Example: rankfront show runs/demo 3")
def show(
    run: RunArgument,
    trial: Annotated[int, typer.Argument(help="its number")],
    as_json: JsonOption = False,
) -> None:
    """Show a trial's plan, site by site."""
    from rankfront.search.output.tables import plan_json, plan_table
    from rankfront.search.study import Study

    found = Study.open(run).read()
    plan = plan_json(found, found.trial(trial))
    if as_json:
        print_json(plan)
    else:
        output().print(plan_table(plan))
