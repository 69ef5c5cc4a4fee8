"""What healing closes on smollm2-135m: log perplexity over dense before and after every stage, on two corpora.

    python studies/heal.py TEXT [--plans searched] [--keeps 0.8,0.6] [--rows logits] [--seeds 0,1] [--tokens 100k]
        [--threads 2]

TEXT is split as in search_benchmark.py: searched on its third quarter, healed on its first half, reported on its last
quarter; the second corpus is pydoc, which nothing reads before. The plan ``searched`` is what a search of 100,000
tokens over svd-llm, lama, vo-svd, nystrom and drop-block found best within a kept fraction of the block weights; the
name of a method is that method at every site, at that fraction, and `a+b` is each where it fits. Tokens are seen in
all, passes counted. Rows and plans with a comma or plus in their names are given as they are, separated by semicolons.
Rows "all at" a rate are of commits before factors beside a sparse one got a tenth of it, and cannot be run any more.
Finished cells are kept in studies/results/healing.jsonl, one line each, and never measured again: stop it at any time
and start it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, Cell, finish, has, read_cells, sources
from rich.console import Console
from search_benchmark import JOINT, settings

from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.choices import Stage
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.heal.trainable import RATES
from rankfront.search.inputs.model import load_model, load_tokenizer
from rankfront.search.inputs.text import cut
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.refit import refitted
from rankfront.search.splits import Split

LENGTH, HALF = 256, (0.0, 0.5)
SEARCH_TOKENS, CONTROL_WINDOWS = 100_000, 24
SEARCHED = "searched"
SCALE_RATE = RATES["scale"]
INTEGERS = "integers"  # in a row: the rate of scales of integers, times that of factors; 0 leaves them as they are
Stages = tuple[Literal["refit"] | Stage, ...]
ROWS: dict[str, tuple[Stages, Mapping[str, Any]]] = {  # row -> stages, and what it changes of `HealSettings`
    "logits": (("logits",), {}),
    "logits, rate 5e-4": (("logits",), {"rate": 5e-4}),
    "refit + logits": (("refit", "logits"), {}),
    "blocks + logits": (("blocks", "logits"), {}),
    "refit": (("refit",), {}),
    "blocks": (("blocks",), {}),
    "halves": (("blocks",), {"window": "half"}),
    "blocks, Fisher": (("blocks",), {"error": "fisher"}),
    "logits, cross-entropy": (("logits",), {"loss": "ce"}),
    "scales": (("logits",), {"method": "scales"}),
    "scales, rate 5e-3": (("logits",), {"method": "scales", "rate": 5e-3}),
    "scales, rate 2e-2": (("logits",), {"method": "scales", "rate": 2e-2}),
    **{f"logits, integers at {times:g}": (("logits",), {INTEGERS: times}) for times in (0, 1, 5, 20)},
    "lora": (("logits",), {"method": "lora"}),
    "stf": (("logits",), {"method": "stf"}),
    "trp": (("logits",), {"method": "trp"}),
}


class Bench:
    """A plan of one seed, and what models of it make of the texts."""

    def __init__(self, text: str, plan: str, keep: float, seed: int) -> None:
        searched = plan == SEARCHED
        overrides = {
            "space.methods": JOINT if searched else plan.split("+"),
            "search.seed": seed,
            "search.tokens": SEARCH_TOKENS,
            **({} if searched else {"space.keep": [keep]}),
        }
        given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        study = Study(settings(text, torch.get_num_threads()), RESULTS / "runs" / f"heal-{plan}-{seed}", given)
        if searched:
            study.launch(Console(quiet=True), report=False)
        self.study, self.setup = study, study.setup()
        self.compressed = CompressedModel(self.setup)
        self.plan = study.best(f"block_parameters<={keep}").plan if searched else self._uniform()
        tokenizer = load_tokenizer(self.setup.source)
        tokens = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        count = int(0.95 * HALF[1] * len(tokens)) // LENGTH
        self.windows = cut(tokenizer, {"heal": Split(text, count, HALF)}, LENGTH)["heal"]
        self.texts = {
            "wikitext": self.setup.tokens["report"],
            "pydoc": cut(tokenizer, {"control": Split("pydoc", CONTROL_WINDOWS)}, 512)["control"],
        }

    def _uniform(self) -> Plan:
        wanted = self.compressed.space.wanted()
        return Plan.of({site.name: options[0] for site, options in wanted.items() if options}, self.setup.origin())

    def losses(self) -> dict[str, float]:
        """Text -> nats a token."""
        return {name: score(self.compressed.model, windows).loss for name, windows in self.texts.items()}


def heal(model: Any, teacher: Any, windows: torch.Tensor, settings: HealSettings) -> Cell:
    """One stage; what a cell keeps of it. Its checkpoints go."""
    folder = RESULTS / "runs" / f"healing-{os.getpid()}"
    start = time.monotonic()
    (result,) = Healing(model, teacher, windows, settings, Keeper(folder, {})).run()
    seconds = time.monotonic() - start
    shutil.rmtree(folder)
    held_out = [result.before, result.after]
    return {"tokens": result.tokens, "seconds": seconds, "held_out": held_out, "note": result.note}


def measure(bench: Bench, row: str, tokens: int, seed: int) -> Cell:
    """One plan healed, looked at after every stage."""
    (first, *later), changed = ROWS[row]
    changed = dict(changed)
    RATES["scale"] = changed.pop(INTEGERS, SCALE_RATE)
    compressed, windows = bench.compressed, bench.windows
    teacher = load_model(bench.setup.source, "auto", bench.setup.device)
    dense = bench.losses()
    compressed.apply(bench.plan)
    seen: list[dict[str, Any]] = [{"stage": "before", "losses": bench.losses(), "tokens": 0, "seconds": 0.0}]
    start = time.monotonic()
    with refitted(compressed, bench.plan) if first == "refit" else nullcontext():
        if first == "refit":
            seen.append({"stage": first, "losses": bench.losses(), "tokens": 0, "seconds": time.monotonic() - start})
        stages: list[Stage] = [stage for stage in (first, *later) if stage != "refit"]
        for stage in stages:
            whole = HealSettings(tokens, tuple(stages), seed=seed, **changed)
            own = replace(
                whole, tokens=whole.budget(stage), stages=(stage,), rate=whole.rate_of(stage), batch=whole.step_tokens
            )
            result = heal(compressed.model, teacher, windows, own)
            seen.append({"stage": stage, "losses": bench.losses()} | result)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"dense": dense, "seen": seen, "memory": memory}


def closed(cell: Cell, place: int, text: str) -> float:
    """Share of the excess over dense before healing that is gone after a stage."""
    before, now = (cell["seen"][n]["losses"][text] - cell["dense"][text] for n in (0, place))
    return float(1 - now / before)


def table(cells: Sequence[Cell]) -> Iterator[str]:
    head = ["plan", "keep", "row", "seed", "tokens", "perplexity: dense", "before", "after", "closed"]
    head += ["pydoc: before", "after", "closed", "tokens/s", "peak GB"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    ordered = sorted(
        cells, key=lambda c: (c["plan"] != SEARCHED, c["plan"], -c["keep"], c["row"], c["tokens"], c["seed"])
    )
    for cell in ordered:
        last, first = cell["seen"][-1], cell["seen"][0]
        seconds = sum(stage["seconds"] for stage in cell["seen"] if stage["tokens"])
        by_stage = ", ".join(f"{closed(cell, n, 'wikitext'):.0%}" for n in range(1, len(cell["seen"])))
        entries = [
            cell["plan"], f"{cell['keep']:g}", cell["row"], str(cell["seed"]), f"{cell['tokens']:,}",
            f"{math.exp(cell['dense']['wikitext']):.1f}", f"{math.exp(first['losses']['wikitext']):.1f}",
            f"{math.exp(last['losses']['wikitext']):.1f}", by_stage,
            f"{math.exp(first['losses']['pydoc']):.1f}", f"{math.exp(last['losses']['pydoc']):.1f}",
            f"{closed(cell, -1, 'pydoc'):.0%}", f"{cell['tokens'] / seconds:,.0f}" if seconds else "-",
            f"{cell['memory'] / 1e9:.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(entries)} |"


PAGE = """# Healing

SmolLM2-135M-Instruct, WikiText-2 validation text; plans and rows are said at the top of `studies/heal.py`. "Closed" is
the share of the excess over dense, in log perplexity on the report part, that is gone after each stage, counted from
the plan before healing. Tokens a second include held-out evaluations, and other work ran on the same machine.

{tables}

Command: `python studies/heal.py TEXT --threads 1`

{sources}
"""


def write(cells: Sequence[Cell]) -> None:
    made = sources(cells, lambda c: f"{c['plan']} {c['row']} {c['keep']:g} {c['tokens']:,} seed {c['seed']}")
    page = PAGE.format(tables="\n".join(table(cells)), sources=made)
    (RESULTS / "healing.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--plans", default=SEARCHED)
    parser.add_argument("--keeps", default="0.8,0.6")
    parser.add_argument("--rows", default="logits")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", default="100k")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file, tokens = RESULTS / "healing.jsonl", parse_tokens(asked.tokens)
    keeps, seeds = map(float, asked.keeps.split(",")), map(int, asked.seeds.split(","))
    for plan, keep, row, seed in product(asked.plans.split(";"), keeps, asked.rows.split(";"), seeds):
        key = {"plan": plan, "keep": keep, "row": row, "tokens": tokens, "seed": seed}
        if not has(read_cells(file), key):
            write(finish(file, key | measure(Bench(asked.text, plan, keep, seed), row, tokens, seed)))


if __name__ == "__main__":
    main()
