"""Write the page of the longest tests from what pytest's ``--junit-xml`` recorded: ``durations.py REPORT [NOTE]``.

Prints Markdown. Seconds are wall-clock, of setup, call and teardown; a fixture counts for the test that asked first.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LONGEST = 20


def processor() -> str:
    """The processor's name, where Linux says it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(header: str, seconds: dict[str, float]) -> str:
    rows = [f"| {taken:.1f} | `{name}` |" for name, taken in sorted(seconds.items(), key=lambda row: -row[1])]
    return "\n".join([f"| seconds | {header} |", "| ---: | --- |", *rows])


def page(report: Path, note: str = "") -> str:
    """Markdown of the longest tests, and of every file that takes a second."""
    tests: dict[str, float] = {}
    files: dict[str, float] = defaultdict(float)
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        file = case.attrib["classname"].rpartition(".")[2]
        tests[f"{file}::{case.attrib['name']}"] = taken = float(case.attrib["time"])
        files[file] += taken
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    wall = float(next(ElementTree.parse(report).iter("testsuite")).attrib["time"])
    longest = dict(sorted(tests.items(), key=lambda row: -row[1])[:LONGEST])
    return f"""# The longest tests

By `make durations`, at {commit.strip()}: {len(cases):,} tests in {wall:.0f} s, on {os.cpu_count()} cores of
{processor()}. {note}

{table("test", longest)}

{table("file", {name: taken for name, taken in files.items() if taken >= 1})}
"""


if __name__ == "__main__":
    print(page(Path(sys.argv[1]), *sys.argv[2:]), end="")
