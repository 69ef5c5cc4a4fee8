"""What benchmarks share: arguments, cells that they keep, and what stands beside a table: command, commit, machine."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Cell = dict[str, Any]  # a measurement, with its `provenance` under "from"
RESULTS = Path(__file__).parent / "results"


def on_text(doc: str | None, **counts: int) -> argparse.Namespace:
    """The command line of a benchmark on a ``text``: ``--threads``, which torch uses from now on, and ``counts``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    for name, default in {**counts, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def write_page(name: str, page: str, lines: Iterable[str], **fields: str) -> None:
    """Fill in the template ``page``, its ``{lines}`` and ``{source}`` too, as ``name`` among the results."""
    text = page.format(lines="\n".join(lines), source=provenance().strip(), **fields)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> str:
    """Command without folders, commit (marked where the tree was not clean, results aside), machine: three lines."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + (
        " with local changes" if git("status", "--porcelain", "-uno", ":!results") else ""
    )
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    command = " ".join(Path(each).name if Path(each).is_absolute() else each for each in sys.argv)
    return f"\ncommand: python {command}\ncommit: {commit}\nmachine: {machine}"


def read_cells(file: Path) -> list[Cell]:
    """The finished cells in ``file``, one a line."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep_cells(file: Path, cells: Iterable[Cell]) -> None:
    """Add ``cells`` to those in ``file``."""
    with file.open("a") as out:
        out.writelines(json.dumps(cell) + "\n" for cell in cells)


def has(cells: Iterable[Cell], key: Cell) -> bool:
    """Whether one of ``cells`` is of this ``key``."""
    return any(key.items() <= cell.items() for cell in cells)


def finish(file: Path, cell: Cell) -> list[Cell]:
    """Add a finished ``cell`` to ``file``, with where it comes from, and print it; all that the file has."""
    keep_cells(file, [cell | {"from": provenance()}])
    print(json.dumps(cell), flush=True)
    return read_cells(file)


def origin(cell: Cell) -> str:
    """Commit and machine of a cell, on one line."""
    return str(cell["from"]).partition("commit: ")[2].replace("\nmachine: ", ", ")


def sources(cells: Iterable[Cell], name: Callable[[Cell], str], between: str = "; ") -> str:
    """Commit and machine of every cell, as a list: the names of those that share them together, each once."""
    groups: dict[str, dict[str, None]] = {}
    for cell in cells:
        groups.setdefault(origin(cell), {})[name(cell)] = None
    return "\n".join(f"- commit {where}: {between.join(names)}" for where, names in groups.items())
