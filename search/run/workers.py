"""The Ray Tune executor: resident workers as Trainables. The only file that imports ray."""

from __future__ import annotations

import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our progress line is the one on the terminal
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours to handle
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the study mean the launcher's folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own future default; says so otherwise
os.environ.setdefault("RAY_worker_niceness", "0")  # added to the launcher's; Ray's default is 15

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from rankfront.methods import InputError
from rankfront.search.config import ResourcesConfig
from rankfront.search.inputs.device import out_of_memory, set_threads
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import Setup
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.plan import Plan
from rankfront.search.run.scheduler import Scheduler

FINISHED: str = Searcher.FINISHED
DIED = "the worker process died"
KILLED = f"{DIED}: killed, as the system does where memory is short, or crashed"
UNKNOWN = "connection error code 2"  # how Ray says that a process ended without a word
WORKER_BYTES = 4e8  # of a process with torch 2.13 and Ray 2.60 that it shares with no other, as Linux counts them
NAP, LONGEST_NAP = 0.1, 2.0  # seconds that a worker without a job waits, the first time in a row and at most


class Worker(tune.Trainable):
    """One resident model. Tune reuses it from job to job through `reset_config`."""

    def setup(self, config: dict[str, Any], setup: Setup, cpus: float) -> None:
        set_threads(cpus)
        self.refused: str | None = None
        try:
            self.runner = JobRunner(setup)
        except Exception as error:  # whatever else it is, every trial would meet it: say it once
            if out_of_memory(error):
                raise
            self.refused = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job, self.nap = new_config["job"], new_config["nap"]
        return True

    def step(self) -> dict[str, Any]:
        return {"record": _Sealed(self._measure()), "done": True}

    def _measure(self) -> Record:
        if self.job is None:
            time.sleep(self.nap)
        elif self.refused is None:
            kind, number, plan, tokens = self.job
            try:
                return self.runner.run(Job(kind, number, Plan.from_json(plan), tokens))
            except InputError as error:
                self.refused = str(error)
        return {"refused": self.refused}


class _Sealed:
    """Carries a record through Tune, which would flatten a plain dictionary."""

    def __init__(self, record: Record) -> None:
        self.record = record


def reason_of(text: str) -> str:
    """What took a worker, in one line, from Ray's words: the last line of its traceback, or what is known of its death.

    Of an exception's message that is its first line; of a process, its exit code or signal where Ray knows them.
    """
    lines = text.strip().splitlines()
    if not lines:
        return DIED
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith("File ")]
    if frames:
        return next((line for line in lines[frames[-1] + 1 :] if line[:1].strip()), lines[-1])
    if UNKNOWN in lines[-1]:
        return KILLED
    return f"{DIED}: {lines[-1].rpartition('Worker exit detail: ')[2]}"


class _Watch(tune.Callback):
    """Looks for a requested stop at every step of Tune's loop, a few times a second; passes on why a worker died."""

    def __init__(self, bridge: _Bridge) -> None:
        self.bridge = bridge

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.bridge.scheduler.stop.check()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        words = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        self.bridge.died(trial.trial_id, reason_of(words))


class _InTurn(FIFOScheduler):
    """Leaves it to Tune's queue which job a free worker gets: the newest. Tune's scheduler names the oldest, though its
    own worker is starting, which is ended then, and another started in its place."""

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        return None


class _Bridge(Searcher):
    """Tune's view of the scheduler: suggest is `Scheduler.next`, on_trial_complete is `Scheduler.finish`.

    Tune ends an actor that has nothing to do while another is, or starts, and makes a new one for the next job. So a
    worker without a job is told to wait for a moment instead.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(metric="done", mode="max")
        self.scheduler = scheduler
        self.jobs: dict[str, Job | None] = {}
        self.actors = 0  # that live, or start
        self.naps = 0  # since there was a job
        self.error: BaseException | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None or self.scheduler.done:
            return FINISHED
        try:
            job = self.scheduler.next()
        except (KeyboardInterrupt, InputError) as raised:
            self.error = raised
            return FINISHED
        if job is None and self.scheduler.done:
            return FINISHED
        if job is None and len(self.jobs) >= self.actors:
            return None
        self.jobs[trial_id] = job
        self.actors = max(self.actors, len(self.jobs))
        self.naps = self.naps + 1 if job is None else 0
        told = None if job is None else (job.kind, job.number, job.plan.to_json(), job.tokens)
        return {"job": told, "nap": min(NAP * self.naps, LONGEST_NAP)}

    def died(self, trial_id: str, reason: str) -> None:
        """The actor of a Tune trial is gone."""
        self.actors -= 1
        job = self.jobs.pop(trial_id)
        try:
            if job is not None:
                self.scheduler.lost(job, reason)
        except Exception as raised:  # noqa: BLE001 - as below
            self.error = raised

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error or result is None:  # `died` hears of it too, and why
            return
        job = self.jobs.pop(trial_id)
        try:
            if job is None:
                return
            record = result["record"].record
            if "refused" in record:  # the job stays running: it is marked interrupted, and measured another time
                raise InputError(record["refused"])
            self.scheduler.finish(job, record)
        except Exception as raised:  # noqa: BLE001 - Tune would swallow it; `run` raises it again
            self.error = raised

    def __getstate__(self) -> dict[str, Any]:
        """Nothing either: Tune pickles its searcher into its scratch folder, which nobody reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's storage is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


def run(scheduler: Scheduler, setup: Setup, workers: int, resources: ResourcesConfig, address: str | None) -> None:
    """Measure until the scheduler is done, on ``workers`` resident workers of a new local cluster or of ``address``.

    Raises `InputError` where a worker refused the study for a cause that is the user's.
    """
    bridge = _Bridge(scheduler)
    with _connected(address, workers, resources), tempfile.TemporaryDirectory(prefix="rankfront-tune-") as scratch:
        trainable = tune.with_resources(
            tune.with_parameters(Worker, setup=setup, cpus=resources.cpu),
            {"cpu": resources.cpu, "gpu": resources.gpu},
        )
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=bridge,
                scheduler=_InTurn(),
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=workers,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[_Watch(bridge)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if bridge.error is not None:
        raise bridge.error


@contextmanager
def _connected(address: str | None, workers: int, resources: ResourcesConfig) -> Iterator[None]:
    """Within, Ray runs; after, it is shut down unless it ran before."""
    theirs, terminated = ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    try:
        _connect(address, workers, resources)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # which Ray takes for itself
        yield
    finally:
        if not theirs:
            ray.shutdown()


def why_not() -> str | None:
    """Why Ray does not start here, in a line; None where it does."""
    try:
        with _connected(None, 1, ResourcesConfig(cpu=1)):
            return None
    except (InputError, RuntimeError, ConnectionError, ValueError, OSError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_machine(workers: int, resources: ResourcesConfig) -> None:
    """Raise `InputError` where this machine cannot have so many workers, or none that large."""
    cores = max(os.cpu_count() or 1, math.ceil(ResourcesConfig().cpu))
    if resources.cpu > cores:
        raise InputError(f"search.resources.cpu is {resources.cpu:g} and this machine has {cores}: ask for less")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if workers * WORKER_BYTES > memory:
        raise InputError(
            f"search.workers is {workers}, each is a process of {WORKER_BYTES / 1e9:g} GB beside its model, and this"
            f" machine has {memory / 1e9:.0f} GB: use {int(memory // WORKER_BYTES)} or fewer"
        )


def _connect(address: str | None, workers: int, resources: ResourcesConfig) -> None:
    for name in ("ray.tune", "ray.air", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is in the records, with its reason
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is not None and address.startswith("ray://"):
        raise InputError(
            f"--address {address!r} is a Ray Client's: launch on a node of the cluster, with --address auto"
        )
    if address is not None:
        try:
            ray.init(address=address, ignore_reinit_error=True, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"no Ray cluster answers at {address!r} ({reason}): check --address, or leave it out"
            raise InputError(message) from error
    elif not ray.is_initialized():
        _check_machine(workers, resources)
        cpus = max(os.cpu_count() or 1, math.ceil(workers * resources.cpu))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    there = ray.cluster_resources()
    for name, wanted in (("CPU", resources.cpu), ("GPU", resources.gpu)):
        if wanted > there.get(name, 0):
            raise InputError(
                f"search.resources.{name.lower()} is {wanted:g} and Ray has {there.get(name, 0):g} in all: ask for less"
            )
