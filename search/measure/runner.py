"""Runs jobs on the resident model: a job in, one flat record out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from torch import nn

from rankfront.methods import InputError, Option, Site
from rankfront.objectives import Clock, Subject, Teacher, make_objective, score, teach
from rankfront.objectives._running import note_running
from rankfront.search.attributes import SLOPE_TOKENS, STORED
from rankfront.search.errors import reason_of
from rankfront.search.factors.store import Unfactored
from rankfront.search.inputs.device import DTYPES, drop_unreachable, failure_of, give_back_memory
from rankfront.search.inputs.own_text import Progress
from rankfront.search.inputs.text import hash_tokens
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.control import reported
from rankfront.search.measure.evaluation_tokens import EvaluationTokens
from rankfront.search.measure.predictions import MENU_TOKENS, PROBE_TOKENS, predict
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.setup import Setup
from rankfront.search.measure.slopes import measure_slopes
from rankfront.search.measure.timed_model import TimedModel
from rankfront.search.measure.timing import time_sites, time_whole
from rankfront.search.names import inside_blocks
from rankfront.search.plans.job import PASSES, Job, Kind, Record
from rankfront.search.plans.latency_table import pack
from rankfront.search.plans.menu import values_stored
from rankfront.search.plans.menu_jobs import menu_jobs
from rankfront.search.plans.plan import Plan, cost_of


class JobRunner:
    """A compressed model, the tokens that it is evaluated on, and the dense model's predictions on them.

    ``progress`` hears of what takes long: phase, done, total.
    """

    def __init__(self, setup: Setup, progress: Progress = lambda phase, done, total: None) -> None:
        self.setup = setup
        self.progress = progress
        self.compressed = CompressedModel(setup, progress)
        self.timed = TimedModel(self.compressed)
        search, read, seed = setup.tokens["search"], setup.config.trial_windows, setup.config.search.seed
        self.tokens = EvaluationTokens(search, read, seed, setup.task.labelled)
        self.trial_teacher: Teacher | None = None  # on the windows that trials read
        self.probe_teacher: Teacher | None = None  # on the windows of the menu's probes

    def run(self, job: Job) -> Record:
        """Measure ``job``. A failure of the trial is a value of the record (``failure``), never an exception; ``lost``
        is there too where memory was short, else the ``place`` in the code where it was raised.

        `InputError` (a corrupt factor file, say) is raised: it would fail every trial alike.
        """
        store = self.compressed.store
        try:
            record = MEASURES[job.kind](self, job)
            store.check()
            if job.kind in ("menu", "slopes"):  # which look at every option of every site
                give_back_memory()
            return record
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs this trial
            record = cast(Record, failure_of(error))
            if isinstance(error, Unfactored):  # which says itself what it is
                del record["place"]
        self._recover()  # outside the handler, whose traceback holds on to the failed trial's tensors
        store.check()
        return record

    def _recover(self) -> None:
        """Back to dense, with whatever the failed trial still held given back."""
        self.compressed.apply(Plan(()))
        drop_unreachable()

    def refitted_perplexity(self, plan: Plan, clock: Clock) -> Record:
        """Perplexity on the report split after a refit, or why there is none: what was measured without it counts."""
        try:
            with clock.phase("refit"), refitted(self.compressed, plan):
                perplexity = score(self.compressed.model, self.setup.tokens["report"], task=self.setup.task).perplexity
            return {"refitted": perplexity} if math.isfinite(perplexity) else {"refit_failure": f"{perplexity=}"}
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - what was measured without it counts
            reason = reason_of(error)
        self._recover()
        return {"refit_failure": reason}

    def teacher(self) -> Teacher:
        """The dense model's predictions on the windows that trials read, computed once."""
        if self.trial_teacher is None:
            with self.compressed.dense():
                self.trial_teacher = teach(self.compressed.model, self.tokens.windows, task=self.setup.task)
        return self.trial_teacher

    def subject(self, plan: Plan, clock: Clock) -> Subject:
        """``plan`` applied, ready for objectives on the windows that trials read."""
        compressed = self.compressed
        with clock.phase("apply"):
            compressed.apply(plan)
        if self.timed.objectives:
            with clock.phase("join"):
                self.timed.join()
        value_bytes = DTYPES[self.setup.dtype].itemsize
        block_values = self.setup.outline.coverage.block_values
        cost = cost_of(plan, inside_blocks(compressed.sites), compressed.dense_values, value_bytes, block_values)
        teacher = None
        if "divergence" in self.setup.config.objectives:
            with clock.phase("teacher"):
                teacher = self.teacher()
        dense = compressed.dense if compressed.modules else None
        return Subject(
            compressed.model, dense, self.tokens.windows, teacher, cost, clock, tokenizer=compressed.tokenizer,
            engines=self.timed.engines, task=self.setup.task,
        )  # fmt: skip


def _noted(subject: Subject) -> Record:
    """Have the notes say how the model runs; where that cannot be told, why, and it costs no trial."""
    try:
        note_running(subject)
    except Exception as error:  # noqa: BLE001 - of models that run in ways of their own
        return {"notes_failure": reason_of(error)}
    return {}


def measure_trial(runner: JobRunner, job: Job) -> Record:
    """The study's objectives of a plan, on the windows that trials read."""
    clock, config = Clock(), runner.setup.config
    with clock.phase("total"):
        taught = runner.trial_teacher is not None
        subject = runner.subject(job.plan, clock)
        values = {name: make_objective(name, settings).value(subject) for name, settings in config.objectives.items()}
        perplexity = subject.scores.perplexity
        noted = _noted(subject)
    named = {site.name: site for site in runner.compressed.sites}
    bad = {name: value for name, value in {"perplexity": perplexity, **values}.items() if not math.isfinite(value)}
    if bad:
        return {"failure": f"not finite: {', '.join(f'{name} is {value}' for name, value in bad.items())}"}
    return {
        "values": values,
        STORED: [values_stored(named[site], option) for site, option in job.plan.choices],
        "perplexity": perplexity,
        "parameters": subject.cost.parameters,
        "block_parameters": subject.cost.block_parameters,
        "parameter_count": subject.cost.values,
        "block_parameter_count": subject.cost.block_values,
        "bytes": subject.cost.bytes,
        "tokens": subject.scores.tokens + (0 if taught or subject.teacher is None else subject.windows.numel()),
        "fidelity": subject.windows.numel(),
        "notes": subject.notes,
        **noted,
        "seconds": clock.seconds,
        "split": hash_tokens(subject.windows),
        "seed": config.search.seed,
    }


def measure_report(runner: JobRunner, job: Job) -> Record:
    """A front member on the report split and the control text, and what it says; refitted too, where the study asks."""
    clock, compressed = Clock(), runner.compressed
    with clock.phase("apply"):
        compressed.apply(job.plan)
    with clock.phase("evaluate"):
        record = reported(
            compressed.model, runner.setup.tokens, compressed.tokenizer, runner.setup.config.tasks, runner.setup.task
        )
    if "failure" not in record and runner.setup.config.search.refit == "sequential" and job.plan.choices:
        record |= runner.refitted_perplexity(job.plan, clock)
    return record | {"seconds": clock.seconds}


def measure_menu(runner: JobRunner, job: Job) -> Record:
    """Predicted divergence of every option alone, from the source that the study names: the sites of one job.

    A job with a plan measures the divergence of that plan instead, which predictions are scaled by.
    """
    clock, compressed, search = Clock(), runner.compressed, runner.setup.config.search
    if job.plan.choices:
        with clock.phase("menu"):
            return _probe(runner, job.plan) | {"seconds": clock.seconds}
    compressed.apply(job.plan)
    wanted = compressed.store.usable(compressed.space.wanted())
    jobs = menu_jobs(search.menu, len(compressed.space.choices))
    own = dict(list(wanted.items())[job.number :: jobs])
    with clock.phase("menu"):
        windows = runner.tokens.spare(0, MENU_TOKENS)
        found = predict(
            compressed.model, compressed.apply_one, windows, own, compressed.store, search.menu, search.seed,
            partial(runner.progress, "gradient"), runner.setup.task,
        )  # fmt: skip
    return found | {"seconds": clock.seconds}


def _probe(runner: JobRunner, plan: Plan) -> Record:
    """Measured divergence of a plan, and what it treats."""
    compressed, windows = runner.compressed, runner.tokens.spare(0, PROBE_TOKENS)
    tokens = windows.numel()
    if runner.probe_teacher is None:
        tokens += windows.numel()
        with compressed.dense():
            runner.probe_teacher = teach(compressed.model, windows, task=runner.setup.task)
    compressed.apply(plan)
    divergence = score(compressed.model, windows, runner.probe_teacher, runner.setup.task).divergence
    return {
        "probed": {site: option.label for site, option in plan.by_site.items()},
        "divergence": divergence if math.isfinite(divergence) else None,
        "tokens": tokens,
    }


def measure_plan_slopes(runner: JobRunner, job: Job) -> Record:
    """What switching any option of the plan changes: site -> [a, b], in the order of its variable's options."""
    clock, compressed, setup = Clock(), runner.compressed, runner.setup
    windows, teacher = runner.tokens.spare(job.number, job.tokens), None
    if setup.loss == "divergence":
        with clock.phase("teacher"):
            compressed.apply(Plan(()))
            teacher = teach(compressed.model, windows, task=setup.task)
    with clock.phase("apply"):
        compressed.apply(job.plan)
    with clock.phase("slopes"), compressed.anchored():
        found = measure_slopes(
            compressed.model,
            windows,
            compressed.store.usable(compressed.space.wanted()),
            compressed.current,
            compressed.dense_modules,
            compressed.store,
            teacher,
            setup.config.search.seed + job.number,
            partial(runner.progress, "slopes"),
            setup.task,
        )
    packed = {}
    alike = compressed.space.alike
    for name, options in compressed.space.options.items():
        known = [found.get(site.name, {}) for site in alike[name]] if name in alike else [found.get(name, {})]
        if all(known):
            pairs = [[own.get(option.label) for own in known] for option in options]
            packed[name] = [[_sum(pair, i) for pair in pairs] for i in (0, 1)]
    read = windows.numel()
    return {"slopes": packed, SLOPE_TOKENS: read, "tokens": PASSES[setup.loss] * read, "seconds": clock.seconds}


def _sum(pairs: Sequence[tuple[float, float] | None], place: int) -> float | None:
    """Of what several sites have at one ``place``, to four digits; None where one has nothing."""
    total = 0.0
    for pair in pairs:
        if pair is None:
            return None
        total += pair[place]
    return float(f"{total:.4g}")


def measure_timing(runner: JobRunner, job: Job) -> Record:
    """The latency table of every latency among the objectives: name -> sites and the whole dense model."""
    clock, compressed = Clock(), runner.compressed
    store, dense, watches = compressed.store, compressed.dense_modules, runner.timed.watches
    compressed.apply(job.plan)
    places = compressed.sites.items() if runner.setup.task.generates else ()
    outside = {site.name for site, place in places if place.block is None}

    def made(site: Site, option: Option) -> dict[str, nn.Module]:
        factors = store.factors(site, option)
        return compressed.made({w.role: (w.path,) for w in site.weights if w.role in factors}, factors)

    wanted, found = store.usable(compressed.space.wanted()), {}
    with clock.phase("timing"):
        for name, objective in runner.timed.tabulated.items():
            sites = time_sites(objective, wanted, outside, dense, store, made, watches)
            whole = time_whole(objective, compressed.model, runner.setup.tokens["search"], runner.setup.task)
            found[name] = {"sites": pack(sites), "whole": whole}
    return {"timing": found, "seconds": clock.seconds}


MEASURES: dict[Kind, Callable[[JobRunner, Job], Record]] = {
    "trial": measure_trial,
    "report": measure_report,
    "menu": measure_menu,
    "slopes": measure_plan_slopes,
    "timing": measure_timing,
}
