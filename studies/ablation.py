"""What each mechanism of our search earns: each switched off in turn, on two spaces, at two budgets of tokens.

    python studies/ablation.py TEXT [--budgets 100000,300000] [--seeds 0,1] [--rows a,b] [--spaces a,b] [--threads 1]

TEXT is split and plans are compared as in `search_benchmark.py`: at each kept fraction the measured plan that is best
on the search split, measured on the report split. "Lean with anchors" is the search as it is. "With neighbours"
corrected predictions by what was missed of measured plans with many options in common; its opening ended at a kept
fraction of 0.3, as the search's does, or of 0.4. "Dynamic program" is the latter with knapsacks solved by one, so is
"lean", which had no anchor but the dense model. Other rows are of bb7df42, which had more: "everything" is all of that,
the others leave out one part of it, and "two fidelities" adds one. Finished cells are kept in
studies/results/ablation.jsonl, one line each, and never measured again: stop it at any time and start it again. What a
cell measured serves every other cell that measures the same: searches of one seed begin alike. The page
studies/results/ablation.md is written after every cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, Cell, finish, has, keep_cells, read_cells, sources
from rich.console import Console
from search_benchmark import GRID, JOINT, hypervolume, settings

from rankfront.methods import InputError
from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.inputs.own_text import Progress
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import Setup
from rankfront.search.plans.job import Job, Record
from rankfront.search.tuning import tuned

EVERYTHING = "everything"
SPACES: dict[str, Sequence[str]] = {"default": JOINT, "svd-llm": ("svd-llm",)}
SHOWN = (0.8, 0.7, 0.6, 0.5)
ROWS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # row -> what it changes of `Tuning`, of the study
    "lean with anchors": ({}, {}),
    "lean": ({}, {"search.anchors": []}),
}
EARLIER = (  # rows of bb7df42 that cannot be run any more
    EVERYTHING, "no paths", "no anchors but dense", "no posterior samples", "no switches", "no easings",
    "no residual process", "no neighbours", "two fidelities", "dynamic program",
    "with neighbours, from 0.4", "with neighbours, from 0.3",
)  # fmt: skip


class Remembering:
    """In the place of a study's resident model: measures no job twice, and times what lies between jobs.

    Attributes:
        driver: seconds between jobs, which is what asking and telling take.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Record] = {cell["job"]: cell["record"] for cell in read_cells(file)}
        self.driver = 0.0

    def __call__(self, setup: Setup, progress: Progress) -> Remembering:
        self.setup, self.resident = setup, None
        self.driver, self.left = 0.0, time.perf_counter()
        return self

    resident: JobRunner | None = None

    def run(self, job: Job) -> Record:
        self.driver += time.perf_counter() - self.left
        search, number = self.setup.config.search, 0 if job.kind == "trial" else job.number
        where = [*self.setup.config.space.methods, search.trial_tokens, search.seed]
        record = self.once(json.dumps([*where, job.kind, number, job.plan.key, job.tokens]), job)
        self.left = time.perf_counter()
        return record

    def once(self, key: str, job: Job) -> Record:
        if key not in self.known:
            record = self._model().run(job)
            if "failure" in record:
                return record
            self._keep(key, record)
        return copy.deepcopy(self.known[key])

    def perplexity(self, plan: Plan) -> float:
        """On the report split."""
        key = json.dumps(["report", plan.key])
        if key not in self.known:
            compressed = self._model().compressed
            compressed.apply(plan)
            self._keep(key, {"perplexity": score(compressed.model, self.setup.tokens["report"]).perplexity})
        return float(self.known[key]["perplexity"])

    def _model(self) -> JobRunner:
        if self.resident is None:
            self.resident = JobRunner(self.setup)
        return self.resident

    def _keep(self, key: str, record: Record) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        keep_cells(self.file, [{"job": key, "record": record}])
        self.known[key] = record


def measure(memory: Remembering, text: str, space: str, row: str, budget: int, seed: int) -> Cell:
    """One search, and its plans on the report split."""
    constants, changed = ROWS[row]
    changed = {"space.methods": SPACES[space], "search.seed": seed, "search.tokens": budget, **changed}
    overrides = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    run = RESULTS / "runs" / f"ablation-{space}-{row}-{budget}-{seed}".replace(" ", "-")
    study = Study(settings(text, torch.get_num_threads()), run, overrides)
    shutil.rmtree(run, ignore_errors=True)  # of a cell that was stopped: what it measured is remembered
    with patch("rankfront.search.run.launch.JobRunner", memory), tuned(**constants):
        study.launch(Console(quiet=True), report=False)
    plans: dict[float, Plan] = {}
    for keep in GRID:
        with suppress(InputError):  # nothing is as small
            plans[keep] = study.best(f"block_parameters<={keep}").plan
    memory.setup = study.setup()
    dense = memory.perplexity(Plan(()))
    found = {keep: memory.perplexity(plan) for keep, plan in plans.items()}
    return {
        "space": space,
        "row": row,
        "budget": budget,
        "seed": seed,
        "hypervolume": hypervolume(dense, found),
        "perplexity": {str(keep): value for keep, value in found.items()},
        "tokens": study.tokens(),
        "trials": sum(trial.state == "complete" for trial in study.rows()),
        "driver": memory.driver,
    }


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """Rows of one space and budget: medians over seeds, and differences to everything at the same seed."""
    head = ["row", "seeds", "hypervolume", "against everything", *(f"ppl at {keep}" for keep in SHOWN), "trials"]
    head += ["driver, s"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    whole = {cell["seed"]: cell["hypervolume"] for cell in cells if cell["row"] == EVERYTHING}
    for row in (*EARLIER, *ROWS):
        own = [cell for cell in cells if cell["row"] == row]
        if own:
            volumes = [cell["hypervolume"] for cell in own]
            gaps = [cell["hypervolume"] - whole[cell["seed"]] for cell in own if cell["seed"] in whole]
            at = [[c["perplexity"].get(str(keep), math.inf) for c in own] for keep in SHOWN]
            shown = [f"{median(values):.1f}" for values in at]
            against = ", ".join(f"{gap:+.4f}" for gap in gaps)
            seconds = median(cell["driver"] for cell in own)
            spread = f" ({min(volumes):.4f} to {max(volumes):.4f})" if len(volumes) > 1 else ""
            entries = [row, str(len(own)), f"{median(volumes):.4f}{spread}", against, *shown]
            entries += [f"{median(cell['trials'] for cell in own):.0f}", f"{seconds:.1f}"]
            yield f"| {' | '.join(entries)} |"


PAGE = """# What each mechanism of our search earns

SmolLM2-135M-Instruct, WikiText-2 validation text; rows are said at the top of `studies/ablation.py`, and what followed
from them in docs/benchmarks.md. Perplexities are medians over seeds on the report split, of the measured plan that is
best on the search split within the kept fraction; "against everything" is the difference in hypervolume to that row,
seed by seed. Seconds of the driver are what asking and telling took in all.

{tables}

Command: `python studies/ablation.py TEXT --threads 1`

{sources}
"""


def write(cells: Sequence[Cell]) -> None:
    """The page of all cells."""
    groups = sorted({(cell["budget"], cell["space"]) for cell in cells})
    tables = []
    for budget, space in groups:
        own = [cell for cell in cells if (cell["budget"], cell["space"]) == (budget, space)]
        tables += [f"## {budget:,} tokens, {space} space", "", *table(own), ""]
    made = sources(cells, lambda cell: f"{cell['space']} {cell['row']} {cell['budget']:,} seed {cell['seed']}")
    page = PAGE.format(tables="\n".join(tables).strip(), sources=made)
    (RESULTS / "ablation.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--spaces", default=",".join(SPACES))
    parser.add_argument("--budgets", default="100000,300000")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file = RESULTS / "ablation.jsonl"
    memory = Remembering(RESULTS / "runs" / "ablation.jsonl")
    cells = read_cells(file)
    order = [asked.budgets.split(","), asked.seeds.split(","), asked.rows.split(","), asked.spaces.split(",")]
    for budget, seed, row, space in product(*order):
        key = {"space": space, "row": row, "budget": int(budget), "seed": int(seed)}
        if not has(cells, key):
            cells = finish(file, measure(memory, asked.text, space, row, int(budget), int(seed)))
            write(cells)


if __name__ == "__main__":
    main()
