"""rankfront makes language models smaller: by one command, compress, or step by step, from init to export."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

import rankfront
from rankfront.methods import InputError
from rankfront.search.commands import compressing, doctor, exporting, listing, reading, studies, training
from rankfront.search.errors import ExportError, GaveUp, Interrupted
from rankfront.search.plain import plain

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__,
)
UsageError: Any = typer.BadParameter.__base__  # click's, wherever this typer keeps it


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


for commands in (compressing, studies, reading, exporting, training, listing, doctor):
    app.add_typer(commands.app)


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
