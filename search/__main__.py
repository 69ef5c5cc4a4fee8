"""The command line: launch, solve, front, menu, show, export, heal, slice, convert, evaluate, methods, engines."""

from __future__ import annotations

import json
import math
import signal
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import rankfront
from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.choices import BlockError, Format, Loss, Refit, TeacherChoice, Window
from rankfront.search.errors import ExportError, GaveUp, Interrupted
from rankfront.search.plain import literal, plain

if TYPE_CHECKING:  # each command imports what it needs
    from rich.console import Console

    from rankfront.search.optimise.answer import Answer
    from rankfront.search.output.card import Verified
    from rankfront.search.output.results import Results
    from rankfront.search.storage.front import Row
    from rankfront.search.storage.healed import Healed
    from rankfront.search.study import Study

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__,
)
UsageError: Any = typer.BadParameter.__base__  # click's, wherever this typer keeps it

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, such as runs/demo")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="let Python code that comes with the model run")]
GgufOption = Annotated[str, typer.Option("--gguf-type", help="of weights in a GGUF file: F16, BF16, Q8_0, Q4_0 ...")]
WhereOption = Annotated[
    list[str] | None, typer.Option("--where", help="a limit, such as 'parameters<=0.8'; repeatable")
]


@cache
def terminal() -> Console:
    """Where progress and remarks go."""
    from rich.console import Console

    return Console(stderr=True)


@cache
def output() -> Console:
    """Where results go."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"rankfront {rankfront.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _say(console: Console, text: object) -> None:
    """Print a line as it is, whoever wrote what is in it."""
    console.print(literal(text), soft_wrap=True)


def _print_json(data: Any) -> None:
    print(json.dumps(_finite(data), indent=1, allow_nan=False))


def _finite(data: Any) -> Any:
    """``data`` with null for what is no finite number: JSON has no NaN."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


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
    _print_front(found.read(), [])


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
        _print_json(answer_json(study.answer(*limits)))
        return
    row = study.solve(*limits, console=terminal())
    values = ", ".join(f"{name} {value:.4g}" for name, value in row.values.items())
    kept = row.attributes[keys.BLOCK_PARAMETERS]
    _say(output(), f"trial {row.number} ({row.origin}): {values}, block_parameters {kept:.4g}")


def answer_json(found: Answer) -> dict[str, Any]:
    """The documented shape of ``rankfront solve --no-measure``."""
    return {
        "predicted": found.predicted,
        "measured_by": found.trial,
        "figures": found.figures,
        "plan": json.loads(found.plan.to_json()),
    }


@app.command(
    epilog="Example: rankfront front runs/demo --where 'parameters<=0.9' --html report.html",
)
def front(
    run: RunArgument,
    as_json: JsonOption = False,
    csv: Annotated[Path | None, typer.Option(help="write every trial to this CSV file")] = None,
    html: Annotated[Path | None, typer.Option(help="write the report page to this file")] = None,
    where: WhereOption = None,
) -> None:
    """Show the Pareto front of a run, and that of its healed plans."""
    from rankfront.search.study import Study

    found = Study.open(run).read()
    if csv is not None:
        from rankfront.search.storage.front import frame

        csv = csv.expanduser()
        frame(found.rows, found.healed.columns).to_csv(csv, index=False)
        _say(terminal(), f"wrote {csv}")
    if html is not None:
        html = html.expanduser()
        from rankfront.search.output.report import write_report

        write_report(found, html)
        _say(terminal(), f"wrote {html}")
    if as_json:
        from rankfront.search.output.tables import front_json

        _print_json(front_json(found, where or []))
    elif csv is None and html is None:
        _print_front(found, where or [])


def _print_front(found: Results, where: list[str]) -> None:
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
    _say(output(), f"hypervolume {found.hypervolume():.4f} of the box {corners} (ideal to reference)")
    calibration = found.calibration()
    if calibration is not None:
        _say(output(), calibration)
    for name, calibrated in found.latency().items():
        _say(output(), f"{name}, {calibrated}")
    unmade = found.latency_failure
    if unmade is not None:
        _say(output(), f"the latency table could not be made ({unmade}): launch the study again")
    failed = [row for row in found.rows if row.state == "failed" and row.counts]
    if failed:
        _say(output(), f"{len(failed)} failed trials, such as {failed[0].number}: {failed[0].failure}")
    warning = found.warning(rows)
    if warning is not None:
        _say(output(), warning)
    if any(row.report is None for row in rows):
        _say(output(), "some members have no report perplexity yet: launch the study again to measure it")
    _print_healed(found, where)


def _print_healed(found: Results, where: list[str]) -> None:
    from rankfront.search.output.tables import healed_table

    healed = found.healed
    if healed.members:
        output().print(healed_table(found, found.healed_front(*where)))
        _say(output(), f"hypervolume {found.healed_hypervolume():.4f} of the same box")
    if healed.failures:
        number = min(healed.failures)
        _say(output(), f"{len(healed.failures)} could not be healed, such as trial {number}: {healed.failures[number]}")
    if healed.others:
        _say(output(), f"not shown: {healed.others} that other settings, or another text, healed")


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
        _say(terminal(), f"wrote {csv}")
    if as_json:
        _print_json(frame.to_dict("records"))
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
        _print_json(plan)
    else:
        output().print(plan_table(plan))


@app.command("export", epilog="Example: rankfront export runs/demo --out exported/demo --max-parameters 0.95")
def export_command(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="the new folder")],
    trial: Annotated[int | None, typer.Option(help="this trial")] = None,
    where: WhereOption = None,
    max_parameters: Annotated[float | None, typer.Option(help="at most this kept fraction of the model")] = None,
    max_latency: Annotated[float | None, typer.Option(help="at most this ratio to dense")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="at most this, on the search split")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="the front member nearest to the ideal corner")] = False,
    form: Annotated[Format, typer.Option("--format", help="what is written; see engines")] = "factored",
    gguf_type: GgufOption = "F16",
    refit: Annotated[Refit | None, typer.Option(help="fit factors again to the compressed model before them")] = None,
    heal: Annotated[str | None, typer.Option(help="train it on data.heal for so many tokens, such as 1M")] = None,
    healed: Annotated[bool, typer.Option("--healed", help="a plan that the search healed, as it was scored")] = False,
) -> None:
    """Write a trial's model to a folder: of those that meet the limits, the best in the first objective."""
    from rankfront.search.study import Study

    limits = {"parameters": max_parameters, "latency": max_latency, "perplexity": max_perplexity}
    constraints = [
        *(where or []),
        *(f"{name}<={bound!r}" for name, bound in limits.items() if bound is not None),
    ]
    study = Study.open(run)
    if trial is not None and (constraints or knee):
        raise InputError("--trial names one trial, so limits and --knee have nothing to choose: leave one of them out")
    if healed:
        if form != "factored" or refit is not None or heal is not None:
            raise InputError("--healed exports what the search healed: leave --format, --refit and --heal out")
        _export_stored(study, out, study.read().pick_healed(constraints, trial, knee))
        return
    row = _pick(study.read(), trial, constraints, knee)
    if heal is not None:
        if form != "factored" or refit is not None:
            raise InputError("--heal trains factors: leave --format and --refit out (heal.stages may begin with refit)")
        _export_healed(study, out, row, heal)
        return
    _check_gguf(form, gguf_type)
    with terminal().status(f"exporting trial {row.number} ..."):
        verified = study.export(out, row, form, refit, gguf_type)
    _say_exported(f"trial {row.number} ({row.origin})", verified, out)
    if verified.warning is not None:
        terminal().print(f"it {verified.warning}", soft_wrap=True, markup=False, highlight=False)


def _say_exported(what: str, verified: Verified, out: Path, text: str = "the search split") -> None:
    where_to = out.resolve() if out.is_symlink() else out
    _say(
        terminal(),
        f"{what} is in {where_to}: {verified.parameters:,} stored values in {verified.bytes / 1e6:,.1f} MB, perplexity"
        f" {verified.perplexity:.4g} on {text}"
        f" {'after reloading in a fresh process' if verified.reloaded else 'before it was written'}",
    )
    for note in verified.notes:
        _say(terminal(), f"  {note}")


def _check_gguf(form: Format, kind: str) -> None:
    """Raise `InputError` where ``kind`` is no type of a GGUF file, or no such file is written."""
    if form != "gguf":
        if kind != "F16":
            raise InputError("--gguf-type is about --format gguf: leave it out, or name that format")
        return
    from rankfront.search.serve.gguf_file import check_type

    check_type(kind)


def _export_stored(study: Study, out: Path, healed: Healed) -> None:
    row, tokens = healed.row, healed.record["tokens"]
    with terminal().status(f"exporting trial {row.number} as it was healed ..."):
        verified = study.export_stored(out, healed)
    _say_exported(f"trial {row.number} ({row.origin}), healed by {tokens:,} tokens,", verified, out)


def _export_healed(study: Study, out: Path, row: Row, tokens: str) -> None:
    from rankfront.search.heal.settings import parse_tokens
    from rankfront.search.output.healing_progress import progress_line, summary

    with progress_line(terminal()) as show:
        results = study.export_healed(out, row, parse_tokens(tokens), show, lambda x: _say(terminal(), x))
    for line in summary(results):
        _say(terminal(), line)
    _say(terminal(), f"trial {row.number} ({row.origin}), healed, is in {out}")


def _pick(found: Results, trial: int | None, constraints: list[str], knee: bool) -> Row:
    if trial is not None:
        row = found.trial(trial)
        if row.state != "complete":
            raise InputError(f"trial {trial} is {row.state} ({row.failure or 'no values'}): name a complete one")
        return row
    return found.knee(*constraints) if knee else found.best(*constraints)


def _part(part: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= part[0] < part[1] <= 1:
        raise InputError(f"--part is {part[0]:g} {part[1]:g}: give a start and an end with 0 <= start < end <= 1")
    return part


@app.command("heal", epilog="Example: rankfront heal exported/demo --text my.txt --tokens 300k --out healed/demo")
def heal_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a folder that `rankfront export` wrote")],
    text: Annotated[str, typer.Option(help="what to train on: a text file, pydoc, or hub:NAME/CONFIG:SPLIT")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    tokens: Annotated[str, typer.Option(help="tokens seen in all, passes counted, such as 300k or 1M")] = "1M",
    stages: Annotated[str, typer.Option(help="blocks, logits, or both in that order")] = "logits",
    method: Annotated[
        str, typer.Option(help="what trains: factors, scales, lora, stf, hola, trp, lod or fjord")
    ] = "factors",
    loss: Annotated[Loss, typer.Option(help="of the last stage: kl, ce or both")] = "kl",
    error: Annotated[
        BlockError, typer.Option(help="of hidden states in the first stage: relative or fisher")
    ] = "relative",
    window: Annotated[Window, typer.Option(help="what the first stage trains at once: block or half")] = "block",
    teacher: Annotated[TeacherChoice, typer.Option(help="the dense model: beside, cached, or auto")] = "auto",
    rate: Annotated[float | None, typer.Option(help="learning rate of factors; by the budget")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="tokens of a step; by the budget")] = None,
    length: Annotated[int, typer.Option(min=8, help="tokens of a window")] = 512,
    part: Annotated[tuple[float, float], typer.Option(help="which part of the text, such as 0 0.5")] = (0.0, 1.0),
    model: Annotated[str | None, typer.Option(help="the dense model; by default the one the plan names")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    lasso: Annotated[float, typer.Option(help="of lod and fjord: drop components that this penalty leaves")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    adapter: Annotated[int, typer.Option(min=0, help="rank of a wavelet adapter beside low-rank weights")] = 0,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="initialise all of it anew, train on the text")
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train what an export stores towards the dense model, and write it to a new folder."""
    from dataclasses import asdict

    from rankfront.search.heal.processes import Processes
    from rankfront.search.heal.settings import HealSettings, parse_tokens
    from rankfront.search.output.healed import heal_folder
    from rankfront.search.output.healing_card import HealText
    from rankfront.search.output.healing_progress import progress_line, summary

    if from_scratch:  # what else there could be is refused
        loss = "ce" if loss == "kl" else loss
    settings = HealSettings(
        tokens=parse_tokens(tokens), stages=tuple(cast(Any, stages.split(","))), method=method, loss=loss, error=error,
        window=window, teacher=teacher, rate=rate, batch=batch, lasso=lasso, seed=seed, from_scratch=from_scratch,
        adapter=adapter,
    )  # fmt: skip
    where = HealText(text, length, _part(part))
    with progress_line(terminal()) as show:
        results = heal_folder(
            folder, where, settings, out, None, model, device, trust_remote_code, show,
            lambda line: _say(terminal(), line),
        )  # fmt: skip
    processes = Processes()
    processes.end()
    if not processes.first:
        return
    if as_json:
        _print_json({"out": str(out), "stages": [asdict(result) for result in results]})
    else:
        for line in summary(results, "cross-entropy" if from_scratch else "divergence"):
            _say(output(), line)
        _say(terminal(), f"the healed model is in {out}")


@app.command("slice", epilog="Example: rankfront slice healed/demo --max-parameters 0.9 --text my.txt --out cut/demo")
def slice_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a factored export, healed or not")],
    max_parameters: Annotated[float, typer.Option(help="at most this kept fraction of the dense model")],
    text: Annotated[str, typer.Option(help="what ranks are chosen on: a text file, pydoc, or hub:NAME/CONFIG:SPLIT")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    windows: Annotated[int, typer.Option(min=1, help="of the text, that ranks are chosen on")] = 8,
    length: Annotated[int, typer.Option(min=8, help="tokens of a window")] = 512,
    part: Annotated[tuple[float, float], typer.Option(help="which part of the text, such as 0 0.5")] = (0.0, 1.0),
    rank_multiple: Annotated[int, typer.Option(min=1, help="ranks are multiples of this")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut an export's low-rank factors to their first components, without training, and write it to a new folder."""
    from dataclasses import asdict

    from rankfront.search.output.healing_card import HealText
    from rankfront.search.output.sliced import slice_folder

    where = HealText(text, length, _part(part))
    with terminal().status("slicing ..."):
        found = slice_folder(
            folder, where, max_parameters, out, windows, rank_multiple, device, seed, trust_remote_code
        )
    if as_json:
        _print_json({"out": str(out), **asdict(found)})
        return
    _say(
        output(),
        f"kept fraction {found.parameters_before:.4g} -> {found.parameters:.4g}, perplexity"
        f" {found.perplexity_before:.4g} -> {found.perplexity:.4g}, at {found.sites} sites",
    )
    _say(terminal(), f"the sliced model is in {out}")


@app.command("convert", epilog="Example: rankfront convert healed/demo --format gguf --out served/demo")
def convert_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a folder: exported, healed, sliced or dense")],
    form: Annotated[Format, typer.Option("--format", help="what is written; see engines")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    gguf_type: GgufOption = "F16",
    text: Annotated[str, typer.Option(help="verified on: pydoc, a text file, or hub:NAME/CONFIG:SPLIT")] = "pydoc",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the model of a folder in the format of an engine, to a new folder."""
    from rankfront.search.output.served import convert_folder

    _check_gguf(form, gguf_type)
    with terminal().status("converting ..."):
        verified = convert_folder(folder, form, out.expanduser(), gguf_type, text, device, trust_remote_code)
    _say_exported(str(folder), verified, out, f"a little of {text}")


@app.command("evaluate", epilog="Example: rankfront evaluate exported/demo --text pydoc --windows 8")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="a bundled name, a hub id, a folder (dense or exported), a .gguf file")],
    text: Annotated[str, typer.Option(help="pydoc, a text file, or hub:NAME/CONFIG:SPLIT")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=8)] = 512,
    prepack: Annotated[bool, typer.Option("--prepack", help="with weights in the order a CPU reads fastest")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity, parameters, latency."""
    from rankfront.search.output.evaluate import evaluate

    found = evaluate(model, text, windows, length, prepacked=prepack, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found)
    else:
        for name, value in found.items():
            _say(output(), f"{name:<28}{value:,.6g}" if isinstance(value, float) else f"{name:<28}{value}")


@app.command(epilog="Example: rankfront methods --model smollm2-135m")
def methods(
    model: Annotated[str | None, typer.Option(help="say of each kind of its sites why a method refuses it")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """List every method in its place in the taxonomy, with its geometry, metric, what it needs, and its paper."""
    from rankfront.search.output.taxonomy import methods_json, methods_table

    if as_json:
        _print_json(methods_json(model, trust_remote_code))
    else:
        output().print(methods_table(model, trust_remote_code))


@app.command(epilog="Example: rankfront engines --json")
def engines(as_json: JsonOption = False) -> None:
    """List the formats of exports, the engines that open them, and what of a plan stays small there."""
    from rankfront.search.output.engines import engines_json, engines_table

    if as_json:
        _print_json(engines_json())
    else:
        output().print(engines_table())


def _fail(message: str, code: int) -> int:
    print(f"rankfront: {plain(' '.join(message.split()))}", file=sys.stderr)
    return code


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 the user's input, 1 anything else."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        code = app(given or ["--help"], prog_name="rankfront", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except UsageError as error:
        return _fail(f"{error.format_message()} (see --help)", 2)
    except (Interrupted, typer.Abort, KeyboardInterrupt) as error:
        return _fail(f"{str(error) or 'stopped'}; run the same command again to go on", 1)
    except (ExportError, GaveUp, OSError, MemoryError) as error:
        return _fail(str(error), 1)
    except RuntimeError as error:  # torch's among them
        from rankfront.search.inputs.device import out_of_memory

        if not out_of_memory(error):
            raise
        return _fail(str(error), 1)


def main() -> None:
    """The console script. SIGTERM ends it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run())


if __name__ == "__main__":
    main()
