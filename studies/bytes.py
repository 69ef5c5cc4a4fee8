"""Perplexity at budgets of bytes on smollm2-135m: structure and bits together, each alone, in sequence, and uniform.

    python studies/bytes.py TEXT [--tokens 100000] [--threads 2]

TEXT is split as in search_benchmark.py: calibrated on its first half, searched on its third quarter, reported on its
last. The study is bytes.toml. Rows of a search spend the same tokens, then solve for every budget; what they hand over
is the plan that is best on the search split within it. "in sequence" takes what structure alone has found and rounds
all of it to 8, or to 4 bits, by the same GPTQ: of these plans within the budget, the best on the search split. A run is
kept in its folder: stop it at any time and start it again.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, on_text, write_page

from rankfront.methods import DENSE, InputError, Option, Site, narrowed, rounding_whole
from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.inputs.device import DTYPES
from rankfront.search.measure.runner import JobRunner
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import cost_of

BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)  # of the dense model's bytes
WINDOWS = {"search": 32, "report": 64}  # by which plans are chosen, and reported
TOGETHER, STRUCTURE, BITS = "structure and bits together", "structure alone", "mixed bits alone"
ROWS: dict[str, dict[str, Any]] = {
    TOGETHER: {},
    STRUCTURE: {"bits": [16]},
    BITS: {"methods": [DENSE]},
}
PAGE = """# Perplexity at budgets of bytes

SmolLM2-135M-Instruct, WikiText-2 validation text, report part; budgets are shares of the {dense} MB that the model
takes in 16 bits, where its perplexity is {perplexity}. How is said at the top of `studies/bytes.py`. In brackets,
log perplexity over dense. "-": nothing fits.

| | {budgets} |
| --- | {rule} |
{lines}

```
{source}
```
"""


def settings(text: str, tokens: int, space: dict[str, Any]) -> dict[str, Any]:
    """The study of a row."""
    study = tomllib.loads((Path(__file__).parent / "bytes.toml").read_text(encoding="utf-8"))
    for split in ("calibrate", "search", "report"):
        study["data"][split]["text"] = text
    study["space"] |= space
    study["search"] |= {"tokens": tokens, "resources": {"cpu": torch.get_num_threads()}}
    return study


class Bench:
    """What is measured of plans, on the search part and the report part."""

    def __init__(self, study: Study) -> None:
        self.setup = study.setup()
        self.compressed = JobRunner(self.setup).compressed
        self.sites = {site.name: site for site in self.compressed.sites}
        self.dense = self.bytes(Plan(()))
        self.known: dict[tuple[str, str], float] = {}

    def bytes(self, plan: Plan) -> int:
        """Of the export."""
        value = DTYPES[self.setup.dtype].itemsize
        return cost_of(plan, inside_blocks(self.compressed.sites), self.compressed.dense_values, value).bytes

    def loss(self, plan: Plan, split: str) -> float:
        """Log perplexity."""
        if (plan.key, split) not in self.known:
            self.compressed.apply(plan)
            windows = self.setup.tokens[split][: WINDOWS[split]]
            perplexity = score(self.compressed.model, windows).perplexity
            self.known[plan.key, split] = math.log(perplexity)
        return self.known[plan.key, split]

    def everywhere(self) -> Plan:
        """The first option of every site."""
        wanted = self.compressed.space.wanted()
        return Plan.of({site.name: options[0] for site, options in wanted.items()}, self.setup.origin())

    def rounded(self, plan: Plan, bits: int) -> Plan:
        """All of ``plan`` in fewer bits, and what it leaves dense."""
        taken = {weight.path for name in plan.by_site for weight in self.sites[name].weights}
        wanted = self.compressed.space.wanted()
        found: dict[str, Option] = {}
        for name, site in self.sites.items():
            own = plan.by_site.get(name)
            if own is None and len(site.weights) == 1 and site.weights[0].path not in taken and site in wanted:
                found |= _whole(site, wanted[site], bits)
            elif own is not None:
                narrow = narrowed(own.method, bits)
                found[name] = own if narrow is None else Option.of(narrow.name, **dict(own.level), bits=bits)
        missing = {self.sites[name]: [o] for name, o in found.items() if o.method != DENSE}
        assert not self.compressed.store.missing(missing), "a level that the space does not offer"
        return Plan.of(found, self.setup.origin())


def _whole(site: Site, offered: list[Option], bits: int) -> dict[str, Option]:
    """The dense weight in fewer bits."""
    found = [option for option in offered if option.method in rounding_whole(bits)]
    return {site.name: found[0]} if found else {}


def plans(text: str, tokens: int, row: str) -> Iterator[Plan]:
    """All that the search of a row has measured."""
    study = Study(settings(text, tokens, ROWS[row]), run=RESULTS / "runs" / f"bytes-{row.replace(' ', '-')}")
    study.launch(report=False)
    dense = next(r.values["bytes"] for r in study.rows() if r.state == "complete" and not r.plan.choices)
    for budget in BUDGETS:
        try:
            study.solve(f"bytes<={budget * dense:.0f}", report=False)
        except InputError as error:
            print(f"{row}, {budget}: {error}", flush=True)
    yield from (each.plan for each in study.rows() if each.state == "complete")


def main() -> None:
    arguments = on_text(__doc__, tokens=100_000)
    found = {row: list(plans(arguments.text, arguments.tokens, row)) for row in ROWS}
    bench = Bench(Study(settings(arguments.text, arguments.tokens, {})))
    dense = Plan(())
    found["in sequence"] = [bench.rounded(plan, bits) for plan in found[STRUCTURE] for bits in (8, 4) if plan.choices]
    for bits in (8, 4):
        found[f"uniform, {bits} bits (gptq)"] = [bench.rounded(dense, bits)]
    rows = [line(bench, row, own) for row, own in found.items()]
    for bits in (8, 4):
        space = {"methods": [f"rtn-int{bits}"], "bits": [16]}
        nearest = Bench(Study(settings(arguments.text, arguments.tokens, space)))
        rows.append(line(nearest, f"uniform, {bits} bits (to the nearest)", [nearest.everywhere()]))
    perplexity = math.exp(bench.loss(dense, "report"))
    write_page(
        "bytes", PAGE, rows, dense=f"{bench.dense / 1e6:.0f}", perplexity=f"{perplexity:.1f}",
        budgets=" | ".join(map(str, BUDGETS)), rule=" | ".join("---" for _ in BUDGETS),
    )  # fmt: skip


def line(bench: Bench, row: str, plans: list[Plan]) -> str:
    """A row of the table."""
    cells = [cell(bench, plans, budget) for budget in BUDGETS]
    print(found := f"| {row} | {' | '.join(cells)} |", flush=True)
    return found


def cell(bench: Bench, plans: list[Plan], budget: float) -> str:
    """The report perplexity of the plan that is best on the search part within the budget."""
    within = [plan for plan in plans if bench.bytes(plan) <= budget * bench.dense]
    if not within:
        return "-"
    best = min(within, key=lambda plan: bench.loss(plan, "search"))
    loss = bench.loss(best, "report")
    return f"{math.exp(loss):.1f} ({loss - bench.loss(Plan(()), 'report'):.3f})"


if __name__ == "__main__":
    main()
