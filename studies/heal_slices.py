"""Slices of one healed plan against plans of the same ranks that were healed by themselves, on smollm2-135m.

    python studies/heal_slices.py TEXT [--keeps 0.8,0.7,0.6] [--methods lod,fjord,factors] [--seeds 0,1] [--tokens 100k]
        [--rate 1e-4] [--threads 2]

The large plan is svd-llm at every site at 0.95 of its weights, healed end to end by each of ``methods``. It is cut to
the ranks that svd-llm has at each of ``keeps``, levels that nothing was trained at, and compared with the plan of these
ranks from the start, not healed (``raw``) and healed by ``factors`` on as many tokens (``apart``). Rows "by worth" are
of the same size each, and have the ranks that the Fisher quadratic gives it, as `rankfront slice` does: they are
compared with the large plan cut so before healing, not after. Texts are those of heal.py; of its windows a hundredth is
held out. A plan that is alike at every site gains nothing by twenty thousand tokens at the default rate of 1e-3.
Finished cells are kept in studies/results/heal_slices.jsonl: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from common import RESULTS, Cell, finish, read_cells, sources
from heal import Bench

from rankfront.methods import get_method, undo_prepack
from rankfront.objectives import score
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.heal.worth import widths_at
from rankfront.search.inputs.model import load_model
from rankfront.search.measure.joining import separate
from rankfront.search.output.sliced import narrow

LARGE, FAMILY = 0.95, "svd-llm"
RAW, APART, BY_WORTH = "raw", "apart", ", by worth"
HELD_OUT = 0.01  # of the windows


def healed(bench: Bench, method: str, tokens: int, rate: float, seed: int) -> float:
    """Heal what the bench's model runs; seconds."""
    teacher = load_model(bench.setup.source, "auto", bench.setup.device)
    folder = RESULTS / "runs" / f"healing-{os.getpid()}"
    settings = HealSettings(tokens, ("logits",), method, rate=rate, seed=seed, held_out=HELD_OUT)
    start = time.monotonic()
    Healing(bench.compressed.model, teacher, bench.windows, settings, Keeper(folder, {})).run()
    shutil.rmtree(folder)
    return time.monotonic() - start


def large(text: str, seed: int) -> Bench:
    """The bench whose model runs the large plan, every factor by itself."""
    bench = Bench(text, FAMILY, LARGE, seed)
    bench.compressed.apply(bench.plan)
    undo_prepack(bench.compressed.model)
    separate(bench.compressed.model.modules())
    return bench


def cut(bench: Bench, model: Any, text: str, keep: float, seed: int, by_worth: bool) -> None:
    """Narrow ``model``, which runs the large plan, to the ranks of the plan at ``keep``, or to as many by worth."""
    sites, small = bench.compressed.sites, Bench(text, FAMILY, keep, seed).plan
    treated = [site for site in sites if site.name in small.by_site]
    ranks = [int(small.by_site[site.name]["rank"]) for site in treated]
    if by_worth:
        modules = [[model.get_submodule(p) for weight in s.weights for p in weight.paths] for s in treated]
        values, wanted = (
            sum(get_method(FAMILY).storage(site, plan.by_site[site.name]).parameters for site in treated)
            for plan in (bench.plan, small)
        )
        (ranks,) = widths_at(model, modules, bench.windows, [wanted / values], seed)
    for site, rank in zip(treated, ranks, strict=True):
        narrow(model, site, rank)


def slices(text: str, keeps: Sequence[float], method: str, tokens: int, rate: float, seed: int) -> Iterator[Cell]:
    """One healing, and a cell for each of its slices."""
    bench = large(text, seed)
    seconds = healed(bench, method, tokens, rate, seed)
    for keep, ending in product(keeps, ("", BY_WORTH)):
        model = copy.deepcopy(bench.compressed.model)
        cut(bench, model, text, keep, seed, bool(ending))
        losses = {name: score(model, windows).loss for name, windows in bench.texts.items()}
        yield {"row": method + ending, "keep": keep, "losses": losses, "seconds": seconds}


def by_itself(text: str, keep: float, tokens: int, rate: float, seed: int, row: str) -> Cell:
    """The plan at ``keep``, not healed or healed at its own ranks."""
    bench = large(text, seed)
    cut(bench, bench.compressed.model, text, keep, seed, row.endswith(BY_WORTH))
    seconds = healed(bench, "factors", tokens, rate, seed) if row.startswith(APART) else 0.0
    return {"row": row, "keep": keep, "losses": bench.losses(), "seconds": seconds}


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """Perplexities, and in brackets how much they are above those of the same ranks, or as many, healed apart."""
    yield "| keep | seed | tokens | rate | row | wikitext | pydoc |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for cell in sorted(cells, key=lambda c: (-c["keep"], c["seed"], c["tokens"], c["rate"], c["row"])):
        key = {name: cell[name] for name in ("keep", "seed", "tokens", "rate")}
        key["row"] = APART + (BY_WORTH if cell["row"].endswith(BY_WORTH) else "")
        apart = next((c for c in cells if key.items() <= c.items()), cell)
        figures = [
            f"{math.exp(loss):.1f} ({math.expm1(loss - apart['losses'][text]):+.1%})"
            for text, loss in cell["losses"].items()
        ]
        settings = f"{cell['seed']} | {cell['tokens']:,} | {cell['rate']:g} | {cell['row']}"
        yield f"| {cell['keep']:g} | {settings} | {' | '.join(figures)} |"


PAGE = """# Slices of a healed plan

SmolLM2-135M-Instruct, WikiText-2 validation text. Rows are said at the top of `studies/heal_slices.py`. Perplexities;
in brackets, relative to the plan that was cut in the same way before healing and healed by itself.

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
    parser.add_argument("--rate", type=float, default=1e-4)
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
        for row in (RAW, APART, *asked.methods.split(","), RAW + BY_WORTH, APART + BY_WORTH):
            key = {"row": row, "tokens": tokens, "rate": asked.rate, "seed": seed}
            known = {cell["keep"] for cell in read_cells(file) if key.items() <= cell.items()}
            missing = [keep for keep in keeps if keep not in known]
            if row.startswith((RAW, APART)):
                for keep in missing:
                    kept(key, by_itself(asked.text, keep, tokens, asked.rate, seed, row))
            elif missing:
                for found in slices(asked.text, missing, row, tokens, asked.rate, seed):
                    kept(key, found)


if __name__ == "__main__":
    main()
