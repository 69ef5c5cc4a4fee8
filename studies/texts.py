"""Which text to calibrate and search on: plans found on one text, judged on all of them.

    python studies/texts.py WIKITEXT [--texts pydoc,wikitext,self,self+pydoc,self+wikitext] [--threads 1]

WIKITEXT is a text file. On each text, or on two in equal parts, the default space of smollm2-135m is calibrated (64
windows of 512 tokens) and searched with what a menu and slopes around its centre take, and the plans that are expected
to be best at 0.9, 0.8 and 0.6 of the block-linear weights are taken as they are, none chosen by its score. Each is
judged on unseen windows of pydoc and WIKITEXT (their last quarters) and of the model's own text (another seed), by its
excess loss over dense in nats a token, and by what it says after three prompts. Runs stay in studies/results/runs and
finished cells in studies/results/texts.jsonl: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cell, keep_cells, provenance, read_cells, sources
from rich.console import Console

from rankfront.methods import InputError
from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.inputs.own_text import OwnText, degenerate
from rankfront.search.inputs.text import cut
from rankfront.search.measure.control import continuations
from rankfront.search.measure.runner import JobRunner
from rankfront.search.splits import PROMPTS, Split

KEEPS = (0.9, 0.8, 0.6)
LENGTH, CALIBRATE, SEARCH, JUDGED = 512, 64, 20, 12  # tokens; windows
TRIAL_TOKENS = 4096  # of the dense model and of the plan at the centre
TOKENS = 36_000  # for the dense model, the menu, the plan at its centre and slopes around it
SEEN, UNSEEN = (0.0, 0.75), (0.75, 1.0)
PAGE = """# Texts

SmolLM2-135M-Instruct, the default space: excess loss over dense in nats a token, on unseen windows of three texts, of
plans calibrated and searched on the text to the left; "mean" and "worst" are over the three. Dense has perplexity
{dense}. How is said at the top of `studies/texts.py`.

| keep | calibrated and searched on | {judges} | mean | worst |
| --- | --- | {rules}--- | --- |
{lines}

What is said after "{prompt}":

| keep | calibrated and searched on | likeliest continuation |
| --- | --- | --- |
| 1 | dense | {said} |
{saids}

Command: `python studies/texts.py TEXT`

{sources}
"""


def settings(parts: list[str], threads: int) -> dict[str, Any]:
    """The study on the texts ``parts``, in equal parts."""
    split = {"text": [{"text": part} for part in parts], "part": [0.0, 1.0] if parts == ["self"] else list(SEEN)}
    return {
        "data": {
            "length": LENGTH,
            "calibrate": split | {"windows": CALIBRATE},
            "search": split | {"windows": SEARCH},
            "report": {"text": "self:1", "windows": 1},
            "control": {"windows": 0},
        },
        "objectives": {"perplexity": {}, "block_parameters": {}},
        "search": {
            "workers": 0,
            "trials": 1000,
            "tokens": TOKENS,
            "anchors": [],
            "trial_tokens": TRIAL_TOKENS,
            "resources": {"cpu": threads},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wikitext")
    parser.add_argument("--texts", default="pydoc,wikitext,self,self+pydoc,self+wikitext")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = RESULTS / "texts.jsonl"
    for name in arguments.texts.split(","):
        if any(cell["text"] == name for cell in read_cells(file)):
            continue
        files = {"wikitext": arguments.wikitext}
        parts = [files.get(part, part) for part in name.split("+")]
        study = Study(settings(parts, arguments.threads), run=RESULTS / "runs" / f"texts-{name}")
        study.launch(Console(stderr=True), report=False)
        keep_cells(file, [cell | {"text": name, "from": provenance()} for cell in judge(study, arguments.wikitext)])
        (RESULTS / "texts.md").write_text(page(read_cells(file)), encoding="utf-8")


def judge(study: Study, wikitext: str) -> list[Cell]:
    """Loss on every text and continuations, of dense and of the plan expected to be best at each of `KEEPS`."""
    setup = study.setup()
    resident = JobRunner(setup)
    judges = {"pydoc": ("pydoc", UNSEEN), "wikitext": (wikitext, UNSEEN), "self": ("self:1", (0.0, 1.0))}
    splits = {name: Split(text, JUDGED, part) for name, (text, part) in judges.items()}
    windows = cut(
        resident.compressed.tokenizer,
        splits,
        LENGTH,
        OwnText(setup.source, setup.dtype, setup.device, Path(setup.cache)),
    )
    plans = {1.0: Plan(())} | {keep: plan_at(study, keep) for keep in KEEPS}
    cells = []
    for keep, plan in plans.items():
        resident.compressed.apply(plan)
        losses = {
            name: math.log(score(resident.compressed.model, judged).perplexity) for name, judged in windows.items()
        }
        said = continuations(resident.compressed.model, resident.compressed.tokenizer)
        cells.append({"keep": keep, "losses": losses, "said": said, "degenerate": degenerate(windows["self"])})
        print(json.dumps(cells[-1]), flush=True)
    return cells


def plan_at(study: Study, keep: float) -> Plan:
    """The plan expected to be best within ``keep`` of the block-linear weights, unmeasured."""
    try:
        return study.answer(f"block_parameters<={keep}").plan
    except InputError as error:
        raise SystemExit(f"{study.run.path}: {error}") from error


def page(cells: list[Cell]) -> str:
    """The table, by kept fraction, the least mean first."""
    dense = next(cell for cell in cells if cell["keep"] == 1)
    names = list(dense["losses"])
    rows = []
    for cell in cells:
        if cell["keep"] < 1:
            excess = [cell["losses"][name] - dense["losses"][name] for name in names]
            rows.append((-cell["keep"], sum(excess) / len(excess), cell, excess))
    rows.sort(key=lambda row: row[:2])
    lines, saids = [], []
    for _, mean, cell, excess in rows:
        figures = " | ".join(f"{value:.3f}" for value in (*excess, mean, max(excess)))
        lines.append(f"| {cell['keep']:g} | {cell['text']} | {figures} |")
        saids.append(f"| {cell['keep']:g} | {cell['text']} | {json.dumps(cell['said'][0])} |")
    return PAGE.format(
        dense=", ".join(f"{math.exp(loss):.3g} on {name}" for name, loss in dense["losses"].items()),
        judges=" | ".join(f"on {name}" for name in names),
        rules="--- | " * len(names),
        lines="\n".join(lines),
        prompt=PROMPTS[0],
        said=json.dumps(dense["said"][0]),
        saids="\n".join(saids),
        sources=sources(cells, lambda cell: str(cell["text"])),
    )


if __name__ == "__main__":
    main()
