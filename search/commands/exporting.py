"""Folders out of plans: export, convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankfront.methods import InputError
from rankfront.search.choices import Format, Refit
from rankfront.search.commands.console import GgufOption, RunArgument, TrustOption, WhereOption, say, terminal

if TYPE_CHECKING:  # each command imports what it needs
    from rankfront.search.output.card import Verified
    from rankfront.search.output.results import Results
    from rankfront.search.storage.front import Row
    from rankfront.search.storage.healed import Healed
    from rankfront.search.study import Study

app = typer.Typer()


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
    check_gguf(form, gguf_type)
    with terminal().status(f"exporting trial {row.number} ..."):
        verified = study.export(out, row, form, refit, gguf_type)
    say_exported(f"trial {row.number} ({row.origin})", verified, out)
    if verified.warning is not None:
        terminal().print(f"it {verified.warning}", soft_wrap=True, markup=False, highlight=False)


def say_exported(what: str, verified: Verified, out: Path, text: str = "the search split") -> None:
    where_to = out.resolve() if out.is_symlink() else out
    say(
        terminal(),
        f"{what} is in {where_to}: {verified.parameters:,} stored values in {verified.bytes / 1e6:,.1f} MB, perplexity"
        f" {verified.perplexity:.4g} on {text}"
        f" {'after reloading in a fresh process' if verified.reloaded else 'before it was written'}",
    )
    for note in verified.notes:
        say(terminal(), f"  {note}")


def check_gguf(form: Format, kind: str) -> None:
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
    say_exported(f"trial {row.number} ({row.origin}), healed by {tokens:,} tokens,", verified, out)


def _export_healed(study: Study, out: Path, row: Row, tokens: str) -> None:
    from rankfront.search.heal.settings import parse_tokens
    from rankfront.search.output.healing_progress import progress_line, summary

    count, windows = parse_tokens(tokens), study.heal_windows(terminal())
    with progress_line(terminal()) as show:
        results = study.export_healed(out, row, count, show, lambda x: say(terminal(), x), windows)
    for line in summary(results):
        say(terminal(), line)
    say(terminal(), f"trial {row.number} ({row.origin}), healed, is in {out}")


def _pick(found: Results, trial: int | None, constraints: list[str], knee: bool) -> Row:
    if trial is not None:
        row = found.trial(trial)
        if row.state != "complete":
            raise InputError(f"trial {trial} is {row.state} ({row.failure or 'no values'}): name a complete one")
        return row
    return found.knee(*constraints) if knee else found.best(*constraints)


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

    check_gguf(form, gguf_type)
    with terminal().status("converting ..."):
        verified = convert_folder(folder, form, out.expanduser(), gguf_type, text, device, trust_remote_code)
    say_exported(str(folder), verified, out, f"a little of {text}")
