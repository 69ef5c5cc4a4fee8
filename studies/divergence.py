"""Divergence on the teacher's likeliest tokens against divergence on all of them, on smollm2-135m.

    python studies/divergence.py TEXT [--windows 4] [--threads 2]

Trials measure KL from the dense model on its k likeliest tokens at each position and the mass of the rest as one more
outcome, which is never more than KL on the whole vocabulary (49,152 tokens). Here both are measured, for the plans of
the menu + knapsack row of studies/search_benchmark.py and for the same fraction everywhere (svd-llm and dense), on the
first windows of the search split. The page goes to studies/results/divergence.md.
"""

from __future__ import annotations

from common import on_text, write_page
from search_benchmark import ROWS, Bench

from rankfront.objectives import TEACHER_TOP_K, score, teach
from rankfront.search import Plan

KEPT = (0.9, 0.8, 0.6, 0.4)
TOP_K = (64, 256, TEACHER_TOP_K, 4096)
PLANS = ("uniform", "menu + knapsack")
PAGE = """# Divergence, cut and whole

SmolLM2-135M-Instruct, WikiText-2 validation text; divergence in nats a token on all 49,152 tokens of the vocabulary,
and the share of it that is left on the dense model's k likeliest tokens and the rest. Trials use k = {used}. How is
said at the top of `studies/divergence.py`.

| plan | keep | divergence | {head} |
| --- | --- | --- | {rule} |
{lines}

```
{source}
```
"""


def main() -> None:
    arguments = on_text(__doc__, windows=4)
    bench = Bench(arguments.text)
    model, windows = bench.resident.compressed.model, bench.setup.tokens["search"][: arguments.windows]
    found = {row: ROWS[row](bench, 100_000, 0).plans for row in PLANS}
    bench.resident.compressed.apply(Plan(()))
    teachers = [teach(model, windows, top_k) for top_k in (*TOP_K, model.config.vocab_size)]
    lines = []
    for name, plans in found.items():
        for keep in KEPT:
            bench.resident.compressed.apply(plans[keep])
            *cut, whole = (score(model, windows, teacher).divergence for teacher in teachers)
            shares = " | ".join(f"{divergence / whole:.2%}" for divergence in cut)
            lines.append(f"| {name} | {keep:g} | {whole:.4f} | {shares} |")
            print(lines[-1], flush=True)
    head, rule = " | ".join(f"k = {top_k:,}" for top_k in TOP_K), " | ".join("---" for _ in TOP_K)
    write_page("divergence", PAGE, lines, used=f"{TEACHER_TOP_K:,}", head=head, rule=rule)


if __name__ == "__main__":
    main()
