"""What a sequential refit buys on smollm2-135m: perplexity on the report split without and with it.

    python studies/refit.py TEXT [--rows uniform,rankfront] [--budget 100000] [--keep 0.8,0.6] [--threads 2]

Model, text, splits, plans and budgets in tokens are those of studies/search_benchmark.py (svd-llm and dense): the same
fraction everywhere, what allocators give before any plan is looked at, and what a search has found. The refit reads the
calibrate split, 64 windows of 512 tokens. Finished lines are kept in studies/results/refit.jsonl.
"""

from __future__ import annotations

import argparse
import json

import torch
from common import RESULTS, Cell, keep_cells, provenance, read_cells, sources
from search_benchmark import ROWS, Bench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.measure.refit import refitted

PAGE = """# Sequential refit

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense; perplexity on the report split (dense:
{dense:.4g}). How is said at the top of `studies/refit.py`.

| plan | budget | keep | perplexity | refitted |
| --- | --- | --- | --- | --- |
{lines}

Command: `python studies/refit.py TEXT --rows ... --budget ...`

{sources}
"""


def page(cells: list[Cell]) -> str:
    """The table, dearest plans first."""
    order = sorted(cells, key=lambda cell: (-cell["keep"], -cell["perplexity"]))
    lines = [
        f"| {c['row']} | {c['budget']:,} | {c['keep']:g} | {c['perplexity']:.4g} | {c['refitted']:.4g} |" for c in order
    ]
    made = sources(cells, lambda cell: f"{cell['row']} {cell['budget']:,}")
    return PAGE.format(dense=cells[0]["dense"], lines="\n".join(lines), sources=made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rows", default="uniform,menu + knapsack,LEMS-style probe,rankfront")
    parser.add_argument("--budget", type=int, default=100_000)
    parser.add_argument("--keep", default="0.8,0.6")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = RESULTS / "refit.jsonl"
    cells = read_cells(file)
    bench: Bench | None = None
    for row in arguments.rows.split(","):
        wanted = [{"row": row, "budget": arguments.budget, "keep": float(k)} for k in arguments.keep.split(",")]
        missing = [key for key in wanted if not any(key.items() <= cell.items() for cell in cells)]
        if not missing:
            continue
        bench = bench or Bench(arguments.text)
        plans = ROWS[row](bench, arguments.budget, 0).plans
        for key in missing:
            cells.append(key | measure(bench, plans[key["keep"]]) | {"from": provenance()})
            keep_cells(file, cells[-1:])
            print(json.dumps(cells[-1]), flush=True)
    (RESULTS / "refit.md").write_text(page(cells), encoding="utf-8")


def measure(bench: Bench, plan: Plan) -> dict[str, float]:
    """Perplexity of the dense model, of ``plan``, and of ``plan`` refitted, on the report split."""
    resident, report = bench.resident, bench.setup.tokens["report"]
    found = {}
    for name, each in (("dense", Plan(())), ("perplexity", plan)):
        resident.compressed.apply(each)
        found[name] = score(resident.compressed.model, report).perplexity
    with refitted(resident.compressed, plan):
        found["refitted"] = score(resident.compressed.model, report).perplexity
    return found


if __name__ == "__main__":
    main()
