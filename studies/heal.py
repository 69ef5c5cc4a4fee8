"""What healing closes on smollm2-135m: log perplexity over dense before and after every stage, on two corpora.

    python studies/heal.py TEXT [--keeps 0.8,0.6] [--seeds 0,1] [--rows a,b] [--tokens 300k] [--threads 2]

TEXT is split as in search_benchmark.py: searched on its third quarter, healed on its first half, reported on its last
quarter; the second corpus is pydoc, which nothing reads before. Plans are those that a search of 100,000 tokens over
svd-llm, lama, vo-svd, nystrom and drop-block found best within each kept fraction of the block weights. Tokens are
seen in all, passes counted. Finished cells are kept in studies/results/healing.jsonl, one line each, and never
measured again: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cell, keep_cells, provenance, read_cells, sources
from rich.console import Console
from search_benchmark import JOINT, settings

from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.choices import Stage
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.inputs.model import load_model, load_tokenizer
from rankfront.search.inputs.text import cut
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.refit import refitted
from rankfront.search.splits import Split

LENGTH, HALF = 512, (0.0, 0.5)
SEARCH_TOKENS, CONTROL_WINDOWS = 100_000, 24
BOTH: tuple[Stage, ...] = ("blocks", "logits")
ROWS: dict[str, tuple[tuple[Stage, ...], Mapping[str, Any]]] = {  # row -> stages, each with its share of the tokens
    "blocks, logits": (BOTH, {}),
    "halves, logits": (BOTH, {"window": "half"}),
    "blocks": (("blocks",), {}),
    "logits": (("logits",), {}),
    "logits, cross-entropy": (("logits",), {"loss": "ce"}),
    "scales": (BOTH, {"method": "scales"}),
    "lora": (BOTH, {"method": "lora"}),
}


class Bench:
    """The plans of one seed, and what models of them make of the texts."""

    def __init__(self, text: str, seed: int) -> None:
        overrides = {"space.methods": JOINT, "search.seed": seed, "search.tokens": SEARCH_TOKENS}
        given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        self.study = Study(settings(text, torch.get_num_threads()), RESULTS / "runs" / f"heal-{seed}", given)
        self.study.launch(Console(quiet=True), report=False)
        self.setup = self.study.setup()
        tokenizer = load_tokenizer(self.setup.source)
        count = int(0.95 * 0.5 * self._tokens(tokenizer, text)) // LENGTH
        self.windows = cut(tokenizer, {"heal": Split(text, count, HALF)}, LENGTH)["heal"]
        self.texts = {
            "wikitext": self.setup.tokens["report"],
            "pydoc": cut(tokenizer, {"control": Split("pydoc", CONTROL_WINDOWS)}, LENGTH)["control"],
        }

    @staticmethod
    def _tokens(tokenizer: Any, text: str) -> int:
        return len(tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])

    def losses(self, model: Any) -> dict[str, float]:
        """Text -> nats a token."""
        return {name: score(model, windows).loss for name, windows in self.texts.items()}

    def plan(self, keep: float) -> Plan:
        return self.study.best(f"block_parameters<={keep}").plan


def measure(bench: Bench, keep: float, row: str, tokens: int, seed: int) -> Cell:
    """One plan healed, looked at after every stage."""
    stages, changed = ROWS[row]
    compressed = CompressedModel(bench.setup)
    teacher = load_model(bench.setup.source, "auto", bench.setup.device)
    dense = bench.losses(compressed.model)
    plan = bench.plan(keep)
    with refitted(compressed, plan):
        refit = bench.losses(compressed.model)
    compressed.apply(plan)
    seen = [{"stage": "before", "losses": bench.losses(compressed.model), "tokens": 0, "seconds": 0.0}]
    whole = HealSettings(tokens, stages, seed=seed, **changed)
    for stage in stages:
        asked = HealSettings(
            whole.budget(stage), (stage,), seed=seed, rate=whole.rate_of(stage), batch=whole.step_tokens, **changed
        )
        folder = RESULTS / "runs" / "healing"
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        (result,) = Healing(compressed.model, teacher, bench.windows, asked, Keeper(folder, {})).run()
        seconds = time.monotonic() - start
        found = {"stage": stage, "losses": bench.losses(compressed.model), "tokens": result.tokens, "seconds": seconds}
        seen.append(found | {"held_out": [result.before, result.after], "note": result.note})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "keep": keep, "row": row, "tokens": tokens, "seed": seed, "dense": dense, "refit": refit, "seen": seen,
        "memory": memory,
    }  # fmt: skip


def closed(cell: Cell, place: int, text: str) -> float:
    """Share of the excess over dense before healing that is gone after a stage."""
    before, now = (cell["seen"][n]["losses"][text] - cell["dense"][text] for n in (0, place))
    return float(1 - now / before)


def table(cells: Sequence[Cell]) -> Iterator[str]:
    head = ["keep", "row", "seed", "tokens", "perplexity: dense", "before", "refitted", "after", "closed"]
    head += ["pydoc: before", "after", "closed", "tokens/s", "peak GB"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for cell in sorted(cells, key=lambda c: (-c["keep"], list(ROWS).index(c["row"]), c["tokens"], c["seed"])):
        last, first = cell["seen"][-1], cell["seen"][0]
        seconds = sum(stage["seconds"] for stage in cell["seen"])
        by_stage = " + ".join(f"{closed(cell, n, 'wikitext'):.0%}" for n in range(1, len(cell["seen"])))
        entries = [
            f"{cell['keep']:g}", cell["row"], str(cell["seed"]), f"{cell['tokens']:,}",
            f"{math.exp(cell['dense']['wikitext']):.1f}", f"{math.exp(first['losses']['wikitext']):.1f}",
            f"{math.exp(cell['refit']['wikitext']):.1f}", f"{math.exp(last['losses']['wikitext']):.1f}", by_stage,
            f"{math.exp(first['losses']['pydoc']):.1f}", f"{math.exp(last['losses']['pydoc']):.1f}",
            f"{closed(cell, -1, 'pydoc'):.0%}", f"{cell['tokens'] / seconds:,.0f}", f"{cell['memory'] / 1e9:.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(entries)} |"


PAGE = """# Healing

SmolLM2-135M-Instruct, WikiText-2 validation text, plans of a search over svd-llm, lama, vo-svd, nystrom and drop-block;
how is said at the top of `studies/heal.py`. "Closed" is the share of the excess over dense, in log perplexity on the
report part, that is gone: after each stage, counted from the plan before healing.

{tables}

Command: `python studies/heal.py TEXT`

{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--keeps", default="0.8,0.6")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rows", default=",".join(["blocks, logits"]).replace(", ", ";"))
    parser.add_argument("--tokens", default="300k")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file, tokens = RESULTS / "healing.jsonl", parse_tokens(asked.tokens)
    cells = read_cells(file)
    rows = [row.replace(";", ", ") for row in asked.rows.split(",")]
    for seed, row, keep in product(map(int, asked.seeds.split(",")), rows, map(float, asked.keeps.split(","))):
        key = {"keep": keep, "row": row, "tokens": tokens, "seed": seed}
        if not any(key.items() <= cell.items() for cell in cells):
            cell = measure(Bench(asked.text, seed), keep, row, tokens, seed) | {"from": provenance()}
            cells.append(cell)
            keep_cells(file, [cell])
            made = sources(cells, lambda c: f"{c['row']} {c['keep']:g} {c['tokens']:,} seed {c['seed']}")
            page = PAGE.format(tables="\n".join(table(cells)), sources=made)
            (RESULTS / "healing.md").write_text(page, encoding="utf-8")
            print(json.dumps({k: v for k, v in cell.items() if k != "from"}), flush=True)


if __name__ == "__main__":
    main()
