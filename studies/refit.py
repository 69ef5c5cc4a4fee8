"""What a sequential refit buys on smollm2-135m: perplexity on the report split without and with it.

    python studies/refit.py TEXT [--rows uniform,...] [--keep 0.8,0.6]

Model, text, splits and plans are those of studies/search_benchmark.py (svd-llm and dense): the same fraction
everywhere, and what the menu and the knapsack give before any search. The refit reads the calibrate split, 64 windows
of 512 tokens.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import provenance
from search_benchmark import RESULTS, ROWS, Bench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.refit import refitted

PAGE = """# Sequential refit

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense; perplexity on the report split (dense:
{dense:.4g}). How is said at the top of `studies/refit.py`.

| plan | keep | perplexity | refitted | seconds of the refit |
| --- | --- | --- | --- | --- |
{lines}

{source}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rows", default="uniform,menu + knapsack")
    parser.add_argument("--keep", default="0.8,0.6")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    bench = Bench(arguments.text)
    resident, report = bench.resident, bench.setup.tokens["report"]
    resident.apply(Plan(()))
    dense = score(resident.model, report).perplexity
    lines = []
    for row in arguments.rows.split(","):
        plans = ROWS[row](bench, 100_000, 0).plans
        for keep in map(float, arguments.keep.split(",")):
            resident.apply(plans[keep])
            plain = score(resident.model, report).perplexity
            start = time.perf_counter()
            with refitted(resident, plans[keep]):
                seconds = time.perf_counter() - start
                again = score(resident.model, report).perplexity
            lines.append(f"| {row} | {keep:g} | {plain:.4g} | {again:.4g} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    source = "\n".join(f"- {line}" for line in provenance().strip().splitlines())
    page = PAGE.format(dense=dense, lines="\n".join(lines), source=source)
    (RESULTS / "refit.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
