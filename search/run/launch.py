"""A launch: the study resolved, its factors made, and every job of the scheduler measured."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.errors import Interrupted
from rankfront.search.inputs.acceptance import refusals
from rankfront.search.inputs.device import DTYPES, set_threads
from rankfront.search.inputs.known_sites import pack_sites
from rankfront.search.inputs.own_text import Progress
from rankfront.search.measure.footprint import footprint_of
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import Setup, make_space
from rankfront.search.names import inside_blocks
from rankfront.search.plans.limits import COSTS
from rankfront.search.plans.plan import Prices
from rankfront.search.plans.reach import check_reachable
from rankfront.search.plans.space import Space
from rankfront.search.run.progress import Display
from rankfront.search.run.resolving import accepted, heal_windows, make_setup, own_text, placed, resolved_as
from rankfront.search.run.scheduler import Scheduler, Stop
from rankfront.search.storage.checked import close
from rankfront.search.storage.folder import Run


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


@dataclass(frozen=True)
class Launch:
    """One launch of a study.

    Attributes:
        run: its folder.
        config: the study, paths as the first launch had them.
        address: of an existing Ray cluster.
        rebuild: whether to factor everything again.
        report: whether the front is measured on the report split at the end.
        only: the trial whose plan alone is measured.
    """

    run: Run
    config: StudyConfig
    address: str | None = None
    rebuild: bool = False
    report: bool = True
    only: int | None = None

    def measure(self, console: Console | None = None) -> None:
        """Run the study until its limits are reached, or go on with it where an earlier launch stopped.

        Raises `InputError` for what the user can mend and `Interrupted` on Ctrl-C or SIGTERM.
        """
        logging.getLogger("alembic").setLevel(logging.ERROR)
        display = Display(console or Console(stderr=True))
        stop = Stop()
        with self.run.lock(), display, _interrupts(stop):
            try:
                self._measure(display, stop)
            except KeyboardInterrupt as error:
                raise Interrupted(f"stopped; every finished trial is kept in {self.run.path}") from error

    def _measure(self, display: Display, stop: Stop) -> None:
        set_threads(self.config.search.resources.cpu)

        def progress(phase: str, done: int, total: int) -> None:
            stop.check()
            display.phase(phase, done, total)

        drawn = own_text(self.run)
        known = set(drawn)
        setup = make_setup(self.run, self.config, progress, drawn)
        if not self.run.resolved():
            setup = accepted(setup, progress)
        for line in (*setup.outline.coverage.lines(), *refusals(setup.refused)):
            display.say(line)
        space = make_space(setup)
        check_limits(setup, space)
        takes = footprint_of(setup)
        if not self.run.resolved():  # before its settings are those of a run
            takes.peak.check(torch.device(setup.device))
        if self.config.search.heal != "none":  # a text that is too short is refused before anything is measured
            heal_windows(self.run, self.config, setup, progress, drawn)
        if drawn.keys() != known:
            self.run.keep_own_text({seed: ids.numpy() for seed, ids in drawn.items()})
        self.run.define(self.config, resolved_as(self.run, self.config, setup))
        config = placed(self.config, setup.device, self.address)
        storage = self.run.study(config, write=True)
        try:
            if keys.SITES not in storage.user_attrs:
                storage.set_user_attr(keys.SITES, pack_sites(space.sites))
            listener, origin = display.search, setup.origin()
            scheduler = Scheduler(storage, config, space, origin, listener, self.report, stop, self.only)
            if self.rebuild or not scheduler.done:
                display.say(takes.peak.line(torch.device(setup.device)))
                prepared = _prepared(setup, space, progress, display, self.rebuild)
                display.search(scheduler.status())
                scheduler.begin()
                measure_all(scheduler, prepared, config, self.address, display.phase)
        finally:
            close(storage)


def _prepared(setup: Setup, space: Space, progress: Progress, display: Display, rebuild: bool) -> Setup:
    """``setup`` once every factor that can be made is in the store."""
    store = prepare_store(setup, space, progress, anew=rebuild)
    display.unmade(store)
    return replace(setup, unmade=store.unmade)


def measure_all(
    scheduler: Scheduler,
    setup: Setup,
    config: StudyConfig,
    address: str | None,
    progress: Progress = lambda phase, done, total: None,
) -> None:
    """Measure what the scheduler asks for until it is done, on workers or in this process, whose ``progress`` is
    heard."""
    try:
        if config.search.workers:
            from rankfront.search.run import workers  # ray is loaded only where it is used

            workers.run(scheduler, setup, config.search.workers, config.search.resources, address)
            return
        runner = JobRunner(setup, progress)
        while not scheduler.done:
            job = scheduler.next()
            if job is not None:
                scheduler.finish(job, runner.run(job))
    finally:
        scheduler.abandon()


def check_limits(setup: Setup, space: Space) -> None:
    """Raise `InputError` where no plan of the space can meet the study's limits."""
    limits = [Constraint.parse(text) for text in setup.config.search.where]
    if any(limit.figure in COSTS for limit in limits):
        outline = setup.outline
        prices = Prices(
            inside_blocks(outline.sites),
            outline.parameters,
            DTYPES[setup.dtype].itemsize,
            outline.coverage.block_values,
        )
        check_reachable(limits, space.wanted(), prices)
