"""What paths down in short steps reach on smollm2-135m, by the tokens of each stop, beside the menu's own plans.

    python studies/paths.py TEXT [--threads 2]

From the menu's plan at `START` of the weights a path goes down by `STEP` (see search/optimise/continuation.py), with
svd-llm and dense as options. Each stop's slopes are measured on windows of the search split that no trial reads, drawn
anew. The excess loss over dense, in nats a token, is measured on the windows that trials read, at round kept fractions:
those at which paths of studies end, and further down.
Nothing is chosen by it. The page goes to studies/results/paths.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import on_text, write_page
from search_benchmark import ROWS, TRIAL_TOKENS, Bench
from steps import loss

from rankfront.search import Plan
from rankfront.search.optimise.continuation import START, STEP, next_plan, stops
from rankfront.search.plans.knapsack import knapsack
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.slope_cost import PASSES

SHOWN = (0.9, 0.8, 0.7, 0.6, 0.5)
TOKENS = (1024, 2048, 4096)
PAGE = """# Paths

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense: excess loss over dense, in nats a token, of the
menu's plans and of those on paths in short steps; "tokens" are those of a stop's slopes, in brackets what was spent on
the path until there, a backward pass counted as two forward ones. How is said at the top of `studies/paths.py`.

| tokens | keep 0.9 | keep 0.8 | keep 0.7 | keep 0.6 | keep 0.5 |
| --- | --- | --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def main() -> None:
    bench = Bench(on_text(__doc__).text)
    found = ROWS["menu + knapsack"](bench, 0, 0)
    dense = loss(bench, Plan(()))
    cells = [f"{loss(bench, found.plans[keep]) - dense:.3f}" for keep in SHOWN]
    lines = [f"| none: the menu, {found.tokens:,} in all | {' | '.join(cells)} |"]
    for tokens in TOKENS:
        cells = [f"{loss(bench, plan) - dense:.3f} ({spent:,})" for plan, spent in path(bench, found.menu, tokens)]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_page("paths", PAGE, lines)


def path(bench: Bench, menu: Menu, tokens: int) -> Iterator[tuple[Plan, int]]:
    """The plans on a path at each of `SHOWN`, and the tokens spent until there."""
    length, targets = bench.setup.config.data.length, [keep * menu.dense for keep in SHOWN]
    sizes = stops(START * menu.dense, targets, STEP * menu.dense)
    unread = bench.setup.tokens["search"][TRIAL_TOKENS // length :]
    generator = torch.Generator().manual_seed(0)
    plan, slopes = menu.decode(knapsack(menu, sizes[0])), []
    for stop, size in enumerate(sizes[1:], start=1):
        windows = unread[torch.randperm(len(unread), generator=generator)[: tokens // length]]
        slopes.append(bench.slopes(menu, plan, windows, stop))
        plan = menu.decode(next_plan(slopes, menu, size))
        if size in targets:
            yield plan, PASSES["perplexity"] * tokens * stop


if __name__ == "__main__":
    main()
