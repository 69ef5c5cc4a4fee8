"""The Ray Tune executor: resident workers as Trainables. The only file that imports ray."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our progress line is the one on the terminal
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours to handle
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the study mean the launcher's folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own future default; says so otherwise

import ray
from ray import tune
from ray.tune.search import Searcher

from rankfront.methods import InputError
from rankfront.search.config import ResourcesConfig
from rankfront.search.device import set_threads
from rankfront.search.driver import Driver, Stop
from rankfront.search.plan import Plan
from rankfront.search.trial import Job, Record, Resident, Setup

FINISHED: str = Searcher.FINISHED
DIED = "the worker process died (out of memory, or killed)"


class Worker(tune.Trainable):
    """One resident model. Tune reuses it from job to job through `reset_config`."""

    def setup(self, config: dict[str, Any], setup: Setup, cpus: float) -> None:
        set_threads(cpus)
        self.refused: str | None = None
        try:
            self.resident = Resident(setup)
        except Exception as error:  # noqa: BLE001 - whatever it is, every trial would meet it: say it once
            self.refused = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        self.job = config["job"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config["job"]
        return True

    def step(self) -> dict[str, Any]:
        return {"record": _Sealed(self._measure()), "done": True}

    def _measure(self) -> Record:
        if self.refused is None:
            kind, number, plan, rung, tokens = self.job
            try:
                return self.resident.run(Job(kind, number, Plan.from_json(plan), rung, tokens))
            except InputError as error:
                self.refused = str(error)
        return {"refused": self.refused}


class _Sealed:
    """Carries a record through Tune, which would flatten a plain dictionary."""

    def __init__(self, record: Record) -> None:
        self.record = record


class _Watch(tune.Callback):
    """Looks for a requested stop at every step of Tune's loop, a few times a second."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.stop.check()


class _Bridge(Searcher):
    """Tune's view of the driver: suggest is `Driver.next`, on_trial_complete is `Driver.finish`."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(metric="done", mode="max")
        self.driver = driver
        self.jobs: dict[str, Job] = {}
        self.error: BaseException | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None or self.driver.done:
            return FINISHED
        try:
            job = self.driver.next()
        except (KeyboardInterrupt, InputError) as raised:
            self.error = raised
            return FINISHED
        if job is None:
            return FINISHED if self.driver.done else None
        self.jobs[trial_id] = job
        return {"job": (job.kind, job.number, job.plan.to_json(), job.rung, job.tokens)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.jobs.pop(trial_id)
        try:
            if error or result is None:
                self.driver.lost(job, DIED)
                return
            record = result["record"].record
            if "refused" in record:  # the job stays running: it is marked interrupted, and measured another time
                raise InputError(record["refused"])
            self.driver.finish(job, record)
        except Exception as raised:  # noqa: BLE001 - Tune would swallow it; `run` raises it again
            self.error = raised

    def __getstate__(self) -> dict[str, Any]:
        """Nothing either: Tune pickles its searcher into its scratch folder, which nobody reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's storage is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


def run(driver: Driver, setup: Setup, workers: int, resources: ResourcesConfig, address: str | None) -> None:
    """Measure until the driver is done, on ``workers`` resident workers of a new local cluster or of ``address``.

    Raises `InputError` where a worker refused the study for a cause that is the user's.
    """
    bridge = _Bridge(driver)
    with _connected(address, workers, resources), tempfile.TemporaryDirectory(prefix="rankfront-tune-") as scratch:
        trainable = tune.with_resources(
            tune.with_parameters(Worker, setup=setup, cpus=resources.cpu),
            {"cpu": resources.cpu, "gpu": resources.gpu},
        )
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=bridge, num_samples=-1, reuse_actors=True, max_concurrent_trials=workers
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[_Watch(driver.stop)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if bridge.error is not None:
        raise bridge.error


@contextmanager
def _connected(address: str | None, workers: int, resources: ResourcesConfig) -> Iterator[None]:
    """Within, Ray runs; after, it is shut down unless it ran before."""
    theirs = ray.is_initialized()
    try:
        _connect(address, workers, resources)
        yield
    finally:
        if not theirs:
            ray.shutdown()


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
        cpus = max(os.cpu_count() or 1, math.ceil(workers * resources.cpu))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    there = ray.cluster_resources()
    for name, wanted in (("CPU", resources.cpu), ("GPU", resources.gpu)):
        if wanted > there.get(name, 0):
            raise InputError(
                f"search.resources.{name.lower()} is {wanted:g} and Ray has {there.get(name, 0):g} in all: ask for less"
            )
