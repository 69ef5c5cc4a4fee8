"""What scheduling itself costs: seconds and reads of storage a trial, and seconds to read and to relaunch a run.

    python studies/driver_overhead.py [--samplers random tpe rankfront] [--sizes 100 300 1000] [--runs FOLDER]

A study of a tiny random Llama (15 sites, 4 keeps of svd-llm each) for each sampler, in this process. Measured is what
lies between two measurements: deciding on the next job, and recording the last; means over the `LAST` trials before
each size, passes of slopes between them included. The largest run is then opened in a process of its own, which has
imported everything: `Study.front`, and `Study.launch` where nothing is left to do. Cells that are finished are kept in
studies/results/driver_overhead.jsonl, those of another commit are measured anew. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # whose helpers make the tiny model
os.environ.setdefault("RANKFRONT_CACHE", tempfile.mkdtemp(prefix="rankfront-overhead-"))

import importlib.util  # noqa: E402

import numpy as np  # noqa: E402
import optuna  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, keep_cells, provenance, read_cells, write_page  # noqa: E402
from optuna.storages._cached_storage import _CachedStorage  # noqa: E402
from rich.console import Console  # noqa: E402

from rankfront.search.measure.prepare import prepare_store  # noqa: E402
from rankfront.search.measure.runner import JobRunner  # noqa: E402
from rankfront.search.measure.setup import make_space  # noqa: E402
from rankfront.search.run.progress import Display  # noqa: E402
from rankfront.search.run.scheduler import Scheduler  # noqa: E402
from rankfront.search.study import Study  # noqa: E402

LAST = 50
READS = ("get_all_trials", "get_study_user_attrs")
CELLS = RESULTS / "driver_overhead.jsonl"
PAGE = """# What scheduling costs

Between two measurements, over the {last} trials before each size, on a tiny random Llama of 15 sites. How is said at
the top of `studies/driver_overhead.py`.

| sampler | trials | ms a trial | of processor time | reads of all trials, a trial | of the attributes of the study |
| --- | --- | --- | --- | --- | --- |
{lines}

Seconds of reading a run and of launching it once more, imports aside:

| sampler | trials | `front` | of processor time | relaunch | of processor time |
| --- | --- | --- | --- | --- | --- |
{reopened}

```
{source}
```
"""


def _helpers() -> Any:
    """The tests' module of helpers, which has the same name as the studies'."""
    spec: Any = importlib.util.spec_from_file_location("test_helpers", ROOT / "tests" / "common.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_helpers"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def counted(reads: Counter[str]) -> Iterator[None]:
    """Within, ``reads`` counts what is asked of the storage."""
    originals = {name: getattr(_CachedStorage, name) for name in READS}

    def counting(name: str) -> Any:
        def read(self: Any, *arguments: Any, **more: Any) -> Any:
            reads[name] += 1
            return originals[name](self, *arguments, **more)

        return read

    try:
        for name in READS:
            setattr(_CachedStorage, name, counting(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(_CachedStorage, name, original)


def clocks() -> np.ndarray:
    """Seconds by the clock on the wall and of this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO())


def make_study(folder: Path, sampler: str, trials: int) -> Study:
    """A study of the tiny model; its run lies in ``folder``."""
    helpers = _helpers()
    model, text = folder / "model", folder / "text.txt"
    if not model.exists():
        helpers.save_folder("llama", model)
        text.write_text(helpers.random_text(24_000), encoding="utf-8")
    data = helpers.study_data(model, text)
    data["space"] = {"methods": ["svd-llm"], "keep": [0.3, 0.5, 0.7, 0.9], "rank_multiple": 2}
    data["search"] |= {"sampler": sampler, "trials": trials}
    return Study(data, folder / f"run-{sampler}")


def measure(study: Study, sizes: list[int]) -> None:
    """Go on with ``study`` to its limit, and keep a cell at each of ``sizes``."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setup = study.setup()
    space = make_space(setup)
    prepare_store(setup, space, lambda phase, done, total: None)
    study.run.define(study.config, {"dtype": setup.dtype, "device": setup.device})
    runner, reads = JobRunner(setup), Counter[str]()
    taken: list[tuple[int, np.ndarray]] = []  # trials done; seconds, of processor time too, and both counts until then
    spent_on_jobs = np.zeros(2)
    with counted(reads):
        storage = study.run.study(study.config, write=True)
        scheduler = Scheduler(storage, study.config, space, setup.origin(), Display(quiet()).search, report=False)
        spent = 0
        while True:
            start = clocks()
            job = scheduler.next()
            spent_on_jobs += clocks() - start
            if job is None:
                break
            record = runner.run(job)
            start = clocks()
            scheduler.finish(job, record)
            spent_on_jobs += clocks() - start
            if job.kind != "trial" or "failure" in record:
                continue
            spent = spent + 1 if taken else sum(row.counts for row in study.rows())
            taken.append((spent, np.array([*spent_on_jobs, *(reads[name] for name in READS)])))
            if spent in sizes and len(taken) > LAST:
                means = (taken[-1][1] - taken[-1 - LAST][1]) / LAST
                figures = dict(zip(("seconds", "processor", "trials", "attributes"), map(float, means), strict=True))
                cell = {"sampler": study.config.search.sampler, "size": spent, **figures, "from": provenance()}
                keep_cells(CELLS, [cell])
                print(json.dumps(cell), flush=True)


def reopen(run: Path) -> dict[str, float]:
    """Seconds of the front and of a launch that has nothing to do, in this process."""
    start = clocks()
    Study.open(run).front()
    between = clocks()
    Study.open(run).launch(quiet(), report=False)
    (front, front_processor), (relaunch, relaunch_processor) = between - start, clocks() - between
    processor = {"front_processor": float(front_processor), "relaunch_processor": float(relaunch_processor)}
    return {"front": float(front), "relaunch": float(relaunch), **processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe", "rankfront"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 300, 1000])
    parser.add_argument("--runs", type=Path, default=RESULTS / "runs" / "driver_overhead")
    parser.add_argument("--reopen", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reopen is not None:
        print(json.dumps(reopen(arguments.reopen)))
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    commit = provenance().partition("commit: ")[2]

    def known() -> dict[tuple[str, int], dict[str, Any]]:
        cells = [cell for cell in read_cells(CELLS) if cell["from"].partition("commit: ")[2] == commit]
        return {(cell["sampler"], cell["size"]): cell for cell in cells if "front" not in cell} | {
            (cell["sampler"], -cell["size"]): cell for cell in cells if "front" in cell
        }

    most = max(arguments.sizes)
    for sampler in arguments.samplers:
        if any((sampler, size) not in known() for size in arguments.sizes):
            shutil.rmtree(arguments.runs / f"run-{sampler}", ignore_errors=True)
            measure(make_study(arguments.runs, sampler, most), arguments.sizes)
        if (sampler, -most) not in known():
            run = [sys.executable, __file__, "--reopen", str(arguments.runs / f"run-{sampler}")]
            found = json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout)
            keep_cells(CELLS, [{"sampler": sampler, "size": most, **found, "from": provenance()}])
    cells = known()
    lines = [
        f"| {sampler} | {size} | {1e3 * cell['seconds']:.1f} | {1e3 * cell['processor']:.1f} | {cell['trials']:.1f} |"
        f" {cell['attributes']:.1f} |"
        for (sampler, size), cell in cells.items()
        if size > 0
    ]
    reopened = [
        f"| {sampler} | {-size} | {cell['front']:.2f} | {cell['front_processor']:.2f} | {cell['relaunch']:.2f} |"
        f" {cell['relaunch_processor']:.2f} |"
        for (sampler, size), cell in cells.items()
        if size < 0
    ]
    write_page("driver_overhead", PAGE, lines, last=str(LAST), reopened="\n".join(reopened))


if __name__ == "__main__":
    main()
