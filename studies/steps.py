"""How long a step along slopes should be, and of how many tokens the slopes.

    python studies/steps.py TEXT [--threads 2]

Around three plans of the menu + knapsack row of studies/search_benchmark.py (svd-llm and dense, keep 0.8, 0.6 and 0.5)
slopes of the negative log-likelihood are measured on tokens of the search split that no trial reads. Steps of several
lengths, at the plan's own size, are measured on the windows that trials read, and on the very pieces of the slopes:
what each promised, by the trust that is believed before anything is measured and the caution that it was solved with,
and what it kept of that on either, all as shares of the plan's excess over dense in nats on the same tokens. The page
goes to studies/results/steps.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from common import on_text, write_page
from search_benchmark import ROWS, TRIAL_TOKENS, Bench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.beliefs import cautious
from rankfront.search.local import Local, Trust
from rankfront.search.menu import Menu
from rankfront.search.trial import PIECE_TOKENS

KEPT = (0.8, 0.6, 0.5)
TOKENS = (2048, 8192)
PROMISES = (0.03, 0.06, 0.12, 0.2, 0.3)
PAGE = """# Steps along slopes

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense: steps from plans of the menu along slopes around
them. "Promised" and "kept" are shares of the plan's excess loss over dense on windows of the search split that trials
read, "kept there" the share on the shorter pieces that slopes were measured on. How is said at the top
of `studies/steps.py`.

| keep | excess, nats | tokens of slopes | sites switched: promised, kept, kept there |
| --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def main() -> None:
    on = on_text(__doc__)
    bench = Bench(on.text)
    found = ROWS["menu + knapsack"](bench, 0, 0)
    unread = bench.setup.tokens["search"][TRIAL_TOKENS // bench.setup.config.data.length :].reshape(-1, PIECE_TOKENS)
    pieces = unread[torch.randperm(len(unread), generator=torch.Generator().manual_seed(0))]
    read = bench.resident.windows(0)
    lines = []
    for keep in KEPT:
        plan = found.plans[keep]
        for tokens in TOKENS:
            own = pieces[: tokens // PIECE_TOKENS]
            bases = [loss(bench, Plan(()), windows) for windows in (read, own)]
            excesses = [loss(bench, plan, windows) - base for windows, base in zip((read, own), bases, strict=True)]
            excess = excesses[0]
            local = bench.slopes(found.menu, plan, own, 0)
            cells = []
            for promised, step in steps(found.menu, local, excess):
                chosen = Plan.of(found.menu.choices(step))
                after = [loss(bench, chosen, windows) - base for windows, base in zip((read, own), bases, strict=True)]
                kept, there = (1 - left / whole for left, whole in zip(after, excesses, strict=True))
                moved = int((np.array(step) != local.places).sum())
                cells.append(f"{moved}: {promised:.2f}, {kept:.2f}, {there:.2f}")
            lines.append(f"| {keep:g} | {excess:.3f} | {tokens:,} | {'; '.join(cells)} |")
            print(lines[-1], flush=True)
    write_page("steps", PAGE, lines)


def loss(bench: Bench, plan: Plan, windows: torch.Tensor) -> float:
    """Nats a token."""
    bench.resident.apply(plan)
    return math.log(score(bench.resident.model, windows).perplexity)


def steps(menu: Menu, local: Local, excess: float) -> Iterator[tuple[float, list[int]]]:
    """(share of ``excess`` promised, plan) of the steps whose promises are nearest to `PROMISES`, each once."""
    _, plans, promised = cautious(replace(local, divergence=excess), Trust(), menu)
    for place in sorted({int(np.abs(promised - promise).argmin()) for promise in PROMISES}, reverse=True):
        yield float(promised[place]), plans[place]


if __name__ == "__main__":
    main()
