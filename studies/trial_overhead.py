"""How much of a trial is spent applying the plan: apply seconds over evaluate seconds, median over a study.

    python studies/trial_overhead.py [TRIALS]

Runs a study of 40 trials on smollm2-135m in this process, in a temporary folder, and prints one table row. Also
prints what preparing took: calibration (64 windows of 512 tokens), factoring all 210 sites for svd-llm, and
reading the store again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import provenance

from rankfront.search import Study
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.setup import make_space

SETTINGS = {
    "space": {"methods": ["svd-llm"]},
    "objectives": {"perplexity": {}, "parameters": {}},
    "search": {"sampler": "random", "workers": 0},
}


def prepare(study: Study) -> dict[str, float]:
    """Seconds until each phase began, and in all, for an empty store; then for reading a full one."""
    begun: dict[str, float] = {}
    start = time.perf_counter()
    setup = study.setup()
    space = make_space(setup)

    def note(phase: str, done: int, total: int) -> None:
        begun.setdefault(phase, time.perf_counter() - start)

    prepare_store(setup, space, note)
    total = time.perf_counter() - start
    start = time.perf_counter()
    setup = study.setup()
    wanted = make_space(setup).wanted()
    prepare_store(setup, make_space(setup), lambda phase, done, total: None)
    store = setup.store()
    for site, options in wanted.items():
        store.load(site, options[0])  # reads and checks every byte of the site's factors
    return {"calibrate": begun["factor"] - begun["calibrate"], "total": total, "again": time.perf_counter() - start}


def main(trials: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RANKFRONT_CACHE"] = folder
        study = Study(SETTINGS, run=Path(folder) / "run", overrides=[f"search.trials={trials}"])
        seconds = prepare(study)
        study.launch()
        phases = [row.attributes["seconds"] for row in study.rows() if row.state == "complete"]
    ratio = median(phase["apply"] / phase["evaluate"] for phase in phases)
    print("| trials | apply / evaluate, median | calibrate, s | prepare in all, s | second launch reads the store, s |")
    print("| --- | --- | --- | --- | --- |")
    cells = [f"{ratio:.4f}", f"{seconds['calibrate']:.0f}", f"{seconds['total']:.0f}", f"{seconds['again']:.1f}"]
    print(f"| {len(phases)} | {' | '.join(cells)} |")
    print(provenance())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
