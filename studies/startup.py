"""How long commands take to start, in processor seconds, beside what they are built on.

    python studies/startup.py RUN [TURNS]

RUN is a finished run, such as the one that `make demo` leaves. Every command and its control are run in turns, each in
an interpreter of its own; medians over TURNS (5) go into studies/results/startup.md. What is loaded is a tiny random
Llama, exported in both forms: its weights take no time to read.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_page
from driver_overhead import make_study, quiet

from rankfront.search import Study

PAGE = """# Start-up

Processor seconds, user and system, of a fresh interpreter: medians of {turns} turns, each beside its control. The run
that is read has {trials} trials on {sites} sites.

{lines}

```
{source}
```
"""
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(name: str) -> None: "One."
@app.command()
def two(name: str) -> None: "Two."
app(["--help"])
"""
LIBRARIES = "import optuna, sqlalchemy, pandas, rich"
LOAD = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({!r})"
COMMAND = "import sys; from rankfront.search.__main__ import run; sys.exit(run({}))"


def seconds(code: str) -> float:
    """Processor seconds of ``code`` in a fresh interpreter, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def export(folder: Path) -> tuple[str, str]:
    """(factored, dense) exports of one plan of a tiny model."""
    study = make_study(folder, "random", trials=3)
    study.launch(quiet(), report=False)
    row = next(row for row in study.rows() if not row.is_dense)
    for form in ("factored", "dense"):
        study.export(folder / form, row, form)
    return str(folder / "factored"), str(folder / "dense")


def main(run: str, turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(run, turns, *export(Path(folder)))


def measure(run: str, turns: int, factored: str, dense: str) -> None:
    typer, libraries = ("a bare typer application's --help", BARE), (LIBRARIES, LIBRARIES)
    rows = [
        ("`rankfront --help`", COMMAND.format(["--help"]), typer, 1.5),
        ("`rankfront --version`", COMMAND.format(["--version"]), typer, 1.5),
        ("a wrong argument", COMMAND.format(["frnt"]), typer, 1.5),
        ("`rankfront methods`", COMMAND.format(["methods"]), libraries, 1.5),
        ("`rankfront front`", COMMAND.format(["front", run]), libraries, 1.5),
        ("`rankfront show`", COMMAND.format(["show", run, "0"]), libraries, 1.5),
        ("`import rankfront.methods`", "import rankfront.methods", ("import transformers", "import transformers"), 1.2),
        (
            "loading an export",
            f"import rankfront.methods; {LOAD.format(factored)}",
            ("loading the same model, dense", LOAD.format(dense)),
            1.2,
        ),
    ]
    lines = ["| | seconds | control | seconds | ratio | goal |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    for name, code, (label, control), goal in rows:
        pairs = [(seconds(code), seconds(control)) for _ in range(turns)]
        ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
        lines.append(f"| {name} | {ours:.2f} | {label} | {theirs:.2f} | {ours / theirs:.2f} | {goal} |")
        print(lines[-1], flush=True)
    found = Study.open(run).read()
    write_page("startup", PAGE, lines, turns=str(turns), trials=str(len(found.rows)), sites=str(len(found.sites)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
