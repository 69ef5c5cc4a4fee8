"""Compressed models in llama.cpp and OpenVINO beside dense ones: the same text and perplexity, tokens a second.

    python studies/engines.py RUN [--engine openvino] [--threads 1]

RUN is a finished run of a study that treats MLPs by nystrom and leaves blocks out, such as one of smollm2-135m with
the methods svd-llm, lama, vo-svd, nystrom and drop-block. Rows "nystrom K" keep the share K of every MLP's neurons, in
multiples of 32, and leave out the one attention that the menu says is missed least. Rows "searched K" are the best
trial of the run with at most that share of the parameters of the blocks; llama.cpp has its low ranks multiplied out.
Rows "svd-llm K" treat every linear layer by svd-llm at K, for OpenVINO.

Each plan is written as GGUF, F16 and Q8_0, and so is the dense model. Perplexity is that of 96 tokens of the search
split, in llama.cpp and in transformers (bf16), of the same model. "Same text" is how many of the likeliest 24 tokens
after each of three prompts llama.cpp at F16 has in common with transformers, before they part. Speed: a prompt of 64
tokens, and 32 tokens after it, the compressed and the dense file in turns, five of them; ratios of processor time to
the dense file of the same type, medians with the interquartile range, smaller is faster. "transformers" is the same
of 32 tokens by `generate` in bf16. Finished rows are kept in studies/results/engines.jsonl.

In OpenVINO, text and perplexity are those in fp32, of 16-bit weights, beside transformers in fp32. Speed is that of
`openvino_genai.LLMPipeline` without its paged attention, which would cache prompts; it computes in bf16 where the CPU
does, and keeps its cache in 8 bits. A prompt and one token, and 32 tokens more.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Cell, finish, has, read_cells, sources, write_page

from rankfront.methods import Option
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.plans.space import Anchor, Space
from rankfront.search.serve import llama_cpp, openvino_engine
from rankfront.search.serve.llama_cpp import LlamaCpp
from rankfront.search.serve.openvino_engine import OpenVino
from rankfront.search.serve.writing import write
from rankfront.search.splits import PROMPTS
from rankfront.search.study import Study

KEEPS, STEP = (0.8, 0.6), 32
ROWS = [f"{kind} {keep:g}" for kind in ("nystrom", "searched") for keep in KEEPS]
LOW_RANK = [f"svd-llm {keep:g}" for keep in KEEPS]
KINDS = ("F16", "Q8_0")
SAID, PROMPT, DECODE, TURNS, CHECKED = 24, 64, 32, 5, 96

PAGE = """# Exports in engines

SmolLM2-135M-Instruct, plans of one search. How is said at the top of `studies/engines.py`. Ratios are to the dense
model in the same engine, in processor time of one thread: smaller is faster.

## {engine}

| plan | blocks keep | values of the plan | F16, MB | Q8_0, MB | perplexity, F16 | transformers | Q8_0 | same text |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{lines}

| plan | decode F16 | range | prompt | range | decode Q8_0 | range | prompt | range | transformers | range |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{speeds}

## {graphs}

| plan | blocks keep | values of the plan | file, MB | perplexity | transformers | same text |
| --- | --- | --- | --- | --- | --- | --- |
{in_graphs}

| plan | decode | range | prompt | range | decode in transformers | range |
| --- | --- | --- | --- | --- | --- | --- |
{graph_speeds}

## Sources

{sources}
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

    def plan(self, name: str) -> Plan:
        """That of a row."""
        kind, _, keep = name.partition(" ")
        if kind == "svd-llm":
            space = Space(self.compressed.sites, self.setup.config.space, 0)
            return space.decode(space.anchor_parameters(Anchor(kind, float(keep))), self.setup.origin())
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

    def dense_file(self, kind: str) -> Path:
        """That of the dense model."""
        with self.compressed.dense():
            return self.file("dense", kind)

    def graph(self, name: str) -> Path:
        """The folder for OpenVINO of what the model runs now."""
        folder = self.folder / name
        if not folder.exists():
            write(self.model, "openvino", folder, tokenizer=self.compressed.tokenizer)
        return folder

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


def speeds(
    bench: Bench, ours: Any, dense: Any, timed: Callable[[Any, list[int]], tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Ratios of prompts and of decoding, as ``timed`` in this order, in turns; prompts differ from turn to turn, so
    that nothing is cached."""
    seconds: dict[str, dict[bool, list[float]]] = {phase: {True: [], False: []} for phase in ("prompt", "decode")}
    for turn in range(TURNS + 1):
        ids = bench.windows[turn, :PROMPT].tolist()
        for mine, engine in ((True, ours), (False, dense)) if turn % 2 else ((False, dense), (True, ours)):
            prompt, decode = timed(engine, ids)
            if turn:
                seconds["prompt"][mine].append(prompt)
                seconds["decode"][mine].append(decode)
    return {phase: ratio(found[True], found[False]) for phase, found in seconds.items()}


def in_llama_cpp(engine: LlamaCpp, ids: list[int]) -> tuple[float, float]:
    """Seconds of a prompt and of decoding after it, the prompt cached."""
    prompt, _ = taken(partial(engine.complete, ids, 1, n_probs=0))
    decode, _ = taken(partial(engine.complete, ids, DECODE, n_probs=0, ignore_eos=True))
    return prompt, decode


def in_genai(pipeline: Any, ids: list[int]) -> tuple[float, float]:
    """Seconds of a prompt and its first token, and of decoding more."""
    genai, openvino = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
    mask = openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
    given = genai.TokenizedInputs(openvino.Tensor(np.array([ids])), mask)

    def said(count: int) -> float:
        settings = genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = count, True
        return taken(lambda: pipeline.generate(given, settings))[0]

    prompt = said(1)
    return prompt, said(1 + DECODE) - prompt


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


def parted(bench: Bench, engine: LlamaCpp | OpenVino, model: Any) -> list[int]:
    """For each of the prompts, at which token the two likeliest continuations part; `SAID` where they do not."""
    found = []
    for prompt in PROMPTS[:3]:
        ids = bench.compressed.tokenizer(prompt).input_ids
        said = engine.greedy(ids, SAID)
        ours = model.generate(torch.tensor([ids]), max_new_tokens=SAID, do_sample=False)[0, len(ids) :].tolist()
        same = [a == b for a, b in zip(ours, said, strict=False)]
        found.append(same.index(False) if False in same else SAID)
    return found


def begun(bench: Bench, name: str) -> Cell:
    """A row whose plan the model runs now, as far as the plan decides it."""
    plan = bench.plan(name)
    bench.compressed.apply(plan)
    cost = bench.prices.of(plan)
    return {"row": name, "block_parameters": cost.block_parameters, "values": cost.values}


def measure(bench: Bench, name: str) -> Cell:
    """All of a row in llama.cpp."""
    cell = begun(bench, name) | {"engine": llama_cpp.installed()}
    cell |= {"bytes": {}, "dense_bytes": {}, "perplexity": {}, "speed": {}}
    for kind in KINDS:
        file = bench.file(name.replace(" ", "-"), kind)
        dense = bench.dense_file(kind)
        cell["bytes"][kind], cell["dense_bytes"][kind] = (each.stat().st_size for each in (file, dense))
        engine = bench.engine(file)
        there, here, count = engine.perplexities(bench.model, bench.windows[:1, : CHECKED + 1])
        cell["perplexity"] |= {kind: there, "transformers": here, "tokens": count}
        if kind == "F16":
            cell["parted"] = parted(bench, engine, bench.model)
        cell["speed"][kind] = speeds(bench, engine, bench.engine(dense), in_llama_cpp)
    cell["speed"]["transformers"] = in_transformers(bench)
    return cell


def measure_graph(bench: Bench, name: str) -> Cell:
    """All of a row in OpenVINO."""
    cell = begun(bench, name) | {"engine": openvino_engine.installed()}
    with bench.compressed.dense():
        dense = bench.graph("dense-graph")
    folder = bench.graph(f"{name.replace(' ', '-')}-graph")
    for key, each in (("bytes", folder), ("dense_bytes", dense)):
        cell[key] = sum(file.stat().st_size for file in each.glob("openvino_model.*"))
    exact = copy.deepcopy(bench.model).float()
    engine = OpenVino(folder, bench.threads)
    there, here = engine.perplexities(exact, bench.windows[:1, : CHECKED + 1])
    cell["perplexity"] = {"openvino": there, "transformers": here, "tokens": CHECKED}
    cell["parted"] = parted(bench, engine, exact)
    del exact, engine
    pipeline = importlib.import_module("openvino_genai").LLMPipeline
    settings: dict[str, Any] = {"ATTENTION_BACKEND": "SDPA"}
    settings["INFERENCE_NUM_THREADS"] = bench.threads
    ours, theirs = (pipeline(str(each), "CPU", **settings) for each in (folder, dense))
    cell["speed"] = {"openvino": speeds(bench, ours, theirs, in_genai), "transformers": in_transformers(bench)}
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


def graph_table(cells: list[Cell]) -> str:
    """A line for each plan in OpenVINO: what it stores, and what it says."""
    lines = []
    for cell in cells:
        size = f"{cell['bytes'] / 1e6:.0f} of {cell['dense_bytes'] / 1e6:.0f}"
        found = (f"{cell['perplexity'][name]:.2f}" for name in ("openvino", "transformers"))
        kept = (f"{cell['block_parameters']:.3f}", f"{cell['values']:,}", size)
        lines.append(f"| {' | '.join((cell['row'], *kept, *found, ', '.join(map(str, cell['parted']))))} |")
    return "\n".join(lines)


def graph_speeds(cells: list[Cell]) -> str:
    """A line for each plan in OpenVINO: ratios to dense, each with its range."""
    lines = []
    for cell in cells:
        speed = cell["speed"]
        found = [*(speed["openvino"][phase] for phase in ("decode", "prompt")), speed["transformers"]]
        ratios = (f"{each['ratio']:.3f} | {each['range']:.3f}" for each in found)
        lines.append(f"| {cell['row']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), default="llama.cpp")
    parser.add_argument("--rows", help="separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = RESULTS / "engines.jsonl"
    rows, measured = ENGINES[arguments.engine]
    bench: Bench | None = None
    with tempfile.TemporaryDirectory() as folder:
        for row in arguments.rows.split(",") if arguments.rows else rows:
            if not has(of_engine(read_cells(file), arguments.engine), {"row": row}):
                bench = bench or Bench(arguments.run, Path(folder), arguments.threads)
                finish(file, measured(bench, row))
    page(read_cells(file))


# Engine -> its rows, and what measures one.
ENGINES: dict[str, tuple[list[str], Callable[[Bench, str], Cell]]] = {
    "llama.cpp": (ROWS, measure),
    "openvino": ([*ROWS, *LOW_RANK], measure_graph),
}


def of_engine(cells: list[Cell], engine: str) -> list[Cell]:
    """Those of ``cells`` that ran there, in the order of its rows."""
    rows, graphs = ENGINES[engine][0], engine == "openvino"
    own = [cell for cell in cells if cell["engine"].startswith("openvino") == graphs]
    return sorted(own, key=lambda cell: rows.index(cell["row"]))


def page(cells: list[Cell]) -> None:
    """Write the tables."""
    files, graphs = (of_engine(cells, engine) for engine in ENGINES)
    fields = {"engine": files[0]["engine"], "speeds": speed_table(files), "graphs": graphs[0]["engine"]}
    fields |= {"in_graphs": graph_table(graphs), "graph_speeds": graph_speeds(graphs)}
    write_page("engines", PAGE, table(files), **fields, sources=sources(cells, lambda cell: cell["row"]))


if __name__ == "__main__":
    main()
