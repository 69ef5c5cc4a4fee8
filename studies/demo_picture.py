"""The picture at the top of the README: the front of the demo's run, and the same methods everywhere alike.

    pip install matplotlib
    python studies/demo_picture.py [RUN] [OUT]

RUN is the run folder that `make demo` leaves, runs/demo; OUT is studies/demo.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from rankfront.search import Study

CEILING = 3.0  # times the dense perplexity: plans above are left out
GREY, BLUE, RED = "#b0b4ba", "#1f77b4", "#d62728"


def main(run: str, out: Path) -> None:
    study = Study.open(run)
    quality, size = study.config.objectives
    front = sorted(study.front(), key=lambda row: row.values[size])
    dense = next(row for row in front if row.is_dense).values[quality]
    members = {row.number for row in front}
    others = [row for row in study.rows() if row.state == "complete" and row.number not in members]
    uniform = [row for row in others if row.origin.startswith("anchor")]
    searched = [row for row in others if not row.origin.startswith("anchor")]
    figure = Figure(figsize=(8.8, 4.6), layout="constrained")
    axes = figure.subplots()
    for rows, marker, color, label in (
        (uniform, "D", BLUE, "the same methods, the same fraction everywhere"),
        (searched, ".", GREY, "searched plans"),
    ):
        points = [r.values[size] for r in rows], [r.values[quality] for r in rows]
        axes.plot(*points, linestyle="none", marker=marker, color=color, label=label)
    axes.step(
        [row.values[size] for row in front],
        [row.values[quality] for row in front],
        where="post",
        marker="o",
        markersize=4.5,
        color=RED,
        label="front",
    )
    axes.axhline(dense, color=GREY, linestyle=":", linewidth=1)
    axes.set_ylim(0.9 * dense, CEILING * dense)
    axes.set_xlabel(f"{size}, fraction of the model")
    axes.set_ylabel(f"{quality}, search split")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else "runs/demo", Path(given[1] if len(given) > 1 else Path(__file__).parent / "demo.png"))
