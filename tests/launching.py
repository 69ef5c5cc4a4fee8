"""Launching studies in tests: small study data, study files, commands as subprocesses, what a run holds."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import optuna
import psutil
import pytest
from common import study_data
from forking import Forked
from rich.console import Console

from rankfront.search.errors import Interrupted
from rankfront.search.estimate.study_file import to_toml
from rankfront.search.measure.runner import MEASURES, JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.plans.job import Job, Kind
from rankfront.search.plans.plan import Plan
from rankfront.search.run.scheduler import Scheduler
from rankfront.search.storage.front import Row
from rankfront.search.study import Study

PATIENCE = 240  # seconds until a test gives a process up


def small_data(folder: Path, text: Path, **search: Any) -> dict[str, Any]:
    """A study of two methods with few levels: its trials take milliseconds."""
    data = study_data(folder, text)
    data["space"] = {"methods": ["svd", "svd-llm"], "keep": [0.4, 0.6, 0.8], "rank_multiple": 2}
    data["search"] |= {"sampler": "random", "anchors": [0.6], **search}
    return data


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO())


def measured(resident: JobRunner, plan: Plan) -> Row:
    """``plan`` as a trial's row."""
    plan = Plan.of(plan.by_site, resident.setup.origin())
    record = resident.run(Job("trial", 0, plan))
    attributes = {key: value for key, value in record.items() if key != "values"}
    return Row(3, "complete", "random", plan.to_json(), plan.key, record["values"], attributes)


def make_run(data: Mapping[str, Any], run: Path) -> Study:
    """A finished run of ``data``."""
    study = Study(data, run)
    study.launch(quiet())
    return study


def make_scheduler(data: Mapping[str, Any], run: Path) -> tuple[Scheduler, JobRunner]:
    """A scheduler over a study in memory, and its resident model."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = Study(data, run)
    setup = study.setup()
    memory = optuna.create_study(directions=["minimize"] * 2)
    return Scheduler(memory, study.config, make_space(setup), setup.origin(), lambda status: None), JobRunner(setup)


def optuna_study(study: Study, write: bool = False) -> optuna.Study:
    """The Optuna study of a run, as its storage has it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return study.run.study(study.config, write)


def again(study: Study, **search: Any) -> Study:
    """The same run with other keys under ``search``."""
    data = study.config.model_dump(mode="json")
    data["search"] |= search
    return Study(data, study.run.path)


def write_study(data: Mapping[str, Any], path: Path) -> Path:
    """``data`` as a study file."""
    given = {name: table for name, table in data.items() if table is not None}
    tables = {name: {key: value for key, value in table.items() if value is not None} for name, table in given.items()}
    path.write_text(to_toml(tables, ""), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "rankfront.search", *(str(argument) for argument in arguments)]


@contextlib.contextmanager
def started(*arguments: object, **environment: str) -> Iterator[Forked]:
    """The command line in a process group of its own; at the end it is gone, and all it started."""
    with _ended(Forked([str(argument) for argument in arguments], os.environ | environment)) as process:
        yield process


@contextlib.contextmanager
def started_anew(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The same in an interpreter of its own, which takes seconds to import torch."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )
    with _ended(process):
        yield process


Process = TypeVar("Process", Forked, subprocess.Popen[str])


@contextlib.contextmanager
def _ended(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.communicate()


def launch_stopped(study: Study, kind: Kind, due: Callable[[Job], Any] = lambda job: True) -> Job:
    """Launch ``study`` and stop it once, as Ctrl-C does, before a job of ``kind`` that is ``due``; that job."""
    measure, stopped = MEASURES[kind], []

    def stopping(runner: JobRunner, job: Job) -> Any:
        if not stopped and due(job):
            stopped.append(job)
            raise KeyboardInterrupt
        return measure(runner, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MEASURES, kind, stopping)
        with pytest.raises(Interrupted):
            study.launch(quiet())
    return stopped[0]


def finish(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    with started(*arguments, **environment) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def ctrl_c(process: Forked) -> tuple[str, str]:
    """What a terminal does: SIGINT to the whole process group. Returns standard output and error."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=PATIENCE)


def sigterm(process: Forked) -> tuple[str, str]:
    """What ``kill`` and schedulers do: SIGTERM to the launcher. Returns standard output and error."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=PATIENCE)


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> bool:
    """Poll until ``condition`` holds; False where ``alive`` ceased first."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if not alive():
            return False
        assert time.monotonic() < deadline, f"nothing happened for {PATIENCE} s"
        time.sleep(0.01)
    return True


def finished(run: Path) -> int:
    """How many trials of a run are complete, as the storage has it; 0 where there is none yet."""
    if not (run / "study.db").is_file():
        return 0
    try:
        database = sqlite3.connect(f"file:{run / 'study.db'}?mode=ro", uri=True, timeout=10)
        with contextlib.closing(database) as connection:
            return int(connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0])
    except sqlite3.OperationalError:  # the tables are being made
        return 0


def values_of(study: Study) -> dict[int, tuple[str | None, dict[str, float]]]:
    """Number -> (plan, values) of every complete trial."""
    return {row.number: (row.plan_key, row.values) for row in study.rows() if row.state == "complete"}


def contents(study: Study) -> tuple[bytes, list[Row]]:
    """All that a run holds: its definition, and every trial with its plan, values and report.

    Files are not compared: the database moves its journal about even when it is only read.
    """
    return study.run.file.read_bytes(), study.rows()


def check_whole(study: Study, before: dict[int, tuple[str | None, dict[str, float]]], trials: int) -> None:
    """The laws of going on: nothing that was finished is lost, nothing is repeated, nothing is left running."""
    after = values_of(study)
    assert {number: after[number] for number in before} == before
    plans = [plan for plan, _ in after.values()]
    assert len(set(plans)) == len(plans)
    rows = study.rows()
    assert {row.state for row in rows} <= {"complete", "failed", "waiting"}  # the queue outlasts a limit
    assert all(row.failure for row in rows if row.state == "failed")
    assert sum(row.counts for row in rows) == trials
    anchors = [row.origin for row in rows if row.state == "complete" and row.origin.startswith("anchor")]
    assert len(set(anchors)) == len(anchors)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verify_here(monkeypatch: Any) -> None:
    """Let an export verify itself in this process: a process of its own takes seconds to import torch."""
    from rankfront.search.output import export, verify

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            verify.main(*arguments[2:])
        return subprocess.CompletedProcess(arguments, 0, printed.getvalue(), "")

    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=run))
