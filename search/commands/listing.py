"""What there is: evaluate, methods, engines."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfront.search.commands.console import JsonOption, TrustOption, output, print_json, say

app = typer.Typer()


@app.command("evaluate", epilog="Example: rankfront evaluate exported/demo --text pydoc --windows 8")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="a bundled name, a hub id, a folder (dense or exported), a .gguf file")],
    text: Annotated[str, typer.Option(help="pydoc, a text file, or hub:NAME/CONFIG:SPLIT")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=8)] = 512,
    prepack: Annotated[bool, typer.Option("--prepack", help="with weights in the order a CPU reads fastest")] = False,
    task: Annotated[
        str, typer.Option(help="causal-lm, or for an encoder masked-lm or sequence-classification")
    ] = "causal-lm",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity, parameters, latency."""
    from rankfront.search.output.evaluate import evaluate

    found = evaluate(model, text, windows, length, prepacked=prepack, trust_remote_code=trust_remote_code, task=task)
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            say(output(), f"{name:<28}{value:,.6g}" if isinstance(value, float) else f"{name:<28}{value}")


@app.command(epilog="Example: rankfront methods --model smollm2-135m")
def methods(
    model: Annotated[str | None, typer.Option(help="say of each kind of its sites why a method refuses it")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """List every method in its place in the taxonomy, with its geometry, metric, what it needs, and its paper."""
    from rankfront.search.output.taxonomy import methods_json, methods_table

    if as_json:
        print_json(methods_json(model, trust_remote_code))
    else:
        output().print(methods_table(model, trust_remote_code))


@app.command(epilog="Example: rankfront engines --json")
def engines(as_json: JsonOption = False) -> None:
    """List the formats of exports, the engines that open them, and what of a plan stays small there."""
    from rankfront.search.output.engines import engines_json, engines_table

    if as_json:
        print_json(engines_json())
    else:
        output().print(engines_table())
