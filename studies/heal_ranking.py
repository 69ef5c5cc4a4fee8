"""Whether healing reorders plans: eight plans of one kept fraction on smollm2-135m, as they are and after repair.

    python studies/heal_ranking.py TEXT [--plans "searched 0;oats"] [--states raw,refit,blocks,logits] [--keep 0.6]
        [--tokens 32k] [--blocks-tokens 24k] [--windows 16] [--control 12] [--threads 2]

TEXT is split as in heal.py: searched on its third quarter, healed on its first half, reported on its last quarter; the
second corpus is pydoc. ``searched 0`` and ``searched 1`` are what heal.py's searches of two seeds found best, ``menu``
what the first of them had from its menu before any trial, ``lems`` a knapsack over one probe a site and method, of
svd-llm and dense. The name of a method is that method at every site; `a+b` is each where it fits. Every state starts
from the raw plan: ``refit`` in closed form on the calibrate split, ``blocks`` and ``logits`` on tokens seen in all.
Scored windows have 512 tokens, ``--windows`` of the report split and ``--control`` of pydoc. Finished cells, with the
loss of every window, are kept in studies/results/heal_ranking.jsonl, one line each: stop it at any time and start it
again. The page has plans that were measured in all of the states asked for, ``raw`` among them. ``refit`` takes longer
than the other two together.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from common import RESULTS, Cell, finish, has, read_cells, sources
from heal import LENGTH, SEARCHED, Bench, heal
from scipy.stats import kendalltau
from search_benchmark import ROWS as ALLOCATORS
from search_benchmark import Bench as AllocatorBench

from rankfront.objectives import score
from rankfront.search import Plan
from rankfront.search.choices import Stage
from rankfront.search.heal.healing import spread
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.inputs.model import load_model
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.refit import refitted
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import HALF, cost_of

MENU, PROBE = "menu", "lems"
PLANS = ("searched 0", "searched 1", MENU, PROBE, "svd-llm", "kfac-svd", "nystrom+lama+vo-svd", "oats")
STATES, DENSE = ("raw", "refit", "blocks", "logits"), "dense"
TEXTS = ("wikitext", "pydoc")
PROBE_TOKENS = 50_000
NEAR = 1.3  # of the best raw plan's excess: within, plans are near
RESAMPLES = 1_000
HELD_OUT = 8  # windows above those that the tokens need, of which a twentieth is held out

Losses = Mapping[tuple[str, str], np.ndarray]  # (plan, state) -> nats a token of every window of one text (W,)


def bench_of(text: str, name: str, keep: float) -> Bench:
    """The plan of this name with the model that runs it."""
    if name.startswith(SEARCHED):
        return Bench(text, SEARCHED, keep, int(name.removeprefix(SEARCHED)))
    if name not in (MENU, PROBE):
        return Bench(text, name, keep, 0)
    probed = _probed(text, keep) if name == PROBE else None
    bench = Bench(text, SEARCHED, keep, 0)
    if probed is not None:
        bench.plan = probed
        return bench
    (row,) = [row for row in bench.study.rows() if row.origin == "menu: centre"]
    if not 0 <= keep - row.figure("block_parameters") < 0.01:
        raise SystemExit(f"the menu's plan keeps {row.figure('block_parameters'):.3f} and not {keep:g}: use that")
    bench.plan = row.plan
    return bench


def _probed(text: str, keep: float) -> Plan:
    """What the allocator gives, kept among the runs."""
    file = RESULTS / "runs" / f"ranking-{PROBE}-{keep:g}.json"
    if not file.exists():
        found = ALLOCATORS["LEMS-style probe"](AllocatorBench(text), PROBE_TOKENS, 0).plans[keep]
        file.write_text(found.to_json(), encoding="utf-8")
    return Plan.from_json(file.read_text(encoding="utf-8"))


def losses(bench: Bench, counts: Mapping[str, int]) -> dict[str, list[float]]:
    """Text -> nats a token of every window scored."""
    model = bench.compressed.model
    return {
        name: [round(score(model, window[None]).loss, 5) for window in spread(bench.texts[name], count)]
        for name, count in counts.items()
    }


def measure(bench: Bench, state: str, tokens: int, counts: Mapping[str, int]) -> Cell:
    """One plan in one state; after a healing the bench has a new model."""
    compressed, start = bench.compressed, time.monotonic()
    if state == "refit":
        with refitted(compressed, bench.plan):
            return {"seconds": time.monotonic() - start, "losses": losses(bench, counts)}
    plan = Plan(()) if state == DENSE else bench.plan
    compressed.apply(plan)
    if state in (DENSE, "raw"):
        cost = cost_of(plan, inside_blocks(compressed.sites), compressed.dense_values, HALF)
        return {"block_parameters": cost.block_parameters, "losses": losses(bench, counts)}
    stage: Stage = "blocks" if state == "blocks" else "logits"
    teacher = load_model(bench.setup.source, "auto", bench.setup.device)
    windows = spread(bench.windows, tokens // LENGTH + HELD_OUT)
    found = heal(compressed.model, teacher, windows, HealSettings(tokens, (stage,))) | {"losses": losses(bench, counts)}
    bench.compressed = CompressedModel(bench.setup)
    return found


# -- the page


def excesses(cells: Sequence[Cell], text: str) -> Losses:
    """(plan, state) -> what every window loses over dense, in nats a token (W,)."""
    found = {(cell["plan"], cell["state"]): np.array(cell["losses"][text]) for cell in cells}
    (dense,) = (found.pop(key) for key in list(found) if key[1] == DENSE)
    return {key: values - dense for key, values in found.items()}


def complete(excess: Losses, states: Sequence[str]) -> list[str]:
    """Plans that have all of the ``states``."""
    plans = dict.fromkeys(plan for plan, _ in excess)
    return [plan for plan in plans if all((plan, state) in excess for state in states)]


def near(excess: Losses, plans: Sequence[str]) -> list[str]:
    """Of ``plans``, those whose raw excess is within `NEAR` of the best's."""
    raw = {plan: excess[plan, "raw"].mean() for plan in plans}
    return [plan for plan, value in raw.items() if value <= NEAR * min(raw.values())]


def tau(excess: Losses, plans: Sequence[str], before: str, after: str) -> tuple[float, float, float]:
    """Kendall's tau of two states over ``plans``, and the 95% interval of a bootstrap over windows."""
    columns = [np.array([excess[plan, state] for plan in plans]) for state in (before, after)]  # (plans, W) each
    count = columns[0].shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))

    def of(windows: np.ndarray) -> float:
        return float(kendalltau(*(column[:, windows].mean(1) for column in columns)).statistic)

    low, high = np.quantile([of(windows) for windows in drawn], [0.025, 0.975])
    return of(np.arange(count)), float(low), float(high)


def perplexities(cells: Sequence[Cell], text: str, states: Sequence[str]) -> Iterator[str]:
    """Per complete plan: perplexity in each of the ``states``, and the share of the excess that it closed."""
    excess = excesses(cells, text)
    (dense,) = (float(np.mean(cell["losses"][text])) for cell in cells if cell["state"] == DENSE)
    sizes = {cell["plan"]: cell["block_parameters"] for cell in cells if cell["state"] == "raw"}
    yield f"| plan | kept | {' | '.join(states)} |"
    yield "| --- " * (2 + len(states)) + "|"
    for plan in complete(excess, states):
        means = {state: float(excess[plan, state].mean()) for state in states}
        raw = means.pop("raw")
        shown = [f"{math.exp(dense + mean):.1f} ({1 - mean / raw:.0%})" for mean in means.values()]
        yield f"| {plan} | {sizes[plan]:.3f} | {math.exp(dense + raw):.1f} | {' | '.join(shown)} |"


def correlations(cells: Sequence[Cell], states: Sequence[str]) -> Iterator[str]:
    """Kendall's tau of every two of the ``states``, on both texts, over all plans and over those near the best."""
    yield "| states | plans | wikitext | pydoc |"
    yield "| --- | --- | --- | --- |"
    by_text = {text: excesses(cells, text) for text in TEXTS}
    plans = complete(by_text[TEXTS[0]], states)
    groups = {"all": plans, "near the best": near(by_text[TEXTS[0]], plans)}
    for before, after in combinations(states, 2):
        for name, members in groups.items():
            if len(members) > 1:
                taus = [tau(by_text[text], members, before, after) for text in TEXTS]
                shown = " | ".join(f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in taus)
                yield f"| {before}, {after} | {len(members)}, {name} | {shown} |"


def speeds(cells: Sequence[Cell]) -> Iterator[str]:
    """Per plan and stage: tokens seen, seconds, tokens a second, held-out loss before and after."""
    yield "| plan | stage | tokens | seconds | tokens/s | held out: before | after |"
    yield "| --- " * 7 + "|"
    for cell in cells:
        if "seconds" in cell:
            tokens, seconds = cell.get("tokens"), cell["seconds"]
            seen = (
                [f"{tokens:,}", f"{seconds:,.0f}", f"{tokens / seconds:,.0f}"]
                if tokens
                else ["-", f"{seconds:,.0f}", "-"]
            )
            held = [f"{value:.4f}" for value in cell.get("held_out", [])] or ["-", "-"]
            yield f"| {cell['plan']} | {cell['state']} | {' | '.join(seen + held)} |"


PAGE = """# Whether healing reorders plans

SmolLM2-135M-Instruct, WikiText-2 validation text, plans of one kept fraction of the block weights ("kept" is what they
keep). What is measured and how is said at the top of `studies/heal_ranking.py`. In brackets: the share of the excess
over dense, in log perplexity, that is closed.

Perplexity on the report part (dense: {dense[0]:.1f}):

{wikitext}

On `pydoc` (dense: {dense[1]:.1f}):

{pydoc}

Kendall's tau between the order of plans in two states. In brackets: the 95% interval of a bootstrap over windows,
1,000 resamples. "Near the best" are plans whose raw excess on the report part is within 1.3 times the least.

{correlations}

Other work ran on the same machine.

{speeds}

Command: `python studies/heal_ranking.py TEXT --threads 1`

{sources}
"""


def write(cells: Sequence[Cell], states: Sequence[str]) -> None:
    dense = [math.exp(np.mean(cell["losses"][text])) for cell in cells if cell["state"] == DENSE for text in TEXTS]
    tables = {text: "\n".join(perplexities(cells, text, states)) for text in TEXTS}
    tables |= {"correlations": "\n".join(correlations(cells, states)), "speeds": "\n".join(speeds(cells))}
    made = sources(cells, lambda cell: f"{cell['plan']} {cell['state']}")
    (RESULTS / "heal_ranking.md").write_text(PAGE.format(dense=dense, sources=made, **tables), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--plans", default=";".join(PLANS))
    parser.add_argument("--states", default=",".join(STATES))
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--blocks-tokens", default="24k")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--control", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file, counts = RESULTS / "heal_ranking.jsonl", dict(zip(TEXTS, (asked.windows, asked.control), strict=True))
    budgets = {"blocks": parse_tokens(asked.blocks_tokens), "logits": parse_tokens(asked.tokens)}
    states = [state for state in STATES if state in asked.states.split(",")]
    shared: Cell = {"keep": asked.keep, "windows": counts}
    for plan in asked.plans.split(";"):
        bench: Bench | None = None
        keys = [shared | {"plan": plan, "state": state, "tokens": budgets.get(state, 0)} for state in states]
        for key in [shared | {"plan": DENSE, "state": DENSE, "tokens": 0}, *keys]:
            if not has(read_cells(file), key):
                bench = bench or bench_of(asked.text, plan, asked.keep)
                finish(file, key | measure(bench, key["state"], key["tokens"], counts))
        write([c for c in read_cells(file) if has([c], shared) and c["tokens"] == budgets.get(c["state"], 0)], states)


if __name__ == "__main__":
    main()
