"""Predicted against measured divergence of single options in 16, 8 and 4 bits, on smollm2-135m.

    python studies/bits_predictions.py TEXT [--options 150]

All sites of three blocks, of one weight and joint ones; of their options, so many at random, each measured alone: KL
from the dense model on 1,024 tokens of the search split, in fp32, for in bf16 what eight bits lose drowns in rounding.
Predictions are the menu's, from the gradient on other tokens of that split.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from typing import Any

from common import write_page
from scipy.stats import spearmanr

from rankfront.methods import Option, Site
from rankfront.objectives import score, teach
from rankfront.search import Study
from rankfront.search.factors.gradient import quadratic_divergence
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.plans.plan import Plan

BLOCKS = (3, 14, 26)
METHODS = ["svd-llm", "kfac-svd", "lama", "vo-svd", "nystrom", "oats", "cospadi"]
TOKENS, PREDICTED = 1024, 2048

PAGE = """# Predictions of options in fewer bits

Spearman's correlation of predicted and measured divergence over single options; what is compared is said at the top of
`studies/bits_predictions.py`. "ratio" is the median of predicted over measured.

| options | number | Spearman | ratio |
| --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def settings(text: str) -> dict[str, Any]:
    parts = {"calibrate": (64, [0, 0.5]), "search": (16, [0.5, 0.75]), "report": (4, [0.75, 1])}
    return {
        "model": {"name": "smollm2-135m", "dtype": "float32"},
        "data": {
            "length": 256,
            **{split: {"text": text, "windows": count, "part": part} for split, (count, part) in parts.items()},
        },
        "space": {
            "include": [f"*.layers.{block}.*" for block in BLOCKS],
            "methods": METHODS,
            "bits": [16, 8, 4],
            "keep": [0.5, 0.7, 0.9],
            "allow_partial": True,
        },
        "objectives": {"perplexity": {}, "bytes": {}},
        "search": {"workers": 0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--options", type=int, default=150)
    arguments = parser.parse_args()
    pairs = measured(arguments.text, arguments.options)
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for site, option, predicted, found in pairs:
        bits = dict(option.level).get("bits", 16)
        kind = "one weight" if len(site.weights) == 1 else "joint"
        for name in ("all", f"{bits} bits", kind, f"{kind}, {bits} bits", option.method):
            groups[name].append((predicted, found))
    lines = []
    for name, own in groups.items():
        first, second = zip(*own, strict=True)
        rank = f"{spearmanr(first, second).statistic:.3f}" if len(own) > 3 else "-"
        ratios = sorted(a / b for a, b in own if b > 0)
        lines.append(f"| {name} | {len(own)} | {rank} | {ratios[len(ratios) // 2]:.2f} |")
    write_page("bits_predictions", PAGE, sorted(lines))


def measured(text: str, count: int) -> list[tuple[Site, Option, float, float]]:
    """Of ``count`` options at random: the site, the option, and what is predicted and measured of it."""
    study = Study(settings(text))
    setup = study.setup()
    prepare_store(setup, make_space(setup), lambda phase, done, total: None)
    compressed = JobRunner(setup).compressed
    wanted = compressed.store.usable(compressed.space.wanted())
    windows = setup.tokens["search"]
    used, others = windows[: TOKENS // windows.shape[1]], windows[-PREDICTED // windows.shape[1] :]
    compressed.apply(Plan(()))
    predicted = quadratic_divergence(compressed.model, others, wanted, compressed.store, seed=0)
    teacher = teach(compressed.model, used)
    options = [(site, option) for site, own in wanted.items() for option in own]
    found = []
    for site, option in random.Random(0).sample(options, min(count, len(options))):
        compressed.apply_one(site, option)
        divergence = score(compressed.model, used, teacher).divergence
        found.append((site, option, predicted[site.name][option.label], divergence))
        print(f"{site.name} {option.label}: {found[-1][2]:.3g} predicted, {divergence:.3g} measured", flush=True)
    return found


if __name__ == "__main__":
    main()
