"""How long a finished run takes to answer budgets that were never searched.

    python studies/answers.py RUN [RUN ...] [--tries 3]

RUN is a run folder, such as studies/results/runs/rankfront-0 that studies/search_benchmark.py leaves. A plan is asked
for under one limit, two and three at once, at several bounds where no search starts: seconds of `Study.answer` from
opening the run to the plan, in this process, after one answer that is not counted. The second and the third limit ask
for 2 and 4% less than what the plan under the first alone takes, so that all of them count. Nothing is measured. The
page goes to studies/results/answers.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

from common import write_page

from rankfront.search import Study

KEPT = (0.87, 0.77, 0.63, 0.53, 0.43)  # of the block-linear weights
FIGURES = ("block_parameters", "bytes", "parameters")
TIGHTER = (1.0, 0.98, 0.96)
PAGE = """# Seconds of an answer

`Study.answer`, from opening a run to the plan that is expected to be best under the limits, at kept fractions
{kept} of the block-linear weights. How is said at the top of `studies/answers.py`.

| methods | trials | options, over all sites | limits | answers | median, s | worst, s | CPU, median, s |
| --- | --- | --- | --- | --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--tries", type=int, default=3)
    arguments = parser.parse_args()
    lines = [line for run in arguments.runs for line in measure(run, arguments.tries)]
    write_page("answers", PAGE, lines, kept=", ".join(map(str, KEPT)))


def measure(run: str, tries: int) -> list[str]:
    """The run's lines of the table."""
    study = Study.open(run)
    taken: list[list[tuple[float, float]]] = [[] for _ in FIGURES]
    for keep in KEPT:
        limits = [f"{FIGURES[0]}<={keep}"]
        figures = study.answer(*limits).figures
        for name, share, found in zip(FIGURES, TIGHTER, taken, strict=True):
            if share < 1:
                limits.append(f"{name}<={share * figures[name]:.9g}")
            found += [timed(run, limits) for _ in range(tries)]
    menu, trials = study.menu(), len(study.rows())
    about = f"{', '.join(sorted(set(menu.method) - {'dense'}))} | {trials} | {len(menu):,}"
    lines = []
    for count, found in enumerate(taken, start=1):
        wall, processor = zip(*found, strict=True)
        seconds = " | ".join(f"{value:.2f}" for value in (median(wall), max(wall), median(processor)))
        lines.append(f"| {about} | {', '.join(FIGURES[:count])} | {len(found)} | {seconds} |")
        print(lines[-1], flush=True)
    return lines


def timed(run: str, limits: Sequence[str]) -> tuple[float, float]:
    """Seconds on the clock and of CPU that an answer takes."""
    wall, processor = time.perf_counter(), time.process_time()
    Study.open(run).answer(*limits)
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
