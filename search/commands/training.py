"""Folders that exist, made better or smaller: heal, slice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from rankfront.methods import InputError
from rankfront.search.choices import BlockError, Loss, TeacherChoice, Window
from rankfront.search.commands.console import JsonOption, TrustOption, output, print_json, say, terminal

app = typer.Typer()


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
            lambda line: say(terminal(), line),
        )  # fmt: skip
    processes = Processes()
    processes.end()
    if not processes.first:
        return
    if as_json:
        print_json({"out": str(out), "stages": [asdict(result) for result in results]})
    else:
        for line in summary(results, "cross-entropy" if from_scratch else "divergence"):
            say(output(), line)
        say(terminal(), f"the healed model is in {out}")


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
        print_json({"out": str(out), **asdict(found)})
        return
    say(
        output(),
        f"kept fraction {found.parameters_before:.4g} -> {found.parameters:.4g}, perplexity"
        f" {found.perplexity_before:.4g} -> {found.perplexity:.4g}, at {found.sites} sites",
    )
    say(terminal(), f"the sliced model is in {out}")
