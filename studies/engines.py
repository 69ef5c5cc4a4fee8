"""Compressed models in llama.cpp beside dense ones: the same text, the same perplexity, tokens a second.

    python studies/engines.py RUN [--threads 1]

RUN is a finished run of a study that treats MLPs by nystrom and leaves blocks out, such as one of smollm2-135m with
the methods svd-llm, lama, vo-svd, nystrom and drop-block. Rows "nystrom K" keep the share K of every MLP's neurons, in
multiples of 32, and leave out the one attention that the menu says is missed least. Rows "searched K" are the best
trial of the run with at most that share of the parameters of the blocks; its low ranks are multiplied out.

Each plan is written as GGUF, F16 and Q8_0, and so is the dense model. Perplexity is that of 96 tokens of the search
split, in llama.cpp and in transformers (bf16), of the same model. "Same text" is how many of the likeliest 24 tokens
after each of three prompts llama.cpp at F16 has in common with transformers, before they part. Speed: a prompt of 64
tokens, and 32 tokens after it, the compressed and the dense file in turns, five of them; ratios of processor time to
the dense file of the same type, medians with the interquartile range, smaller is faster. "transformers" is the same
of 32 tokens by `generate` in bf16. Finished rows are kept in studies/results/engines.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Cell, finish, has, read_cells, write_page

from rankfront.methods import Option
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.serve.llama_cpp import LlamaCpp, installed
from rankfront.search.serve.writing import write
from rankfront.search.splits import PROMPTS
from rankfront.search.study import Study

KEEPS, STEP = (0.8, 0.6), 32
ROWS = [f"{kind} {keep:g}" for kind in ("nystrom", "searched") for keep in KEEPS]
KINDS = ("F16", "Q8_0")
SAID, PROMPT, DECODE, TURNS, CHECKED = 24, 64, 32, 5, 96

PAGE = """# Exports in llama.cpp

SmolLM2-135M-Instruct, plans of one search. How is said at the top of `studies/engines.py`. Ratios are to the dense
model in the same engine, in processor time of one thread: smaller is faster. {engine}.

| plan | blocks keep | values of the plan | F16, MB | Q8_0, MB | perplexity, F16 | transformers | Q8_0 | same text |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{lines}

| plan | decode F16 | range | prompt | range | decode Q8_0 | range | prompt | range | transformers | range |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{speeds}

```
{source}
```
"""


class Bench:
    """The run's model, and its dense GGUF files."""

    def __init__(self, run: Path, folder: Path, threads: int) -> None:
        self.study, self.folder, self.threads = Study.open(run), folder, threads
        self.setup = self.study.setup()
        self.compressed = CompressedModel(self.setup)
        self.model: Any = self.compressed.model
        self.windows = self.setup.tokens["search"]
        outline = self.setup.outline
        self.prices = Prices(inside_blocks(outline.sites), outline.parameters, 2)  # bytes of a value in bf16
        self.dense = {kind: self.file("dense", kind) for kind in KINDS}

    def plan(self, name: str) -> Plan:
        """That of a row."""
        kind, _, keep = name.partition(" ")
        if kind == "searched":
            return self.study.read().best(f"block_parameters<={keep}").plan
        menu: Any = self.study.menu()
        halves = menu[(menu.method == "drop-block") & menu.site.str.contains("self_attn")]
        options = {str(halves.loc[halves.divergence.idxmin()].site): Option.of("drop-block")}
        for site in self.compressed.sites:
            if site.roles == ("gate", "up", "down"):
                neurons = STEP * round(float(keep) * site.anchor.in_features / STEP)
                options[site.name] = Option.of("nystrom", neurons=neurons)
        return Plan.of(options, self.setup.origin())

    def file(self, name: str, kind: str) -> Path:
        """The GGUF file of what the model runs now."""
        folder = self.folder / f"{name}-{kind}"
        if not folder.exists():
            write(self.model, "gguf", folder, kind, self.compressed.tokenizer, self.setup.source.gguf)
        return folder / "model.gguf"

    def engine(self, file: Path) -> LlamaCpp:
        return LlamaCpp(file, 512, self.threads)


def taken(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of ``work``, of all threads of this process, and what it returns."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def ratio(ours: list[float], dense: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(np.array(ours) / np.array(dense), [25, 50, 75])
    return {"ratio": float(middle), "range": float(high - low), "dense_ms": 1000 * float(np.median(dense))}


def speeds(bench: Bench, ours: LlamaCpp, dense: LlamaCpp) -> dict[str, dict[str, float]]:
    """Ratios of decoding and of prompts, in turns; prompts differ from turn to turn, so that nothing is cached."""
    seconds: dict[str, dict[bool, list[float]]] = {phase: {True: [], False: []} for phase in ("prompt", "decode")}
    for turn in range(TURNS + 1):
        ids = bench.windows[turn, :PROMPT].tolist()
        for mine, engine in ((True, ours), (False, dense)) if turn % 2 else ((False, dense), (True, ours)):
            prompt, _ = taken(partial(engine.complete, ids, 1, n_probs=0))
            decode, _ = taken(partial(engine.complete, ids, DECODE, n_probs=0, ignore_eos=True))
            if turn:
                seconds["prompt"][mine].append(prompt)
                seconds["decode"][mine].append(decode)
    return {phase: ratio(found[True], found[False]) for phase, found in seconds.items()}


def in_transformers(bench: Bench) -> dict[str, float]:
    """The ratio of decoding by `generate`, the plan and the dense model in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(TURNS + 1):
        ids = bench.windows[turn : turn + 1, :PROMPT]

        def work(ids: torch.Tensor = ids) -> Any:
            return bench.model.generate(ids, max_new_tokens=DECODE, min_new_tokens=DECODE, do_sample=False)

        ours, _ = taken(work)
        with bench.compressed.dense():
            dense, _ = taken(work)
        if turn:
            seconds[True].append(ours)
            seconds[False].append(dense)
    return ratio(seconds[True], seconds[False])


def parted(bench: Bench, engine: LlamaCpp) -> list[int]:
    """For each of the prompts, at which token the two likeliest continuations part; `SAID` where they do not."""
    found = []
    for prompt in PROMPTS[:3]:
        ids = bench.compressed.tokenizer(prompt).input_ids
        said = engine.greedy(ids, SAID)
        ours = bench.model.generate(torch.tensor([ids]), max_new_tokens=SAID, do_sample=False)[0, len(ids) :].tolist()
        same = [a == b for a, b in zip(ours, said, strict=False)]
        found.append(same.index(False) if False in same else SAID)
    return found


def measure(bench: Bench, name: str) -> Cell:
    """All of a row."""
    plan = bench.plan(name)
    bench.compressed.apply(plan)
    cost = bench.prices.of(plan)
    cell: Cell = {"row": name, "block_parameters": cost.block_parameters, "values": cost.values}
    cell |= {"bytes": {}, "dense_bytes": {}, "perplexity": {}, "speed": {}}
    for kind in KINDS:
        file = bench.file(name.replace(" ", "-"), kind)
        cell["bytes"][kind], cell["dense_bytes"][kind] = (each.stat().st_size for each in (file, bench.dense[kind]))
        engine = bench.engine(file)
        there, here, count = engine.perplexities(bench.model, bench.windows[:1, : CHECKED + 1])
        cell["perplexity"] |= {kind: there, "transformers": here, "tokens": count}
        if kind == "F16":
            cell["parted"] = parted(bench, engine)
        cell["speed"][kind] = speeds(bench, engine, bench.engine(bench.dense[kind]))
    cell["speed"]["transformers"] = in_transformers(bench)
    return cell


def table(cells: list[Cell]) -> list[str]:
    """A line for each plan: what it stores, and what it says."""
    lines = []
    for cell in cells:
        sizes = (f"{cell['bytes'][kind] / 1e6:.0f} of {cell['dense_bytes'][kind] / 1e6:.0f}" for kind in KINDS)
        found = (f"{cell['perplexity'][name]:.2f}" for name in ("F16", "transformers", "Q8_0"))
        parts = ", ".join(map(str, cell["parted"]))
        kept = (f"{cell['block_parameters']:.3f}", f"{cell['values']:,}")
        lines.append(f"| {' | '.join((cell['row'], *kept, *sizes, *found, parts))} |")
    return lines


def speed_table(cells: list[Cell]) -> str:
    """A line for each plan: ratios to dense, each with its range."""
    lines = []
    for cell in cells:
        speed = cell["speed"]
        found = [speed[kind][phase] for kind in KINDS for phase in ("decode", "prompt")] + [speed["transformers"]]
        ratios = (f"{each['ratio']:.3f} | {each['range']:.3f}" for each in found)
        lines.append(f"| {cell['row']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = RESULTS / "engines.jsonl"
    bench: Bench | None = None
    with tempfile.TemporaryDirectory() as folder:
        for row in arguments.rows.split(","):
            if not has(read_cells(file), {"row": row}):
                bench = bench or Bench(arguments.run, Path(folder), arguments.threads)
                finish(file, {"engine": installed(), **measure(bench, row)})
    page(sorted(read_cells(file), key=lambda cell: ROWS.index(cell["row"])))


def page(cells: list[Cell]) -> None:
    """Write the two tables."""
    write_page("engines", PAGE, table(cells), speeds=speed_table(cells), engine=cells[0]["engine"])


if __name__ == "__main__":
    main()
