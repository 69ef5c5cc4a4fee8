"""Search against search at equal token budgets: what every allocator and sampler reaches on smollm2-135m.

    python studies/search_benchmark.py TEXT [--rows a,b] [--budgets 100000,300000] [--seeds 0,1,2] [--threads 1]

TEXT is split by position: calibrate on the first half, search on the third quarter, report on the last. The space is
svd-llm and dense; one row adds the methods that treat several weights jointly, one oats and dsformer too; one leaves
out our search's anchors, one measures every plan on half the tokens and those in front on twice as many. Tokens are
counted everywhere (a backward pass as two forward ones): probes, menus, slopes and trials alike. Allocators that only
predict are solved at block_parameters 0.9, 0.8, ... 0.3 and spend no tokens on looking at their plans; searches give,
at each of those, the measured plan that is best on the search split. All these plans are measured on the report
split. Hypervolume is that of (log perplexity excess over dense, block_parameters) within [0, ln 10] x [0, 1], as a
share. Finished cells are kept in studies/results/search.jsonl, one line each, and never measured again: stop it at
any time and start it again, or several of it with other rows. Rows that no budget changes are measured once, at the
first one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

import moocore
import numpy as np
import torch
from allocators import knapsack, sensitivity, tolerance, uniform, value
from common import RESULTS, Cell, keep_cells, provenance, read_cells, sources
from rich.console import Console

from rankfront.methods import InputError
from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.factors.failures import Failures
from rankfront.search.measure.predictions import measure_probes, scaled_predictions, spectrum_predictions
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.slopes import measure_slopes
from rankfront.search.optimise.corrections import corrections_of
from rankfront.search.optimise.surrogate import Surrogate
from rankfront.search.optimise.taylor import TaylorModel
from rankfront.search.plans.job import PASSES, Job
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Menu, Places, Predictions, make_menu
from rankfront.search.plans.menu_jobs import group_plans, menu_record, probe_options
from rankfront.search.tuning import TUNING

GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # kept fractions at which rows are compared
SHOWN = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TRIAL_TOKENS = 4096  # of every trial; the rest of the search split is for menus, slopes, probes and evolution
JOINT = ("svd-llm", "lama", "vo-svd", "nystrom", "drop-block")
SPARSE = (*JOINT, "oats", "dsformer")
TENTHS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # kept fractions of the row with these two, which factor each level anew
SAMPLERS = ("random", "tpe", "nsga2", "gp", "rankfront")
VARIANTS: dict[str, dict[str, object]] = {  # of our sampler's row: what they change in the study
    "rankfront with joint methods": {"space.methods": JOINT},
    "rankfront with joint and sparse methods": {"space.methods": SPARSE, "space.keep": TENTHS},
    "rankfront without anchors": {"search.anchors": []},
}


def settings(text: str, threads: int) -> dict[str, object]:
    """The study that every row shares."""
    return {
        "data": {
            "length": 512,
            "calibrate": {"text": text, "windows": 64, "part": [0.0, 0.5]},
            "search": {"text": text, "windows": 112, "part": [0.5, 0.75]},
            "report": {"text": text, "windows": 24, "part": [0.75, 1.0]},
        },
        "space": {"methods": ["svd-llm"], "keep": [round(0.1 + 0.05 * i, 2) for i in range(18)]},
        "objectives": {"perplexity": {}, "block_parameters": {}},
        "search": {"workers": 0, "trials": 100_000, "trial_tokens": TRIAL_TOKENS, "resources": {"cpu": threads}},
    }


@dataclass
class Found:
    """What one row found: a plan for each kept fraction, and what that cost."""

    plans: dict[float, Plan] = field(default_factory=dict)
    tokens: int = 0
    overhead: float = 0.0  # seconds that were not spent in the model
    spearman: float | None = None  # of predicted and measured values, where a search predicts
    menu: Menu = field(default_factory=lambda: Menu(()))  # of rows that solve one


class Bench:
    """The resident model with everything rows share."""

    def __init__(self, text: str) -> None:
        self.settings = settings(text, torch.get_num_threads())
        study = Study(self.settings, run=RESULTS / "unused")
        self.setup = study.setup()
        self.resident = JobRunner(self.setup)
        self.wanted = self.resident.compressed.space.wanted()
        self.spectrum = spectrum_predictions(self.wanted, self.resident.compressed.store, Failures())

    def probes(self, found: Found, share: float, fractions: tuple[float, ...] | None) -> Predictions:
        """KL of options alone, the tokens of ``share`` spread over them evenly; every option where no fractions."""
        options = (
            {s: list(o) for s, o in self.wanted.items()} if fractions is None else probe_options(self.wanted, fractions)
        )
        count = sum(len(chosen) for chosen in options.values())
        length = min(512, max(16, int(share / (count + 1))))
        windows = self.setup.tokens["search"][: max(1, int(share / (count + 1)) // 512), :length]
        self.resident.compressed.apply(Plan(()))
        probes, tokens = measure_probes(
            self.resident.compressed.model, self.resident.compressed.apply_one, windows, options, Failures()
        )
        found.tokens += tokens
        return probes

    def slopes(self, menu: Menu, plan: Plan, windows: torch.Tensor, seed: int) -> TaylorModel:
        """Slopes of the negative log-likelihood around ``plan``, measured on ``windows``."""
        resident = self.resident
        resident.compressed.apply(plan)
        with resident.compressed.anchored():
            options = resident.compressed.store.usable(self.wanted)
            found = measure_slopes(
                resident.compressed.model,
                windows,
                options,
                resident.compressed.current,
                resident.compressed.dense_modules,
                resident.compressed.store,
                None,
                seed,
            )
        places = menu.encode(plan)
        assert places is not None
        pairs = [np.array([found[line.site][option.label] for option in line.options]) for line in menu.lines]
        for line, place in zip(pairs, places, strict=True):
            line[place] = 0.0
        first, second = ([line[:, column] for line in pairs] for column in (0, 1))
        return TaylorModel(np.array(places), 1.0, first, second, windows.numel())

    def solve(self, found: Found, predictions: Predictions, allocator: Callable[[Menu, float], Places]) -> None:
        """Allocate at every fraction of the grid."""
        begun = time.perf_counter()
        found.menu = menu = make_menu(self.wanted, predictions)
        found.plans = {keep: menu.decode(allocator(menu, keep * menu.dense)) for keep in GRID}
        found.overhead += time.perf_counter() - begun


def spectrum_row(allocator: Callable[[Menu, float], Places]) -> Callable[[Bench, int, int], Found]:
    def run(bench: Bench, budget: int, seed: int) -> Found:
        found = Found()
        bench.solve(found, bench.spectrum, allocator)
        return found

    return run


def probe_row(
    fractions: tuple[float, ...] | None, allocator: Callable[[Menu, float], Places]
) -> Callable[[Bench, int, int], Found]:
    def run(bench: Bench, budget: int, seed: int) -> Found:
        found = Found()
        probes = bench.probes(found, budget, fractions)
        bench.solve(found, scaled_predictions(bench.spectrum, probes) if fractions else probes, allocator)
        return found

    return run


def menu_row(grouped: bool) -> Callable[[Bench, int, int], Found]:
    """Our menu and a knapsack, nothing more: the gradient's, or with its probes of groups."""

    def run(bench: Bench, budget: int, seed: int) -> Found:
        found = Found()
        first = bench.resident.run(Job("menu", 0, Plan(())))
        groups = bench.resident.compressed.space.bands(TUNING.group_bands) if grouped else []
        plans = group_plans(groups, bench.wanted, first["predictions"])
        parts = {f"menu {i}": bench.resident.run(Job("menu", i, plan)) for i, plan in enumerate(plans, start=1)}
        record = menu_record({"menu 0": first | {"jobs": 1 + len(parts)}, **parts})
        assert record is not None
        found.tokens += record["tokens"]
        bench.solve(found, record["predictions"], knapsack)
        return found

    return run


def context_row(bench: Bench, budget: int, seed: int) -> Found:
    """Our menu corrected by slopes around its own plan at `Tuning.reference_fraction`, and a knapsack, nothing more."""
    found = menu_row(grouped=True)(bench, budget, seed)
    menu, reference = found.menu, found.menu.decode(knapsack(found.menu, TUNING.reference_fraction * found.menu.dense))
    bench.resident.compressed.apply(reference)
    windows = bench.resident.tokens.spare(1, TUNING.slope_tokens)
    found.tokens += PASSES["perplexity"] * windows.numel()
    taylor = bench.slopes(menu, reference, windows, seed)
    begun = time.perf_counter()
    surrogate = Surrogate(menu, [""] * len(menu.lines), [0] * len(menu.lines))  # no trial teaches it
    context = corrections_of(taylor, menu, surrogate.features)
    surrogate.corrections = [context] if context is not None else []
    for keep in GRID:
        solved = Lagrangian(menu, surrogate.losses(keep))
        found.plans[keep] = menu.decode(solved.solve(keep * menu.dense))
    found.overhead += time.perf_counter() - begun
    return found


def evolution_row(bench: Bench, budget: int, seed: int) -> Found:
    """Level-switch evolution after EvoPress (2410.14649): offspring keep the budget, selection is staged.

    At every target: 16 offspring of the best plan, each with a few pairs of sites moved one level up and one level
    down; all are scored on 512 fresh tokens, 4 on 1,024, and the best two and the parent on 2,048.
    """
    found, rng = Found(), random.Random(seed)
    menu = make_menu(bench.wanted, bench.spectrum)
    pool = bench.setup.tokens["search"]
    for keep in GRID:
        limit = keep * menu.dense
        parent = uniform(menu, limit)
        target = found.tokens + (budget - found.tokens) / (len(GRID) - len(found.plans))
        while found.tokens < target:
            offspring = [_switch(menu, parent, limit, rng) for _ in range(16)]
            for survivors, windows in ((4, 1), (2, 2), (1, 4)):
                if survivors == 1:
                    offspring.append(parent)
                tokens = pool[rng.sample(range(len(pool)), windows)]
                losses = []
                for places in offspring:
                    bench.resident.compressed.apply(menu.decode(places))
                    losses.append(score(bench.resident.compressed.model, tokens).loss)
                    found.tokens += tokens.numel()
                order = np.argsort(losses, kind="stable")
                offspring = [offspring[i] for i in order[:survivors]]
            parent = offspring[0]
        found.plans[keep] = menu.decode(parent)
    return found


def _switch(menu: Menu, parent: Places, limit: float, rng: random.Random) -> Places:
    """``parent`` with one to three sites a level cheaper and others dearer while the budget allows."""
    plan = list(parent)
    for _ in range(rng.randint(1, 3)):
        down = rng.randrange(len(plan))
        plan[down] = min(plan[down] + 1, len(menu.lines[down].options) - 1)
        for up in rng.sample(range(len(plan)), 8):
            raised = [*plan[:up], max(plan[up] - 1, 0), *plan[up + 1 :]]
            if menu.size(raised) <= limit:
                plan = raised
                break
    return tuple(plan)


def study_row(name: str, sampler: str, changes: Mapping[str, object]) -> Callable[[Bench, int, int], Found]:
    """A whole study with ``sampler`` and ``changes`` to the shared settings; ``name`` is that of its run folder."""

    def run(bench: Bench, budget: int, seed: int) -> Found:
        changed = {"search.sampler": sampler, "search.seed": seed, "search.tokens": budget, **changes}
        overrides = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        study = Study(bench.settings, run=RESULTS / "runs" / f"{name}-{seed}".replace(" ", "-"), overrides=overrides)
        study.launch(Console(quiet=True), report=False)
        overhead = sum(row.attributes["seconds"]["propose"] for row in study.rows() if row.state == "complete")
        found = Found(tokens=study.tokens(), overhead=overhead)
        for keep in GRID:
            with suppress(InputError):  # nothing is as small
                found.plans[keep] = study.best(f"block_parameters<={keep}").plan
        calibration = study.calibration()
        if calibration is not None:
            found.spearman = calibration.spearman
        return found

    return run


ROWS: dict[str, Callable[[Bench, int, int], Found]] = {
    "uniform": spectrum_row(uniform),
    "spectrum knapsack": spectrum_row(knapsack),
    "PGSVD tolerance": spectrum_row(tolerance),
    "TRP value threshold": spectrum_row(value),
    "ASVD search": probe_row(None, sensitivity),
    "LEMS-style probe": probe_row(TUNING.probe_fractions["probe"], knapsack),
    "level evolution": evolution_row,
    "gradient + knapsack": menu_row(grouped=False),
    "menu + knapsack": menu_row(grouped=True),
    "menu and slopes once + knapsack": context_row,
    **{name: study_row(name, name, {}) for name in SAMPLERS},
    **{name: study_row(name, "rankfront", changes) for name, changes in VARIANTS.items()},
}
SEEDED = {"level evolution", *SAMPLERS, *VARIANTS}
ONCE = {  # at any budget
    "uniform",
    "spectrum knapsack",
    "PGSVD tolerance",
    "TRP value threshold",
    "gradient + knapsack",
    "menu + knapsack",
    "menu and slopes once + knapsack",
}


def hypervolume(dense: float, perplexity: Mapping[float, float]) -> float:
    """Of (log perplexity excess over ``dense``, kept fraction) within [0, ln 10] x [0, 1], as a share."""
    points = [[max(math.log(value / dense), 0.0) / math.log(10), keep] for keep, value in perplexity.items()]
    return float(moocore.hypervolume(np.array([*points, [0.0, 1.0]]), ref=np.ones(2)))


def report(bench: Bench, found: Found) -> dict[str, object]:
    """The row's best plans at every fraction of the grid, on the report split."""
    windows = bench.setup.tokens["report"]
    bench.resident.compressed.apply(Plan(()))
    dense = score(bench.resident.compressed.model, windows).perplexity
    perplexity: dict[float, float] = {}
    for keep, plan in found.plans.items():
        bench.resident.compressed.apply(plan)
        perplexity[keep] = score(bench.resident.compressed.model, windows).perplexity
    return {
        "dense": dense,
        "perplexity": {str(keep): value for keep, value in perplexity.items()},
        "hypervolume": hypervolume(dense, perplexity),
        "tokens": found.tokens,
        "overhead": found.overhead,
        "spearman": found.spearman,
    }


def table(cells: list[Cell]) -> str:
    """Median over seeds of every row and budget, as markdown."""
    head = ["budget", "row", "seeds", "tokens", "hypervolume", *(f"ppl at {keep}" for keep in SHOWN), "overhead, s"]
    head.append("Spearman")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    groups: dict[tuple[int, str], list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["budget"], cell["row"]), []).append(cell)
    order = sorted(groups.items(), key=lambda item: (item[0][0], -median(c["hypervolume"] for c in item[1])))
    for (budget, row), members in order:
        volumes = [cell["hypervolume"] for cell in members]
        spread = f" ({min(volumes):.4f} to {max(volumes):.4f})" if len(volumes) > 1 else ""
        at = [[c["perplexity"][str(keep)] for c in members if str(keep) in c["perplexity"]] for keep in SHOWN]
        shown = [f"{median(values):.1f}" if values else "-" for values in at]
        tokens, overhead = (median(cell[key] for cell in members) for key in ("tokens", "overhead"))
        volume = f"{median(volumes):.4f}{spread}"
        ranked = [cell["spearman"] for cell in members if cell["spearman"] is not None]
        row_cells = [f"{budget:,}", row, str(len(members)), f"{tokens:,.0f}", volume, *shown, f"{overhead:.1f}"]
        row_cells.append(f"{median(ranked):.3f}" if ranked else "-")
        lines.append(f"| {' | '.join(row_cells)} |")
    return "\n".join(lines)


PAGE = """# Search against search

SmolLM2-135M-Instruct, WikiText-2 validation text, svd-llm and dense. What is measured and how is said at the top of
`studies/search_benchmark.py`; "budget" is in tokens, and rows that no budget changes stand under the first. Where a
commit has local changes, they are these results. Trials and probes of commits before e23b02e read the beginning of the
search split, later ones read windows from all over it; our own search is another since db813ee,
and went paths (continuation from near dense in short steps) from 72d751f on, until they left. What they changed is the
difference to "rankfront before paths": the same row and seeds, as db813ee searched.

{table}

Command: `python studies/search_benchmark.py TEXT --rows ... --budgets ... --seeds ...`

{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--budgets", default="100000,300000,1000000")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "search.jsonl"
    cells = read_cells(file)
    bench: Bench | None = None
    for budget in map(int, arguments.budgets.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            for row in arguments.rows.split(","):
                key = {"row": row, "budget": budget, "seed": seed}
                if any(key.items() <= cell.items() for cell in cells) or (seed and row not in SEEDED):
                    continue
                if row in ONCE and any(cell["row"] == row and cell["seed"] == seed for cell in cells):
                    continue
                bench = bench or Bench(arguments.text)
                cell = key | report(bench, ROWS[row](bench, budget, seed)) | {"from": provenance()}
                cells.append(cell)
                keep_cells(file, [cell])
                print(json.dumps({k: v for k, v in cell.items() if k != "from"}), flush=True)
    made = sources(cells, lambda cell: f"{cell['row']} {cell['budget']:,} seed {cell['seed']}")
    page = PAGE.format(table=table(cells), sources=made)
    (RESULTS / "search.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
