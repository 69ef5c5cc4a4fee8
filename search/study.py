"""The study: launch, resume, read. The Python face of rankfront."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.choices import OURS, Format, Refit
from rankfront.search.config import SearchConfig, StudyConfig, load_config, make_config, preferred_loss, quality_of
from rankfront.search.constraint import Constraint
from rankfront.search.errors import Interrupted
from rankfront.search.inputs.device import DTYPES, count_devices, pick_device, pick_dtype, set_threads
from rankfront.search.inputs.model import load_tokenizer
from rankfront.search.inputs.outline import outline_of
from rankfront.search.inputs.own_text import OwnText, Progress
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.source import Source, cache_folder
from rankfront.search.inputs.text import cut, hash_tokens, scattered
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.ranks import measured_multiple, shapes_of
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import Setup, make_space
from rankfront.search.optimise import accuracy
from rankfront.search.optimise.answer import Answer, answer, menu_frame
from rankfront.search.optimise.halving import promotion_of
from rankfront.search.optimise.tuning import DEFAULT, Tuning
from rankfront.search.output.control_check import front_warning
from rankfront.search.output.export import Verified, export
from rankfront.search.plans.latency_table import Calibrated, timed_objectives, timings_of
from rankfront.search.plans.limits import COSTS
from rankfront.search.plans.plan import Prices
from rankfront.search.plans.reach import check_reachable
from rankfront.search.plans.space import Space
from rankfront.search.run.driver import Driver, Stop
from rankfront.search.run.progress import Display
from rankfront.search.storage import front as fronts
from rankfront.search.storage.checked import close, damages
from rankfront.search.storage.folder import Run
from rankfront.search.storage.front import Row
from rankfront.search.storage.picking import best_meeting, holding, holds, meeting

RUNS = Path("runs")
SCATTERED = "scattered"  # the order of windows of the search split in a run with rungs
SOLVES = 3  # plans measured for an answer at most, where tables predict a latency too low


@contextmanager
def _interrupts(stop: Stop) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM request a stop; a second one throws at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        again, stop.requested = stop.requested, True
        if again:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Study:
    """One search: its settings and its run folder.

    ::

        study = Study("studies/demo.toml")          # or a dictionary of the same shape
        study.launch()
        for row in study.front(): print(row.values, row.report)
        study.export("small", study.best("block_parameters<=0.8"))
    """

    config: StudyConfig
    run: Run
    tuning: Tuning

    def __init__(
        self,
        config: StudyConfig | Mapping[str, Any] | str | Path,
        run: str | Path | None = None,
        overrides: Sequence[str] = (),
        tuning: Tuning = DEFAULT,
    ) -> None:
        """From a study file, a dictionary of the same shape or a validated config; ``overrides`` are KEY=VALUE.

        The run folder is ``runs/<study file's name>`` unless named. ``tuning`` is for studies of our sampler; it is
        not kept with the run. Raises `InputError` where something is invalid.
        """
        if isinstance(config, StudyConfig):
            config = config.model_dump(mode="json")
        if isinstance(config, Mapping):
            self.config, name = make_config(dict(config), overrides), "study"
        else:
            self.config, name = load_config(Path(config), overrides), Path(config).stem
        self.run = Run(Path(run).expanduser() if run is not None else RUNS / name)
        self.tuning = tuning

    @classmethod
    def open(cls, run: str | Path) -> Study:
        """The study that was launched into a run folder."""
        found = Run(Path(run).expanduser())
        return cls(found.definition().config, found.path)

    # -- reading

    def rows(self) -> list[Row]:
        """Every trial, in order."""
        return fronts.rows_of(self._optuna(), list(self.config.objectives))

    def front(self, *constraints: str) -> list[Row]:
        """The non-dominated trials that meet ``constraints`` and the study's own, best in the first objective first."""
        return holding(fronts.front_of(self.rows()), self._limits(constraints))

    def best(self, *constraints: str) -> Row:
        """Of the complete trials that meet ``constraints`` and the study's own, the best in the first objective.

        With rungs, of those at which the front stands, or of a lower one where none there meets them. Raises
        `InputError` naming the closest trial where none does.
        """
        rows = self.rows()
        if not fronts.comparable(rows, rung=0):
            fronts.check_dense(rows)
        return best_meeting(rows, self._limits(constraints))

    def trial(self, number: int) -> Row:
        """One trial; `InputError` where it does not exist."""
        rows = {row.number: row for row in self.rows()}
        if number not in rows:
            known = f"0 to {max(rows)}" if rows else "none yet"
            raise InputError(f"run {str(self.run.path)!r} has no trial {number}: its trials are {known}")
        return rows[number]

    def knee(self, *constraints: str) -> Row:
        """Of the front members that meet ``constraints`` and the study's own, the nearest to the box's ideal corner."""
        box = self.box()
        return fronts.knee(meeting(fronts.front_of(self.rows()), self._limits(constraints)), box)

    def _limits(self, constraints: Sequence[str]) -> list[Constraint]:
        """The study's own limits and ``constraints``."""
        return [Constraint.parse(text) for text in (*self.config.search.where, *constraints)]

    def box(self) -> fronts.Box:
        """The box that hypervolume is measured in; `InputError` before the dense anchor is measured."""
        rows = self.rows()
        dense = fronts.dense_row(rows)
        if dense is None:
            fronts.check_dense(rows)
            raise InputError(f"run {str(self.run.path)!r} has not measured the dense model yet: launch it first")
        return fronts.box_of(self.config.objectives, dense)

    def hypervolume(self) -> float:
        """The share of the box that the front dominates."""
        return fronts.hypervolume(self.front(), self.box())

    def dense_report(self) -> dict[str, Any] | None:
        """What was measured of the dense model on the report split."""
        return next((row.report for row in self.rows() if row.is_dense and row.report), None)

    def warning(self, rows: Sequence[Row]) -> str | None:
        """One line where some of ``rows`` lose on the control text what the report split does not show."""
        return front_warning(rows, self.dense_report(), self.config.data.control.label)

    def calibration(self) -> accuracy.Calibration | None:
        """How well our sampler's predictions held; None where there are too few, or another sampler ran."""
        if self.config.search.sampler != OURS:
            return None
        return accuracy.calibration(self.rows(), quality_of(self.config))

    def latency(self) -> dict[str, Calibrated]:
        """How well the latency table predicted, for every latency among the objectives that has one."""
        rows = [row for row in self.rows() if row.state == "complete"]
        tables = timings_of(self.config.objectives, self._optuna().user_attrs)
        return {
            name: timing.calibrated(objective, [(row.plan, row.values[name]) for row in rows])
            for name, (objective, timing) in tables.items()
        }

    def latency_failure(self) -> str | None:
        """Why there is no latency table, where making it failed; the next launch tries again."""
        failure: str | None = self._optuna().user_attrs.get(keys.TIMING, {}).get(keys.FAILURE)
        return failure

    def damages(self) -> list[str]:
        """Records whose checksum does not match and that the next launch measures again, such as ``trial 3``."""
        return damages(self._optuna())

    def frame(self) -> pd.DataFrame:
        """Every trial as one row of a pandas frame."""
        return fronts.frame(self.rows())

    def _optuna(self, write: bool = False) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return self.run.study(self.config, write)

    def _state(self) -> fronts.StudyState:
        return fronts.StudyReader(self._optuna(), list(self.config.objectives)).read()

    def _space(self) -> Space:
        """What our sampler chooses from: a variable for each site."""
        return Space(outline_of(self.source).sites, self._settled.space, 0)

    def answer(self, *constraints: str) -> Answer:
        """The plan expected to be best within ``constraints``, such as ``block_parameters<=0.73``, and the study's own;
        not measured."""
        limits = [Constraint.parse(text) for text in constraints]
        return answer(self._state(), self._settled, self._space(), limits, self.tuning)

    def menu(self) -> pd.DataFrame:
        """What each option of each site stores and was predicted to hurt; see `answer.menu_frame`."""
        return menu_frame(self._state(), self._settled, self._space())

    @property
    def _settled(self) -> StudyConfig:
        """The configuration with the grid of ranks that the first launch found, where it was to ask the device."""
        known = self.run.definition().resolved.get("rank_multiple") if self.run.file.exists() else None
        return self.config if known is None else self.config.on_grid(int(known))

    # -- doing

    def solve(self, *constraints: str, console: Console | None = None) -> Row:
        """The plan expected to be best within ``constraints``, measured: one more trial, unless it was measured before.

        With rungs, one trial at each, up to the rung at which the front stands. Where a latency turns out above its
        limit though its table predicted otherwise, the next best is measured too, a few times at most. A plan may turn
        out worse than a trial that meets the limits too: what is returned is the best of all (see `best`).
        """
        timed = [
            limit for limit in self._limits(constraints) if limit.figure in timed_objectives(self.config.objectives)
        ]
        found = self.answer(*constraints)
        for tries_left in reversed(range(SOLVES)):
            row = self._measure(found, constraints, console)
            if found.trial is not None or row is None or all(holds(row, limit) for limit in timed) or not tries_left:
                break
            try:
                found = self.answer(*constraints)
            except InputError:  # nothing more is expected to meet them: what was measured decides
                break
        return self.best(*constraints)

    def _measure(self, found: Answer, constraints: Sequence[str], console: Console | None) -> Row | None:
        """The trial that measured what was found for ``constraints``, at the highest rung; None where it failed."""
        number = found.trial
        if number is None:
            with self.run.lock():
                storage = self._optuna(write=True)
                storage.enqueue_trial(found.draws, user_attrs={keys.ORIGIN: "solve", keys.LABEL: " ".join(constraints)})
                number = storage.get_trials(deepcopy=False)[-1].number
                close(storage)
        rows = self.rows()
        if promotion_of(rows, number) is not None:
            trials = sum(row.counts for row in rows) + max(len(self.config.search.rungs), 1)
            limits = {"trials": trials, "tokens": None, "time": None, "workers": 0}
            search = self.config.search.model_copy(update=limits)
            Study(self.config.model_copy(update={"search": search}), self.run.path).launch(console, only=number)
        measured = (row for row in self.rows() if row.plan_key == found.plan.key and row.state == "complete")
        return max(measured, key=lambda row: row.rung, default=None)

    def export(
        self, out: str | Path, row: Row | None = None, form: Format = "factored", refit: Refit | None = None
    ) -> Verified:
        """Write the model of ``row`` (by default the knee) to the new folder ``out``; see `export.export`.

        ``refit`` is the study's own unless given.
        """
        row, refit = row or self.knee(), refit or self.config.search.refit
        return export(self.setup(), row, Path(out).expanduser(), form, refit, self.dense_report())

    @property
    def source(self) -> Source:
        """Where the model comes from, resolved on this machine."""
        return resolve(self.config.model.name, self.config.model.trust_remote_code)

    def setup(
        self, progress: Progress = lambda phase, done, total: None, drawn: dict[str, Tensor] | None = None
    ) -> Setup:
        """Resolve the study on this machine: tokens, dtype, device, fingerprint, the grid of ranks.

        ``drawn`` has the model's own texts that the run knows, by default from its folder; what is sampled is added.
        """
        source = self.source
        earlier = self.run.definition().resolved if self.run.file.exists() else {}
        device = pick_device(earlier.get("device", self.config.model.device))
        search = self.config.search
        if device.startswith("cuda") and (search.workers or 0) > 1 and search.resources.gpu == 0:
            raise InputError(
                f"search.workers is {search.workers} on {device} and search.resources.gpu is 0: say what share of a GPU"
                " a trial takes, such as 0.5"
            )
        dtype = pick_dtype(earlier.get("dtype", self.config.model.dtype), device)
        cache = cache_folder().resolve()
        outline = outline_of(source, self.config.model.attention)
        outline.capacity.check_length(self.config.data.length, "data.length")  # before minutes of sampling
        own = OwnText(source, dtype, device, cache, self._own_text() if drawn is None else drawn, progress)
        tokens = cut(load_tokenizer(source), self.config.data.splits(), self.config.data.length, own)
        if self._scatters:
            tokens["search"] = scattered(tokens["search"])
        config = self._settled
        if config.space.rank_multiple == "device":
            timed = next(iter(timed_objectives(config.objectives).values()), None)
            shapes = shapes_of(outline.sites)
            config = config.on_grid(measured_multiple(shapes, config.space.every_keep, timed, device, dtype, cache))
        groups = 0 if search.sampler == OURS else search.groups
        loss = preferred_loss(config) or "perplexity"
        return Setup(config, source, outline, dtype, device, source.fingerprint, tokens, str(cache), groups, loss)

    def _own_text(self) -> dict[str, Tensor]:
        """The model's own texts that the run's folder has."""
        return {seed: torch.from_numpy(ids) for seed, ids in self.run.own_text().items()}

    def _check_limits(self, setup: Setup, space: Space) -> None:
        """Raise `InputError` where no plan of the space can meet the study's limits."""
        limits = self._limits(())
        if any(limit.figure in COSTS for limit in limits):
            prices = Prices(setup.outline.inside, setup.outline.parameters, DTYPES[setup.dtype].itemsize)
            check_reachable(limits, space.wanted(), prices)

    @property
    def _scatters(self) -> bool:
        """Whether rungs read windows from all over the search split; runs that an earlier version began go on as they
        were, with the text's beginning."""
        known = self.run.definition().resolved if self.run.file.exists() else {"windows": SCATTERED}
        return bool(self.config.search.rungs) and known.get("windows") == SCATTERED

    def tokens(self) -> int:
        """Tokens that trials and the menu have run through the model so far."""
        return self._state().tokens

    def launch(
        self,
        console: Console | None = None,
        address: str | None = None,
        rebuild: bool = False,
        report: bool = True,
        only: int | None = None,
    ) -> None:
        """Run the study until its limits are reached, or go on with it where an earlier launch stopped.

        ``report`` measures the front on the report split at the end; a later launch does it otherwise. ``only``
        measures the plan of that trial and nothing else, up to the rung at which the front stands.

        Raises `InputError` for what the user can mend and `Interrupted` on Ctrl-C or
        SIGTERM.
        """
        self.config = self.run.remembered(self.config)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        display = Display(console or Console(stderr=True))
        stop = Stop()
        with self.run.lock(), display, _interrupts(stop):
            try:
                self._launch(display, address, rebuild, report, stop, only)
            except KeyboardInterrupt as error:
                raise Interrupted(f"stopped; every finished trial is kept in {self.run.path}") from error

    def _launch(
        self, display: Display, address: str | None, rebuild: bool, report: bool, stop: Stop, only: int | None
    ) -> None:
        limits = self.config.search
        set_threads(limits.resources.cpu)

        def progress(phase: str, done: int, total: int) -> None:
            stop.check()
            display.phase(phase, done, total)

        drawn = self._own_text()
        known = set(drawn)
        setup = self.setup(progress, drawn)
        space = make_space(setup)
        hashes = {f"tokens.{name}": hash_tokens(windows) for name, windows in setup.tokens.items()}
        resolved = {"dtype": setup.dtype, "device": setup.device, "weights": setup.fingerprint, **hashes}
        if self.config.space.rank_multiple == "device":
            resolved["rank_multiple"] = str(setup.config.space.rank_multiple)
        if self._scatters:
            resolved["windows"] = SCATTERED
        self._check_limits(setup, space)
        if drawn.keys() != known:
            self.run.keep_own_text({seed: ids.numpy() for seed, ids in drawn.items()})
        self.run.define(self.config, resolved)
        placed = self._placed(setup.device, address)
        storage = self._optuna(write=True)
        try:
            driver = Driver(storage, placed, space, setup.origin(), display.search, report, stop, only, self.tuning)
            if rebuild or not driver.done:
                prepared = self._prepared(setup, space, progress, display, rebuild)
                self._measure_all(driver, prepared, placed.search, display, address)
        finally:
            close(storage)

    def _placed(self, device: str, address: str | None) -> StudyConfig:
        """The configuration with a number of workers: one for each device unless it says how many, none for a single
        device that needs no cluster, and a whole GPU for each where it does not say how much."""
        search = self.config.search
        if search.workers is not None:
            return self.config
        devices = count_devices(device)
        workers = devices if devices > 1 or address is not None else 0
        share = search.resources.gpu or float(device.startswith("cuda") and workers > 0)
        resources = search.resources.model_copy(update={"gpu": share})
        search = search.model_copy(update={"workers": workers, "resources": resources})
        return self.config.model_copy(update={"search": search})

    def _prepared(self, setup: Setup, space: Space, progress: Progress, display: Display, rebuild: bool) -> Setup:
        """``setup`` once every factor that can be made is in the store."""
        store = prepare_store(setup, space, progress, anew=rebuild)
        display.unmade(store)
        return replace(setup, unmade=store.unmade)

    def _measure_all(
        self, driver: Driver, setup: Setup, limits: SearchConfig, display: Display, address: str | None
    ) -> None:
        display.search(driver)
        driver.begin()
        try:
            if not limits.workers:
                runner = JobRunner(setup)
                while not driver.done:
                    job = driver.next()
                    if job is not None:
                        driver.finish(job, runner.run(job))
            else:
                from rankfront.search.run import workers  # ray is loaded only where it is used

                workers.run(driver, setup, limits.workers, limits.resources, address)
        finally:
            driver.abandon()
