"""Slices of one healed plan against plans of the same ranks that were healed by themselves, on smollm2-135m.

    python studies/heal_slices.py TEXT [--keeps 0.8,0.7,0.6] [--methods lod,fjord,factors] [--seeds 0,1] [--tokens 100k]
        [--threads 2]

The large plan is svd-llm at every site at 0.95 of its weights, healed end to end by each of ``methods``. It is cut to
the ranks that svd-llm has at each of ``keeps``, levels that nothing was trained at, and compared with the plan of these
ranks from the start, not healed (``raw``) and healed by ``factors`` on as many tokens (``apart``). Texts are those of
heal.py. Finished cells are kept in studies/results/heal_slices.jsonl: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence

import torch
from common import RESULTS, Cell, finish, read_cells, sources
from heal import Bench

from rankfront.objectives import score
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.inputs.model import load_model
from rankfront.search.output.sliced import narrow

LARGE, FAMILY = 0.95, "svd-llm"
RAW, APART = "raw", "apart"


def healed(bench: Bench, method: str, tokens: int, seed: int) -> float:
    """Heal what the bench's model runs; seconds."""
    teacher = load_model(bench.setup.source, "auto", bench.setup.device)
    folder = RESULTS / "runs" / f"healing-{os.getpid()}"
    settings, start = HealSettings(tokens, ("logits",), method, seed=seed), time.monotonic()
    Healing(bench.compressed.model, teacher, bench.windows, settings, Keeper(folder, {})).run()
    shutil.rmtree(folder)
    return time.monotonic() - start


def slices(text: str, keeps: Sequence[float], method: str, tokens: int, seed: int) -> Iterator[Cell]:
    """One healing, and a cell for each of its slices."""
    bench = Bench(text, FAMILY, LARGE, seed)
    bench.compressed.apply(bench.plan)
    seconds = healed(bench, method, tokens, seed)
    for keep in keeps:
        model, plan = copy.deepcopy(bench.compressed.model), Bench(text, FAMILY, keep, seed).plan
        for site in bench.compressed.sites:
            if site.name in plan.by_site:
                narrow(model, site, int(plan.by_site[site.name]["rank"]))
        losses = {name: score(model, windows).loss for name, windows in bench.texts.items()}
        yield {"keep": keep, "losses": losses, "seconds": seconds}


def by_itself(text: str, keep: float, tokens: int, seed: int, row: str) -> Cell:
    """The plan at ``keep``, not healed or healed at its own ranks."""
    bench = Bench(text, FAMILY, keep, seed)
    bench.compressed.apply(bench.plan)
    seconds = healed(bench, "factors", tokens, seed) if row == APART else 0.0
    return {"keep": keep, "losses": bench.losses(), "seconds": seconds}


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """Perplexities, and in brackets how much they are above those of the plan healed by itself."""
    yield "| keep | seed | tokens | row | wikitext | pydoc |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for cell in sorted(cells, key=lambda c: (-c["keep"], c["seed"], c["tokens"], c["row"])):
        key = {name: cell[name] for name in ("keep", "seed", "tokens")}
        apart = next((c for c in cells if key.items() <= c.items() and c["row"] == APART), cell)
        figures = [
            f"{math.exp(loss):.1f} ({math.expm1(loss - apart['losses'][text]):+.1%})"
            for text, loss in cell["losses"].items()
        ]
        yield f"| {cell['keep']:g} | {cell['seed']} | {cell['tokens']:,} | {cell['row']} | {' | '.join(figures)} |"


PAGE = """# Slices of a healed plan

SmolLM2-135M-Instruct, WikiText-2 validation text. Rows are said at the top of `studies/heal_slices.py`. Perplexities;
in brackets, relative to the plan of the same ranks that was healed by itself.

{tables}

Command: `python studies/heal_slices.py TEXT`

{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--keeps", default="0.8,0.7,0.6")
    parser.add_argument("--methods", default="lod,fjord,factors")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", default="100k")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file, tokens = RESULTS / "heal_slices.jsonl", parse_tokens(asked.tokens)
    keeps = [float(keep) for keep in asked.keeps.split(",")]

    def kept(key: Cell, found: Cell) -> None:
        cells = finish(file, key | found)
        made = sources(cells, lambda c: f"{c['row']} {c['keep']:g} {c['tokens']:,} seed {c['seed']}")
        (RESULTS / "heal_slices.md").write_text(PAGE.format(tables="\n".join(table(cells)), sources=made), "utf-8")

    for seed in map(int, asked.seeds.split(",")):
        for row in (RAW, APART, *asked.methods.split(",")):
            key = {"row": row, "tokens": tokens, "seed": seed}
            known = {cell["keep"] for cell in read_cells(file) if key.items() <= cell.items()}
            missing = [keep for keep in keeps if keep not in known]
            if row in (RAW, APART):
                for keep in missing:
                    kept(key, by_itself(asked.text, keep, tokens, seed, row))
            elif missing:
                for found in slices(asked.text, missing, row, tokens, seed):
                    kept(key, found)


if __name__ == "__main__":
    main()
