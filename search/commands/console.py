"""What commands share: where they print, and options that several of them take."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfront.search.plain import literal

if TYPE_CHECKING:
    from rich.console import Console

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


def say(console: Console, text: object) -> None:
    """Print a line as it is, whoever wrote what is in it."""
    console.print(literal(text), soft_wrap=True)


def print_json(data: Any) -> None:
    print(json.dumps(_finite(data), indent=1, allow_nan=False))


def _finite(data: Any) -> Any:
    """``data`` with null for what is no finite number: JSON has no NaN."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
