"""Models by size: seconds and memory of calibration and preparation, and what a launch says that it takes.

    python studies/large.py [--models 135m,1.1b] [--what forward,gram,...]

One thread, in bf16, in a process of its own for each cell; seconds are those of its processor. "135m" is SmolLM2-135M,
whose weights are fp32 on disk; "1.1b" is the random Llama of studies/latency.py, saved in bf16. Of each, on random
tokens: a forward pass; calibration with Grams (`svd-llm`) and with gradients too (`kfac-svd`), of all linear layers of
the blocks; `svd-llm` of the layers of two blocks in the middle. "launch" is a study: `svd-llm` at one level on the
layers of the first blocks, two trials and an export, under the memory that is there, and with none to spare
("launch, mapped"): what is said before it, and the most that the process held. That is its anonymous memory and two
blocks of mapped weights. Larger models are reckoned: time by multiply-adds, memory by the launch's own formula.
Finished cells are kept in studies/results/large.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cell, finish, has, read_cells, sources
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from rankfront.methods import Grid, Site, get_method
from rankfront.search.config import make_config
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs import memory
from rankfront.search.inputs.model import load_model, load_tokenizer
from rankfront.search.inputs.outline import outline_of
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites, weights_at
from rankfront.search.inputs.source import cache_folder
from rankfront.search.measure.footprint import Footprint, footprint_of
from rankfront.search.quantities import said_bytes, said_time
from rankfront.search.study import Study

WINDOWS, LENGTH = {"135m": 4, "1.1b": 2}, 512
SAMPLED = 2  # blocks that are factored
SHAPES: Mapping[str, tuple[int, int, int, int, int, int]] = {  # width, MLP, blocks, heads, of keys, vocabulary
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}
NEEDS = {"gram": frozenset({"gram"}), "gradient": frozenset({"gram", "gradient"})}


def llama(name: str) -> LlamaConfig:
    """The configuration of one of `SHAPES`."""
    width, inner, blocks, heads, keys, vocabulary = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip


def located(name: str) -> str:
    """What a study names: the bundled model, or a folder with random weights, which is made once."""
    if name == "135m":
        return "smollm2-135m"
    folder = cache_folder() / f"random-llama-{name}"
    if not folder.is_dir():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(llama(name)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        load_tokenizer(resolve("smollm2-135m")).save_pretrained(folder)
    return str(folder)


def held() -> int:
    """Bytes that this process holds and has not mapped from files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[Callable[[], tuple[float, int]]]:
    """Gives a function of the processor's seconds since, and of the most bytes held."""
    started, peak, stop = time.process_time(), [held()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: (time.process_time() - started, max(peak[0], held()))
    finally:
        stop.set()
        thread.join()


def single(model: Any) -> list[Site]:
    """The linear layers of the blocks."""
    return [site for site, place in find_sites(model).items() if len(site.weights) == 1 and place.block is not None]


def windows(name: str) -> torch.Tensor:
    """Random tokens (W, LENGTH), of those that every model has."""
    return torch.randint(1000, 30000, (WINDOWS[name], LENGTH), generator=torch.Generator().manual_seed(0))


def measured(name: str, what: str) -> Cell:
    """Seconds and bytes of one thing."""
    torch.set_num_threads(1)
    if what.startswith("launch"):
        return launched(name, spare=what == "launch")
    model = load_model(resolve(located(name)), torch.bfloat16, "cpu")
    sites, ids = single(model), windows(name)
    with torch.inference_mode():
        model(input_ids=ids[:1], use_cache=False)  # reads the weights
    with watched() as so_far:
        if what == "forward":
            with torch.inference_mode():
                for batch in ids.split(4):
                    model(input_ids=batch, use_cache=False)
        elif what == "svd-llm":
            return factored(model, sites, ids, so_far)
        else:
            for _ in calibrate(model, ids, sites, NEEDS[what], lambda done, total: None):
                pass
        seconds, most = so_far()
    return {"seconds": seconds, "held": most, "tokens": ids.numel()}


def factored(model: Any, sites: list[Site], ids: torch.Tensor, so_far: Callable[[], tuple[float, int]]) -> Cell:
    """Of all blocks, from `SAMPLED` ones."""
    blocks = len({site.name.split(".")[2] for site in sites})
    middle = [f"model.layers.{blocks // 2 + number}." for number in range(SAMPLED)]
    chosen = [site for site in sites if site.name.startswith(tuple(middle))]
    method, spent = get_method("svd-llm"), 0.0
    for site, statistics in calibrate(model, ids[:1], chosen, NEEDS["gram"], lambda done, total: None):
        before, _ = so_far()
        options = list(method.options(site, Grid((0.5,), 8)).values())
        method.prepare(site, weights_at(model, site), statistics, options)
        spent += so_far()[0] - before
    return {"seconds": spent * blocks / SAMPLED, "held": so_far()[1]}


def launched(name: str, spare: bool) -> Cell:
    """What is said that a study takes, and what it held."""
    if not spare:
        memory.AMPLE = 0.0
    first = f"model.layers.[0-{1 if name == '1.1b' else 5}].*"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        words = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "be")  # all models'
        text.write_text(" ".join(words[i * i % 11] + " " + words[i % 13] for i in range(4000)), encoding="utf-8")
        split = {"text": str(text), "windows": 2}
        study = Study(
            {
                "model": {"name": located(name), "dtype": "bfloat16", "device": "cpu"},
                "data": {"length": LENGTH // 2, **dict.fromkeys(("calibrate", "search", "report", "control"), split)},
                "space": {"methods": ["svd-llm"], "keep": [0.5], "include": [first], "allow_partial": True},
                "objectives": {"perplexity": {}, "parameters": {}},
                "search": {"trials": 2, "workers": 0, "resources": {"cpu": 1}},
            },
            Path(folder) / "run",
        )
        console = Console(file=io.StringIO(), width=200)
        with watched() as so_far:
            study.launch(console, rebuild=True)  # whatever the cache has
            study.export(Path(folder) / "out", study.trial(1))
            seconds, most = so_far()
        takes = footprint_of(study.setup())
        mapped = 2 * takes.in_blocks / takes.blocks if takes.held < takes.weights else 0.0
        said = re.search(r"about (.*) of memory", console.file.getvalue())  # type: ignore[attr-defined]
        return {
            "seconds": seconds, "held": most + mapped, "reckoned": takes.peak.bytes, "phase": takes.peak.name,
            "said": said[1] if said else None,
        }  # fmt: skip


def default_footprint(name: str) -> Footprint:
    """Of a study of a model by its shapes alone, with the methods and levels that are default and a text."""
    with tempfile.TemporaryDirectory() as folder:
        llama(name).save_pretrained(folder)
        split = {"text": "text.txt", "windows": 64}
        config = make_config(
            {
                "model": {"name": folder},
                "data": {"length": LENGTH, **dict.fromkeys(("calibrate", "search", "report", "control"), split)},
                "objectives": {"perplexity": {}, "parameters": {}},
            }
        )
        return Footprint(outline_of(resolve(folder)), config, torch.bfloat16, torch.device("cpu"), False)


def work(name: str) -> dict[str, float]:
    """Multiply-adds: of a token in a forward pass and in what calibration adds, and of all factorisations."""
    width, inner, blocks, heads, keys, vocabulary = SHAPES[name]
    narrow = width * keys // heads
    linears = [(width, width)] * 2 + [(narrow, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    grams = blocks * (3 * width**2 + inner**2)
    gradients = blocks * 0.75 * sum(m * m for m, _ in linears)  # of three quarters of the tokens
    forward = blocks * sum(m * n for m, n in linears)
    factoring = blocks * sum(m * n * n + m * n * min(m, n) + 20 * min(m, n) ** 3 for m, n in linears)
    return {
        "forward": forward + vocabulary * width, "gram": grams, "gradient": forward + gradients, "svd-llm": factoring,
    }  # fmt: skip


def seconds(name: str, what: str, cells: Mapping[tuple[str, str], Cell]) -> float:
    """Of 1,000 tokens, or of all factorisations, as measured; of models too large for that, what the largest measured
    one took, by `work`."""
    if (name, what) in cells:
        cell = cells[name, what]
        return float(cell["seconds"]) * 1000 / int(cell.get("tokens", 1000))
    base = next(known for known in reversed(list(SHAPES)) if (known, what) in cells)
    ours, theirs = work(name), work(base)
    below = {"gram": "forward", "gradient": "gram"}.get(what)  # which it runs too
    if below is None:
        return seconds(base, what, cells) * ours[what] / theirs[what]
    added = seconds(base, what, cells) - seconds(base, below, cells)
    return seconds(name, below, cells) + added * ours[what] / theirs[what]


PAGE = """# Models by size

How each figure is made is said at the top of `studies/large.py`. Seconds are of one thread's processor time, for 1,000
tokens; calibration also as a ratio to the forward pass. Figures in italics are reckoned.

| model | forward | Grams | ratio | with gradients | ratio | `svd-llm`, all layers | memory | most of it while |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{lines}

Memory is what a launch of the default study would say, with 64 windows of 512 tokens for calibration. What a small
launch said and what it held:

| model | launch | said | held | held over said | most of it while | seconds |
| --- | --- | --- | --- | --- | --- | --- |
{launches}

Command: `python studies/large.py`

{sources}
"""


def page(cells: list[Cell]) -> str:
    """Both tables."""
    known = {(cell["model"], cell["what"]): cell for cell in cells}
    lines, launches = [], []
    for name in SHAPES:
        took = {what: seconds(name, what, known) for what in ("forward", "gram", "gradient", "svd-llm")}
        shown = {
            what: f"{value:.1f} s" if (name, what) in known else f"*{said_time(value)}*" for what, value in took.items()
        }
        takes = default_footprint(name).peak
        ratios = {what: f"{took[what] / took['forward']:.1f}" for what in NEEDS}
        lines.append(
            f"| {name} | {shown['forward']} | {shown['gram']} | {ratios['gram']} | {shown['gradient']} |"
            f" {ratios['gradient']} | {shown['svd-llm']} | *{said_bytes(takes.bytes)}* | {takes.name} |"
        )
    for (name, what), cell in known.items():
        if what.startswith("launch"):
            over = cell["held"] / cell["reckoned"]
            launches.append(
                f"| {name} | {what} | {said_bytes(cell['reckoned'])} | {said_bytes(cell['held'])} | {over:.2f} |"
                f" {cell['phase']} | {cell['seconds']:.0f} |"
            )
    found = sources(cells, lambda cell: f"{cell['model']} {cell['what']}", ", ")
    return PAGE.format(lines="\n".join(lines), launches="\n".join(launches), sources=found)


WHATS = ("forward", "gram", "gradient", "svd-llm", "launch", "launch, mapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="135m,1.1b")
    parser.add_argument("--what", default=";".join(WHATS), help="separated by ;")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(measured(*arguments.one)))
        return
    file = RESULTS / "large.jsonl"
    for name in arguments.models.split(","):
        located(name)
        for what in arguments.what.split(";"):
            key = {"model": name, "what": what}
            if not has(read_cells(file), key):
                command = [sys.executable, __file__, "--one", name, what]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                finish(file, key | json.loads(done.stdout.splitlines()[-1]))
    cells = read_cells(file)
    if all(has(cells, {"what": what}) for what in WHATS):  # what larger models are reckoned from
        (RESULTS / "large.md").write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
