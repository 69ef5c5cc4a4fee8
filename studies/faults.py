"""Inject faults for real and see what becomes of runs, figures and files: docs/faults.md.

    python studies/faults.py [--only WORDS] [--seed N]

Each fault is injected a number of times at places drawn by the seed: processes killed, bytes flipped, files cut short
or changed under their reader, databases and disks that fill up. After each injection what is left is compared with a
run that nothing disturbed: the same trials, none of them lost or measured twice, and every figure equal to what its
plan gives in a fresh measurement, or named as damaged in one line. Everything else counts as a loss or a silent change,
and the command ends with exit code 1. On tiny random models; under 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "tests")  # whose helpers make tiny models and launch studies of them
os.environ.setdefault("RANKFRONT_CACHE", tempfile.mkdtemp(prefix="rankfront-faults-"))
os.environ["HF_HUB_OFFLINE"] = "1"

import common  # noqa: E402 - of the tests, found through the line above
import launching  # noqa: E402
import sqlalchemy  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from rankfront.methods import InputError  # noqa: E402
from rankfront.methods._low_rank import LowRank  # noqa: E402
from rankfront.objectives.parameters import Parameters  # noqa: E402
from rankfront.search.__main__ import run as command_line  # noqa: E402
from rankfront.search.inputs.model import load_model  # noqa: E402
from rankfront.search.inputs.resolve import resolve  # noqa: E402
from rankfront.search.measure.runner import JobRunner  # noqa: E402
from rankfront.search.measure.timing import Stopwatches  # noqa: E402
from rankfront.search.output.export import export  # noqa: E402
from rankfront.search.plans.job import Job  # noqa: E402
from rankfront.search.plans.plan import Plan  # noqa: E402
from rankfront.search.study import Study  # noqa: E402

TRIALS = 10
PATIENCE = 120  # seconds
CLOSE = 1e-6  # relative: figures of one plan, measured twice on one machine
GOOD = ("nothing lost", "refused by name", "named, measured again", "made anew", "the same figures", "retried")


class Bad(Exception):
    """A loss or a silent change."""


@dataclass
class World:
    """A tiny model and text, a finished run of it, and what each plan gives when it is measured afresh."""

    folder: Path
    draw: random.Random

    def __post_init__(self) -> None:
        self.model = common.save_folder("llama", self.folder / "model")
        self.text = self.folder / "text.txt"
        self.text.write_text(common.random_text(24_000), encoding="utf-8")
        self.file = launching.write_study(self.data(), self.folder / "study.toml")
        self.run = self.launched(self.folder / "reference")
        self.resident = JobRunner(self.run.setup())

    def data(self, trials: int = TRIALS, **search: Any) -> dict[str, Any]:
        return launching.small_data(self.model, self.text, trials=trials, **search)

    def launched(self, path: Path, **search: Any) -> Study:
        return launching.make_run(self.data(**search), path)

    def fresh(self, name: str) -> Path:
        """A new path."""
        return Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{name}-")) / name

    def whole(self, path: Path, trials: int = TRIALS) -> str:
        """Check a finished run: as many trials as asked for, none twice, each with the figures of its plan."""
        study = Study.open(path)
        try:
            launching.check_whole(study, {}, trials)
        except AssertionError as error:
            raise Bad(f"trials lost or repeated: {error}") from error
        for row in study.rows():
            if row.state == "complete":
                self.same(row.plan, row.values)
        return "nothing lost"

    def same(self, plan: Plan, values: dict[str, float]) -> None:
        fresh = self.resident.run(Job("trial", 0, plan))["values"]
        if not all(math.isclose(values[name], fresh[name], rel_tol=CLOSE) for name in fresh):
            raise Bad(f"{values} where the plan gives {fresh}")

    def flip(self, path: Path, start: float = 0.0) -> None:
        """Another value for one byte of ``path``, beyond the share ``start`` of it."""
        with path.open("r+b") as file:
            size = path.stat().st_size
            place = self.draw.randrange(int(start * size), size)
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ self.draw.randrange(1, 256)]))


def one_line(call: Callable[[], Any]) -> Any:
    """What ``call`` gives; its refusal as a string where it refuses in one line."""
    try:
        return call()
    except InputError as error:
        if "\n" in str(error):
            raise Bad(f"more than one line: {error}") from error
        return "refused by name"


# -- processes


def _forked() -> Any:
    context = multiprocessing.get_context("forkserver")  # pays for the imports once
    context.set_forkserver_preload(["rankfront.search.__main__"])
    return context


def launch(*arguments: Any) -> int:
    """`rankfront launch` in this process; its exit code."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return command_line(["launch", *map(str, arguments)])


def _in_child(arguments: list[str], statement: int | None = None) -> None:
    """The command line, without a word; SIGKILLed at its ``statement``-th SQL statement."""
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if statement is not None:
        seen = iter(range(statement))

        @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
        def kill(*_: Any) -> None:
            if next(seen, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.exit(command_line(arguments))


def launcher_killed(world: World) -> Iterator[str]:
    """Run after run is launched and killed at any moment until it is done."""
    context, kills = _forked(), 0
    while kills < 24:
        path, before = world.fresh("killed"), {}
        for turn in range(8):
            process = context.Process(target=_in_child, args=(["launch", str(world.file), "--run", str(path)],))
            process.start()
            wanted = len(before) + world.draw.randrange(3)
            launching.wait_for(lambda at=wanted, p=path: launching.finished(p) >= at, process.is_alive)
            time.sleep(world.draw.random() * 0.2)
            process.kill()
            process.join(PATIENCE)
            kills += 1
            if (path / "study.json").is_file():
                kept = launching.values_of(Study.open(path))
                if not kept.items() >= before.items():
                    raise Bad(f"lost after kill {turn}: {before.keys() - kept.keys()}")
                before = kept
            yield "nothing lost"
        if launch(world.file, "--run", path) != 0:
            raise Bad("the last launch failed")
        world.whole(path)


def launcher_killed_between_statements(world: World) -> Iterator[str]:
    """SIGKILL just before the n-th SQL statement of a launch: while the database is created, and later."""
    context = _forked()
    for statement in [*range(0, 40, 3), *(world.draw.randrange(40, 400) for _ in range(6))]:
        path = world.fresh("cut")
        arguments = ["launch", str(world.file), "--run", str(path)]
        process = context.Process(target=_in_child, args=(arguments, statement))
        process.start()
        process.join(PATIENCE)
        if launch(*arguments[1:]) != 0:
            raise Bad(f"no relaunch after statement {statement}")
        yield world.whole(path)


def launcher_terminated(world: World) -> Iterator[str]:
    """SIGTERM, as schedulers send it; then the launch goes on."""
    for _ in range(3):
        path = world.fresh("terminated")
        with launching.started("launch", world.file, "--run", path) as process:
            launching.wait_for(lambda p=path: launching.finished(p) >= 3, lambda: process.poll() is None)
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE)
        if "Traceback" in said or "running" in {row.state for row in Study.open(path).rows()}:
            raise Bad(said)
        launch(world.file, "--run", path)
        yield world.whole(path)


def workers_killed(world: World) -> Iterator[str]:
    """SIGKILL to a Ray worker, three times within one search."""
    path = world.fresh("workers")
    file = launching.write_study(world.data(workers=2, trials=24), world.fresh("file").with_suffix(".toml"))
    with launching.started("launch", file, "--run", path) as process:
        kills = 0
        while kills < 3 and process.poll() is None:
            launching.wait_for(lambda n=4 * kills + 2: launching.finished(path) >= n, lambda: process.poll() is None)
            family = launching.psutil.Process(process.pid).children(recursive=True)
            victims = [member for member in family if _name(member).startswith("ray::Worker")]
            if victims:
                world.draw.choice(victims).kill()
                kills += 1
                yield "retried"
        process.communicate(timeout=PATIENCE)
        if process.returncode != 0:
            raise Bad(f"exit code {process.returncode}")
    world.whole(path, 24)


def _name(process: Any) -> str:
    try:
        return " ".join(process.cmdline())
    except launching.psutil.Error:
        return ""


def node_lost(world: World) -> Iterator[str]:
    """A node of a two-node Ray cluster killed in the middle of a trial and brought back: the suite's own test."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "test_cluster.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:  # as it is where no test ran
        raise Bad(done.stdout[-2000:])
    yield "nothing lost"


def memory_short_in_a_trial(world: World) -> Iterator[str]:
    """The measurement of one trial, the dense one among them, runs out of memory once."""
    value = Parameters.value
    for moment in range(6):
        calls = iter(range(1000))

        def spoiled(self: Any, subject: Any, calls: Any = calls, moment: int = moment) -> float:
            if next(calls) == moment:
                raise MemoryError
            return value(self, subject)

        with patched(Parameters, "value", spoiled):
            run = world.launched(world.fresh("memory"))
        yield world.whole(run.run.path).replace("nothing lost", "retried")


def memory_short_while_factoring(world: World) -> Iterator[str]:
    """One factorisation runs out of memory; the next launch makes it."""
    prepare = LowRank.prepare
    for moment in range(4):
        calls = iter(range(1000))

        def spoiled(self: Any, *arguments: Any, calls: Any = calls, moment: int = moment) -> Any:
            if next(calls) == moment:
                raise RuntimeError("can't allocate memory")
            return prepare(self, *arguments)

        with own_cache(world):
            path = world.fresh("factoring")
            with patched(LowRank, "prepare", spoiled):
                world.launched(path)
            study = Study(world.data() | {"search": world.data()["search"] | {"trials": TRIALS + 4}}, path)
            study.launch(launching.quiet())
            missing = study.setup().store().missing(world.resident.compressed.space.wanted())
            if missing:
                raise Bad(f"{len(missing)} sites were never factored")
            yield "made anew"


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def own_cache(world: World) -> Iterator[Path]:
    before = os.environ["RANKFRONT_CACHE"]
    os.environ["RANKFRONT_CACHE"] = str(world.fresh("cache"))
    try:
        yield Path(os.environ["RANKFRONT_CACHE"])
    finally:
        os.environ["RANKFRONT_CACHE"] = before


# -- files


def factor_bytes(world: World) -> Iterator[str]:
    """A byte of a factor file flipped, before anybody maps it."""
    for _ in range(40):
        cache = world.fresh("flipped")
        shutil.copytree(world.resident.setup.cache, cache)
        resident = JobRunner(replace(world.resident.setup, cache=str(cache)))
        files = sorted(cache.rglob("*.safetensors"))
        world.flip(world.draw.choice([file for file in files if "model-" not in str(file)]))
        yield checked(world, resident)


def checked(world: World, resident: JobRunner) -> str:
    """Every option of every site measured once in a few plans: the same figures, or refused by name."""
    wanted = resident.compressed.space.wanted()
    for place in range(max(len(options) for options in wanted.values())):
        plan = Plan.of({site.name: options[place % len(options)] for site, options in wanted.items()})
        found = one_line(lambda plan=plan: resident.run(Job("trial", 0, plan)))
        if isinstance(found, str):
            return found
        if "failure" in found:
            return "refused by name"
        world.same(plan, found["values"])
    return "the same figures"


def factors_changed_under_a_worker(world: World) -> Iterator[str]:
    """Overwritten in place, cut short, replaced or deleted between two trials of one worker that had mapped them."""
    changes: list[Callable[[Path, Path], Any]] = [
        lambda path, other: path.write_bytes(other.read_bytes()),
        lambda path, other: os.truncate(path, path.stat().st_size // 2),
        lambda path, other: shutil.copyfile(other, path.with_name("new")) and path.with_name("new").replace(path),
        lambda path, other: path.unlink(),
    ]
    for turn in range(12):
        cache = world.fresh("changed")
        shutil.copytree(world.resident.setup.cache, cache)
        resident = JobRunner(replace(world.resident.setup, cache=str(cache)))
        checked(world, resident)
        resident.compressed.apply(Plan(()))
        folder = world.draw.choice(sorted(path for path in cache.iterdir() if path.name.startswith("svd")))
        for path in sorted(folder.glob("*.safetensors")):
            others = [file for file in folder.glob("*.safetensors") if file != path]
            changes[turn % len(changes)](path, world.draw.choice(others) if others else path)
        yield checked(world, resident)


def study_bytes(world: World) -> Iterator[str]:
    """A byte of a finished run's database flipped."""
    reference = {row.number: row for row in world.run.rows()}
    for _ in range(60):
        path = world.fresh("database")
        shutil.copytree(world.run.run.path, path)
        with sqlite3.connect(path / "study.db") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        world.flip(path / "study.db")
        found = one_line(lambda path=path: Study.open(path).rows())
        if isinstance(found, str):
            yield found
            continue
        named = False
        for number, row in reference.items():
            now = next((each for each in found if each.number == number), None)
            if now is not None and now.state == "complete":
                if (now.plan_json, now.values) != (row.plan_json, row.values) or now.report not in (None, row.report):
                    raise Bad(f"trial {number} reads {now}, was {row}")
            else:
                named = True
        yield measured_again(world, path) if named else "the same figures"


def measured_again(world: World, path: Path) -> str:
    again = Study.open(path)
    outcome = one_line(lambda: again.launch(launching.quiet()))
    if isinstance(outcome, str):
        return outcome
    rows = [row for row in again.rows() if row.state == "complete"]
    if len({row.plan_key for row in rows}) < TRIALS:
        raise Bad(f"{len(rows)} trials after the relaunch")
    for row in rows:
        world.same(row.plan, row.values)
    return "named, measured again"


def latency_bytes(world: World) -> Iterator[str]:
    """A byte of a table of latencies flipped."""
    root = world.fresh("latency").parent
    dense, x = nn.Linear(32, 32), torch.ones(1, 4, 32)
    watches = Stopwatches(root, "cpu", torch.float32)
    for tokens in range(1, 9):
        watches.seconds(f"dense {tokens}", dense, x[:, :tokens])
    watches.save()
    content = watches.path.read_bytes()
    for _ in range(40):
        watches.path.write_bytes(content)
        world.flip(watches.path)
        known = Stopwatches(root, "cpu", torch.float32).known
        if known and known != watches.known:
            raise Bad("a changed time was used")
        yield "made anew" if not known else "the same figures"


def checkpoint_tensors(world: World) -> Iterator[str]:
    """A tensor of a checkpoint left out, under another name, or of another shape."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(world.model / "model.safetensors")
    for name in world.draw.sample(sorted(tensors), 20):
        for change in ("missing", "renamed", "reshaped"):
            spoiled = dict(tensors)
            own = spoiled.pop(name)
            if change == "renamed":
                spoiled[f"{name}.old"] = own
            if change == "reshaped":
                spoiled[name] = torch.cat([own, own])
            folder = world.fresh("checkpoint")
            shutil.copytree(world.model, folder)
            save_file(spoiled, folder / "model.safetensors", metadata={"format": "pt"})
            found = one_line(lambda folder=folder: load_model(resolve(str(folder)), torch.float32, "cpu"))
            if not isinstance(found, str):
                raise Bad(f"{name} {change} was loaded")
            yield found
            shutil.rmtree(folder)


def hostile_exports(world: World) -> Iterator[str]:
    """One value anywhere in an export's config.json or plan.json replaced by something absurd."""
    folder = world.fresh("export")
    wanted = world.resident.compressed.space.wanted()
    chosen = {site.name: options[0] for site, options in wanted.items() if site.name.endswith(("up_proj", "q_proj"))}
    row = launching.measured(world.resident, Plan.of(chosen))
    export(world.resident.setup, row, folder, "factored")
    ids = common.tokens(1, 12)
    expected = load_model(resolve(str(folder)), torch.float32, "cpu")(input_ids=ids).logits
    absurd = [10_000_000, -1, 0, 1e300, "x", None, [], {}, True, "../../etc/passwd", [[[[[]]]]], 2**70]
    for _ in range(90):
        spoiled = world.fresh("spoiled")
        shutil.copytree(folder, spoiled)
        file = spoiled / "config.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        part = data["rankfront"] if world.draw.random() < 0.6 else data
        while True:
            key = world.draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if isinstance(part[key], dict | list) and part[key] and world.draw.random() < 0.8:
                part = part[key]
            else:
                part[key] = world.draw.choice(absurd)
                break
        file.write_text(json.dumps(data), encoding="utf-8")
        found = one_line(lambda s=spoiled: load_model(resolve(str(s)), torch.float32, "cpu"))
        if not isinstance(found, str):
            with torch.no_grad():
                logits = one_line(lambda m=found: m(input_ids=ids).logits)
            if not torch.equal(logits, expected):
                yield f"loads as another model ({_shown(key)})"
                continue
            found = "the same figures"
        yield found
        shutil.rmtree(spoiled)


def _shown(key: Any) -> str:
    return str(key)[:20]


def disk_full(world: World) -> Iterator[str]:
    """The database cannot grow beyond some pages while a study runs; with room again it goes on."""
    for pages in (30, 45, 60, 80, 120):
        path = world.fresh("full")

        def limit(connection: Any, record: Any, pages: int = pages) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages}")

        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", limit)
        try:
            code = launch(world.file, "--run", path)
        finally:
            sqlalchemy.event.remove(sqlalchemy.Engine, "connect", limit)
        if code not in (0, 1, 2):
            raise Bad(f"exit code {code}")
        launch(world.file, "--run", path)
        yield world.whole(path)


FAULTS: dict[str, Callable[[World], Iterator[str]]] = {
    "SIGKILL of the launcher, at any moment": launcher_killed,
    "SIGKILL of the launcher, before an SQL statement": launcher_killed_between_statements,
    "SIGTERM of the launcher": launcher_terminated,
    "SIGKILL of a Ray worker": workers_killed,
    "a Ray node killed and brought back": node_lost,
    "out of memory in a trial": memory_short_in_a_trial,
    "out of memory while factoring": memory_short_while_factoring,
    "a byte of a factor file flipped": factor_bytes,
    "factor files changed under a worker": factors_changed_under_a_worker,
    "a byte of the study's database flipped": study_bytes,
    "a byte of a latency table flipped": latency_bytes,
    "a tensor of a checkpoint missing, renamed or reshaped": checkpoint_tensors,
    "an absurd value in an export's configuration": hostile_exports,
    "the database's disk full": disk_full,
}

PAGE = """# Faults, injected for real

What becomes of runs, figures and files when something breaks: `studies/faults.py` injects each fault at places drawn by
a seed, and compares what is left with a run that nothing disturbed.

| fault | times | outcome | losses and silent changes |
| --- | --- | --- | --- |
{lines}

- "nothing lost": after the next launch the run has as many trials as asked for, none twice, and every figure is what
  its plan gives in a fresh measurement.
- "refused by name": one line that names the file, the tensor or the value.
- "made anew", "retried", "named, measured again": what was damaged or lost is measured once more, to the same figures.
- "the same figures": the fault hit what nobody reads, or what changes nothing.
- "loads as another model": a value of the model's own configuration that another model could have, such as an epsilon.
  Nothing in a checkpoint says that it is not meant.

<sub>{source}</sub>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds these words; nothing is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines, worst = [], 0
    with tempfile.TemporaryDirectory(prefix="rankfront-faults-") as folder:
        world = World(Path(folder), random.Random(arguments.seed))
        for name, inject in FAULTS.items():
            if arguments.only not in name:
                continue
            started, outcomes, bad = time.monotonic(), Counter(), ""
            try:
                for outcome in inject(world):
                    outcomes[outcome] += 1
            except Exception as error:  # noqa: BLE001 - whatever gets here is what the table is about
                bad = f"{type(error).__name__}: {error}"
            found = ", ".join(f"{outcome} ({count})" for outcome, count in outcomes.most_common())
            lines.append(f"| {name} | {outcomes.total() + bool(bad)} | {found} | {bad or 'none'} |")
            worst |= bool(bad)
            print(f"{lines[-1]} {time.monotonic() - started:.0f} s", flush=True)
    if not arguments.only:
        spec = importlib.util.spec_from_file_location("studies_common", ROOT / "studies" / "common.py")
        shared = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(shared)  # type: ignore[union-attr]
        (ROOT / "docs").mkdir(exist_ok=True)
        page = PAGE.format(lines="\n".join(lines), source=shared.provenance().strip())
        (ROOT / "docs" / "faults.md").write_text(page, encoding="utf-8")
    return worst


if __name__ == "__main__":
    sys.exit(main())
