"""Which tokens slopes should read: windows as long as a trial's, or short pieces from all over the text.

    python studies/pieces.py TEXT [--draws 3] [--threads 2]

Around two plans of the menu + knapsack row of studies/search_benchmark.py (svd-llm and dense, block_parameters 0.5 and
0.4) slopes are measured on so many tokens of the search split in pieces of so many, drawn anew each time, none of them
read by trials. The step that they recommend at the plan's own size, boldly and with caution, is measured on the windows
that trials read: the better of the two perplexities, for every draw. The page goes to studies/results/pieces.md.
"""

from __future__ import annotations

import numpy as np
import torch
from common import on_text, write_page
from search_benchmark import ROWS, TRIAL_TOKENS, Bench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.beliefs import CAUTIONS
from rankfront.search.descent import Descent
from rankfront.search.local import Trust
from rankfront.search.menu import Menu, make_menu
from rankfront.search.slopes import PASSES

KEPT = (0.5, 0.4)
DESIGNS = ((4096, 512), (4096, 128), (2048, 512), (2048, 128), (2048, 32), (1024, 128))  # tokens, and of a piece
PAGE = """# Slopes by what they read

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense: perplexity on the search split of the plans that
slopes around one plan recommend, for each draw of the text that they read. How is said at the top of
`studies/pieces.py`.

| tokens | in pieces of | spent | {head} |
| --- | --- | --- | {rule} |
{lines}

```
{source}
```
"""


def main() -> None:
    arguments = on_text(__doc__, draws=3)
    bench = Bench(arguments.text)
    menu = make_menu(bench.wanted, bench.spectrum)
    plans = ROWS["menu + knapsack"](bench, 0, 0).plans
    head = [f"from keep {keep:g} ({measured(bench, plans[keep]):.1f})" for keep in KEPT]
    lines = []
    for tokens, length in DESIGNS:
        cells = [
            ", ".join(f"{step(bench, menu, plans[keep], tokens, length, draw):.1f}" for draw in range(arguments.draws))
            for keep in KEPT
        ]
        lines.append(f"| {tokens:,} | {length} | {PASSES['perplexity'] * tokens:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_page("pieces", PAGE, lines, head=" | ".join(head), rule=" | ".join("---" for _ in KEPT))


def measured(bench: Bench, plan: Plan) -> float:
    """Perplexity on the windows that trials read."""
    bench.resident.apply(plan)
    return score(bench.resident.model, bench.resident.windows(0)).perplexity


def step(bench: Bench, menu: Menu, plan: Plan, tokens: int, length: int, draw: int) -> float:
    """The perplexity that slopes around ``plan`` lead to."""
    pieces = bench.setup.tokens["search"][TRIAL_TOKENS // bench.setup.config.data.length :].reshape(-1, length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(draw))
    windows = pieces[order[: tokens // length]]
    local = bench.slopes(menu, plan, windows, draw)
    none = np.zeros((len(menu.lines), len(menu.lines)))
    solved = [Descent(menu, local.losses(Trust(), caution), none).solve(menu.size(local.plan)) for caution in CAUTIONS]
    return min(measured(bench, Plan.of(menu.choices(places))) for places in solved)


if __name__ == "__main__":
    main()
