"""How long a step along slopes should be, of how many tokens the slopes, and in pieces of what length.

    python studies/steps.py TEXT [--threads 2]

Around three plans of the menu + knapsack row of studies/search_benchmark.py (svd-llm and dense, keep 0.8, 0.6 and 0.4)
slopes of the negative log-likelihood are measured on tokens of the search split that no trial reads, in whole windows
of 512 or in shorter pieces. Steps of several lengths, at the plan's own size, are measured on the windows that trials
read: what each promised, by the scaling that is believed before anything is measured and the damping that it was solved
with, and what it kept of that, both as shares of the plan's excess over dense in nats. The page goes to
studies/results/steps.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from common import on_text, write_page
from search_benchmark import ROWS, TRIAL_TOKENS, Bench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.optimise.candidates import damped
from rankfront.search.optimise.taylor import Scaling, TaylorModel
from rankfront.search.plans.menu import Menu, Places
from rankfront.search.tuning import TUNING

KEPT = (0.8, 0.6, 0.4)
PIECES = (128, 512)
TOKENS = (3072, 12_288)
PROMISES = (0.05, 0.1, 0.2, 0.3)
PAGE = """# Steps along slopes

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense: steps from plans of the menu along slopes around
them. "Promised" and "kept" are shares of the plan's excess loss over dense on windows of 512 tokens that trials read.
How is said at the top of `studies/steps.py`.

| keep | excess, nats | pieces | tokens of slopes | sites switched: promised, kept |
| --- | --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def main() -> None:
    on = on_text(__doc__)
    bench = Bench(on.text)
    found = ROWS["menu + knapsack"](bench, 0, 0)
    unread = bench.setup.tokens["search"][TRIAL_TOKENS // bench.setup.config.data.length :]
    dense = loss(bench, Plan(()))
    lines = []
    for keep in KEPT:
        plan = found.plans[keep]
        excess = loss(bench, plan) - dense
        for length, tokens in product(PIECES, TOKENS):
            taylor = bench.slopes(found.menu, plan, drawn(unread, length)[: tokens // length], 0)
            cells = []
            for promised, step in steps(found.menu, taylor, excess):
                kept = 1 - (loss(bench, found.menu.decode(step)) - dense) / excess
                moved = int((np.array(step) != taylor.places).sum())
                cells.append(f"{moved}: {promised:.2f}, {kept:.2f}")
            lines.append(f"| {keep:g} | {excess:.3f} | {length} | {tokens:,} | {'; '.join(cells)} |")
            print(lines[-1], flush=True)
    write_page("steps", PAGE, lines)


def drawn(windows: torch.Tensor, length: int) -> torch.Tensor:
    """All pieces of ``length`` tokens, (pieces, length), in an order that is always the same."""
    pieces = windows.reshape(-1, length)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]


def loss(bench: Bench, plan: Plan) -> float:
    """Nats a token, on what trials read."""
    bench.resident.compressed.apply(plan)
    return math.log(score(bench.resident.compressed.model, bench.resident.tokens.windows).perplexity)


def steps(menu: Menu, taylor: TaylorModel, excess: float) -> Iterator[tuple[float, Places]]:
    """(share of ``excess`` promised, plan) of the steps whose promises are nearest to `PROMISES`, each once."""
    dampings = np.geomspace(*TUNING.dampings)
    _, plans, promised = damped(
        replace(taylor, divergence=excess), Scaling(TUNING.first_order[0], TUNING.second_order[0]), menu, dampings
    )
    for place in sorted({int(np.abs(promised - promise).argmin()) for promise in PROMISES}, reverse=True):
        yield float(promised[place]), plans[place]


if __name__ == "__main__":
    main()
