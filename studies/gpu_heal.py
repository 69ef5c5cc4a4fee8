"""What healing costs and closes on one GPU: tokens a second, peak memory, excess closed, by stage. Ten minutes.

    python studies/gpu_heal.py TEXT [--minutes 10] [--plans svd-llm] [--keeps 0.6,0.8] [--rows "logits;blocks + logits"]
        [--budgets 300k,1M,3M,10M] [--out gpu_heal.json]

Splits, plans and rows are those of heal.py. Budgets go from small to large over all rows; one that would not end in
time at the pace of the largest before it is left out, and the file says so. It holds one JSON object a line, written
after every row: whatever stops the script, what was measured is there. It runs on a CPU too, to try it.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Cell, finish, keep_cells
from heal import Bench, closed, measure

from rankfront.search.heal.settings import parse_tokens
from rankfront.search.inputs.device import pick_device


def figures(cell: Cell, memory: int) -> dict[str, Any]:
    """Of one healed plan: tokens a second and excess closed after each stage, on both texts; peak bytes."""
    stages = [
        {
            "stage": stage["stage"],
            "tokens": stage["tokens"],
            "seconds": stage["seconds"],
            "tokens_per_second": stage["tokens"] / stage["seconds"] if stage["tokens"] else None,
            "closed": {text: closed(cell, place, text) for text in ("wikitext", "pydoc")},
            "note": stage.get("note"),
        }
        for place, stage in enumerate(cell["seen"])
        if place
    ]
    return {"stages": stages, "peak_bytes": memory, "dense": cell["dense"], "before": cell["seen"][0]["losses"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--plans", default="svd-llm")
    parser.add_argument("--keeps", default="0.6,0.8")
    parser.add_argument("--rows", default="logits;blocks + logits")
    parser.add_argument("--budgets", default="300k,1M,3M,10M")
    parser.add_argument("--out", type=Path, default=Path("gpu_heal.json"))
    asked = parser.parse_args()
    ends = time.monotonic() + 60 * asked.minutes
    device = torch.device(pick_device("auto"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    pace: dict[str, float] = {}  # row -> seconds a token, evaluations included
    budgets, keeps = map(parse_tokens, asked.budgets.split(",")), map(float, asked.keeps.split(","))
    for tokens, plan, keep, row in product(budgets, asked.plans.split(";"), keeps, asked.rows.split(";")):
        key = {"device": name, "plan": plan, "keep": keep, "row": row, "tokens": tokens}
        left = ends - time.monotonic()
        if pace.get(row, 0.0) * tokens > left:
            keep_cells(asked.out, [key | {"left out": f"{left:.0f} seconds were left"}])
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        cell = measure(Bench(asked.text, plan, keep, 0), row, tokens, 0)
        pace[row] = (time.monotonic() - start) / tokens
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else cell["memory"]
        finish(asked.out, key | figures(cell, memory))


if __name__ == "__main__":
    main()
