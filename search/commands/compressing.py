"""From a model to a smaller one: compress, init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankfront.methods import InputError
from rankfront.search.choices import Effort, Servable
from rankfront.search.commands.console import GgufOption, TrustOption, output, say, terminal

app = typer.Typer()

KeepOption = Annotated[float | None, typer.Option(help="at most this fraction of the model's parameters")]
ParametersOption = Annotated[str | None, typer.Option(help="at most so many, such as 100M")]
BytesOption = Annotated[str | None, typer.Option(help="at most so many on disk, such as 2GB")]
LatencyOption = Annotated[float | None, typer.Option(help="at most this ratio to dense")]
MemoryOption = Annotated[str | None, typer.Option(help="at most so much for weights and cache, such as 3GB")]
BatchOption = Annotated[int, typer.Option(min=1, help="of --memory: sequences at once")]
ContextOption = Annotated[int, typer.Option(min=1, help="of --memory: tokens of each")]
TextOption = Annotated[str, typer.Option(help="what it will be used on: a text file, or hub:NAME/CONFIG:SPLIT")]
ServeOption = Annotated[Servable | None, typer.Option(help="write the format of an engine; see engines")]
HealOption = Annotated[str | None, typer.Option(help="train the result for so many tokens, such as 1M")]
EffortOption = Annotated[Effort, typer.Option(help="how much is read and measured: auto, quick or normal")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the study file; repeatable")]


def _request(heal: str | None, overrides: list[str] | None, **rest: Any) -> Any:
    from rankfront.search.estimate.request import Request
    from rankfront.search.heal.settings import parse_tokens

    return Request(heal=0 if heal is None else parse_tokens(heal), overrides=tuple(overrides or ()), **rest)


@app.command("compress", epilog="Example: rankfront compress smollm2-135m --keep 0.7 --out small")
def compress_command(
    model: Annotated[str, typer.Argument(help="a hub id, a local folder, a .gguf file, or smollm2-135m")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    keep: KeepOption = None,
    parameters: ParametersOption = None,
    bytes: BytesOption = None,
    latency: LatencyOption = None,
    memory: MemoryOption = None,
    batch: BatchOption = 1,
    context: ContextOption = 4096,
    text: TextOption = "self",
    serve: ServeOption = None,
    gguf_type: GgufOption = "F16",
    heal: HealOption = None,
    run: Annotated[Path | None, typer.Option(help="run folder; OUT.run by default")] = None,
    effort: EffortOption = "auto",
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make a model smaller: search, export, verify. The same command goes on where it stopped."""
    if (keep, parameters, bytes, latency, memory) == (None,) * 5:
        raise InputError(
            "how small is not said: give --keep, --parameters, --bytes, --latency or --memory, such as --keep 0.7"
        )
    request = _request(
        heal, overrides, model=model, keep=keep, parameters=parameters, bytes=bytes, latency=latency, memory=memory,
        batch=batch, context=context, text=text,
        serve=serve, gguf_type=gguf_type, effort=effort, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from rankfront.search.compress import compress
    from rankfront.search.serve.engines import check_installed

    if serve == "openvino":  # which alone can write what the search ends with
        check_installed(serve)
    made, folder = compress(request, out, run, terminal())
    for line in made.lines(out, folder):
        say(output(), line)


@app.command("init", epilog="Example: rankfront init --model smollm2-135m --keep 0.7")
def init_command(
    model: Annotated[str, typer.Option(help="a hub id, a local folder, a .gguf file, or smollm2-135m")],
    keep: KeepOption = None,
    parameters: ParametersOption = None,
    bytes: BytesOption = None,
    latency: LatencyOption = None,
    memory: MemoryOption = None,
    batch: BatchOption = 1,
    context: ContextOption = 4096,
    text: TextOption = "self",
    serve: ServeOption = None,
    gguf_type: GgufOption = "F16",
    heal: HealOption = None,
    effort: EffortOption = "auto",
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Print a study file that fits a model and this machine, and say what it will take."""
    request = _request(
        heal, overrides, model=model, keep=keep, parameters=parameters, bytes=bytes, latency=latency, memory=memory,
        batch=batch, context=context, text=text,
        serve=serve, gguf_type=gguf_type, effort=effort, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from rankfront.search.compress import propose, said_texts

    study, config, takes = propose(request, lambda line: say(terminal(), line))
    print(study, end="")
    for line in (*said_texts(config), *takes.lines(config.model.device)):
        say(terminal(), line)
