"""Every method, uniform, side by side on smollm2-135m: one table.

    python studies/families.py TEXT [--methods a,b] [--threads 1]

The study file is studies/families.toml with TEXT in the place of its text: calibrate on the first half, report on the
last quarter, and on half as many windows of `pydoc`. At each kept fraction every site that a method can treat takes its
option there, all else stays dense; a method without levels treats as many of its sites, evenly spread, as bring about
that fraction of their bytes. Divergence is that from the dense model on the report split; latency (batch 1, 128 tokens
of prompt, 16 decoded) the median of nine ratios of interleaved runs; seconds those of factoring the sites at all four
levels, statistics aside (a root of a Gram is paid by the first method that asks), a dash where the store had them.
Finished methods are kept in studies/results/families.jsonl and not measured again.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Cell, keep_cells, provenance, read_cells, sources

from rankfront.methods import FAMILIES, get_method, method_names
from rankfront.objectives import Clock, score, teach
from rankfront.objectives.latency import Latency
from rankfront.search import Plan, Study
from rankfront.search.inputs.model import load_tokenizer
from rankfront.search.inputs.text import cut
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.splits import Split

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PUBLISHED = "-published"  # what slow published settings are called; they are left out unless named


def settings(text: str, methods: Sequence[str]) -> dict[str, Any]:
    """families.toml on ``text`` for some methods."""
    data = tomllib.loads((HERE / "families.toml").read_text(encoding="utf-8"))
    for split in data["data"].values():
        if isinstance(split, dict):
            split["text"] = text
    (head,) = data["space"]["rule"]
    outside = [method for method in head["methods"] if method in methods]
    inside = [method for method in methods if method not in outside]
    include = ["*"] * bool(inside) + [head["match"]] * bool(outside)
    rule = [{"match": head["match"], "methods": outside}] if inside and outside else []
    data["space"] |= {"methods": inside or outside, "include": include, "rule": rule}
    return data


def uniform(resident: JobRunner, method: str, keep: float) -> Plan:
    """``method`` at ``keep`` wherever it can treat a site."""
    offered = {s.name: choices for s, choices in resident.compressed.space.choices.items() if method in choices.methods}
    levels = {name: {o for (own, _), o in c.options.items() if own == method} for name, c in offered.items()}
    if all(len(options) == 1 for options in levels.values()):
        sites = [site for site in resident.compressed.space.choices if site.name in offered]
        option = next(iter(levels[sites[0].name]))
        left = get_method(method).storage(sites[0], option).bytes(2) / sites[0].storage.bytes(2)
        names, count = list(offered), min(round((1 - keep) / (1 - left) * len(offered)), len(offered))
        taken = [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
        return Plan.of({name: next(iter(levels[name])) for name in taken})
    return Plan.of({name: choices.option(method, keep) for name, choices in offered.items()})


def measure(text: str, methods: Sequence[str]) -> Iterator[list[Cell]]:
    """The cells of each method, one for each kept fraction."""
    study = Study(settings(text, methods))
    setup = study.setup()
    space = make_space(setup)
    seconds = prepare_store(setup, space, lambda phase, done, total: None).seconds
    resident = JobRunner(setup)
    report = setup.tokens["report"]
    splits = {"pydoc": Split("pydoc", len(report) // 2, (0.0, 1.0))}
    pydoc = cut(load_tokenizer(setup.source), splits, setup.config.data.length)["pydoc"]
    teacher = teach(resident.compressed.model, report)
    dense = [score(resident.compressed.model, windows).perplexity for windows in (report, pydoc)]
    for method in methods:
        cells = []
        for keep in sorted(setup.config.space.keep, reverse=True):
            plan = uniform(resident, method, keep)
            subject = resident.subject(plan, Clock())
            cost, scores = subject.cost, score(resident.compressed.model, report, teacher)
            Latency(prompt=128, decode=16, rounds=9, seconds=0).value(subject)
            cells.append(
                {
                    "method": method,
                    "keep": keep,
                    "treated": len(plan.choices),
                    "divergence": scores.divergence,
                    "perplexity": scores.perplexity,
                    "pydoc": score(resident.compressed.model, pydoc).perplexity,
                    "dense": dense,
                    "block_parameters": cost.block_parameters,
                    "parameters": cost.parameters,
                    "megabytes": cost.bytes / 1e6,
                    "prefill": subject.notes["latency_prefill"],
                    "decode": subject.notes["latency_decode"],
                    "seconds": seconds.get(method),
                    "from": provenance(),
                }
            )
        yield cells


COLUMNS = {
    "keep": "{:g}",
    "divergence": "{:.3f}",
    "perplexity": "{:.4g}",
    "pydoc": "{:.4g}",
    "block_parameters": "{:.3f}",
    "parameters": "{:.3f}",
    "megabytes": "{:.0f}",
    "prefill": "{:.2f}",
    "decode": "{:.2f}",
    "seconds": "{:.0f}",
}


def table(cells: list[Cell]) -> str:
    """By family, methods in order of registration, from the dearest level."""
    order = list(FAMILIES)
    lines = [f"| family | method | {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * (len(COLUMNS) + 2))} |"]
    known = method_names()
    for cell in sorted(
        cells, key=lambda c: (order.index(get_method(c["method"]).family), known.index(c["method"]), -c["keep"])
    ):
        shown = ["-" if cell[name] is None else form.format(cell[name]) for name, form in COLUMNS.items()]
        lines.append(f"| {get_method(cell['method']).family} | {cell['method']} | {' | '.join(shown)} |")
    return "\n".join(lines)


PAGE = """# Every family, uniform

SmolLM2-135M-Instruct; how each figure is made is said at the top of `studies/families.py`. The dense model has
perplexity {dense[0]} on the report split and {dense[1]} on `pydoc`.

{table}

Command: `python studies/families.py TEXT --methods ...`

{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--methods", default=",".join(n for n in method_names() if not n.endswith(PUBLISHED)))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "families.jsonl"
    cells = read_cells(file)
    known = {cell["method"] for cell in cells}
    missing = [method for method in arguments.methods.split(",") if method not in known]
    for found in measure(arguments.text, missing) if missing else ():
        cells += found
        keep_cells(file, found)
        print(table(found), flush=True)
    if not cells:
        return
    dense = [f"{value:.4g}" for value in cells[0]["dense"]]
    page = PAGE.format(dense=dense, table=table(cells), sources=sources(cells, lambda cell: cell["method"], ", "))
    (RESULTS / "families.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
