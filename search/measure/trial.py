"""A trial: plan -> compressed resident model -> objectives -> one flat record."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import DENSE, DENSE_OPTION, Factors, InputError, Option, Site, get_method
from rankfront.methods.layers import replacement, row_scale, set_module
from rankfront.objectives import Clock, Subject, Teacher, make_objective, score, teach
from rankfront.objectives.latency import Latency, Timed
from rankfront.objectives.memory import note_running
from rankfront.search.config import StudyConfig
from rankfront.search.factors.calibration import calibrate, shared_inputs
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs.device import DTYPES, give_back_memory, out_of_memory
from rankfront.search.inputs.model import (
    Source,
    check_length,
    check_tokens,
    count_parameters,
    find_sites,
    load_model,
    load_tokenizer,
    skeleton,
    use_attention,
    weights_at,
)
from rankfront.search.inputs.text import GOLDEN, hash_tokens
from rankfront.search.measure.control import continuations
from rankfront.search.measure.joining import join_faster
from rankfront.search.measure.predictions import MENU_TOKENS, PROBE_TOKENS, predict
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.slopes import measure_slopes
from rankfront.search.measure.timing import Stopwatches, time_sites, time_whole
from rankfront.search.names import Place
from rankfront.search.optimise.goal import quality_of
from rankfront.search.optimise.samplers import OURS
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.latency_table import pack, timed_objectives
from rankfront.search.plans.menu_jobs import menu_jobs
from rankfront.search.plans.plan import Plan, check_disjoint, check_option, cost_of
from rankfront.search.plans.slope_cost import PASSES
from rankfront.search.plans.space import Single, Space

Progress = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to build its resident model, plain enough to send anywhere.

    Attributes:
        config: the validated study.
        source: the model, resolved where the study was launched: paths are absolute.
        dtype, device: as resolved at the study's first launch.
        fingerprint: hash of the weights.
        tokens: split -> windows (W, L).
        cache: folder of the factor store.
        unmade: factor files that this launch could not make, and why: its trials that want them fail.
    """

    config: StudyConfig
    source: Source
    dtype: str
    device: str
    fingerprint: str
    tokens: dict[str, Tensor]
    cache: str
    unmade: Mapping[Path, str] = field(default_factory=dict)

    def store(self) -> FactorStore:
        text = f"{hash_tokens(self.tokens['calibrate'])} {self.dtype}"
        return FactorStore(self.fingerprint, text, DTYPES[self.dtype], Path(self.cache), self.unmade)

    def origin(self) -> dict[str, str]:
        """What a plan of this study says it belongs to."""
        calibration = hash_tokens(self.tokens["calibrate"])
        return {
            "model": self.config.model.name,
            "fingerprint": self.fingerprint,
            "calibration": calibration,
            "dtype": self.dtype,
        }


def make_space(setup: Setup) -> Space:
    """The study's space, from the model's skeleton: no weights are read."""
    model = skeleton(setup.source)
    use_attention(model, setup.config.model.attention)
    check_tokens(model, setup.tokens)
    for name, timed in timed_objectives(setup.config.objectives).items():
        check_length(model, timed.prompt + timed.decode, f"objectives.{name}.prompt + decode")
    ours = setup.config.search.sampler == OURS
    return Space(find_sites(model), setup.config.space, 0 if ours else setup.config.search.groups)


def _check_same_sites(planned: Mapping[Site, Place], loaded: Mapping[Site, Place]) -> None:
    """Raise `InputError` where the space was made of other sites than the loaded model has."""
    different = planned.keys() ^ loaded.keys()
    if different:
        name = min(site.name for site in different)
        raise InputError(
            f"{name!r} is another site in the loaded model than by its configuration alone: make config.json agree with"
            " the checkpoint, such as in tie_word_embeddings"
        )


def prepare_store(setup: Setup, space: Space, progress: Progress, anew: bool = False) -> FactorStore:
    """The study's store, once whatever it lacks for ``space`` is calibrated and factored, or with ``anew`` all of it.

    Weights are factored as the checkpoint has them; calibration runs in the evaluation dtype.
    """
    store = setup.store()
    missing = space.wanted() if anew else store.missing(space.wanted())
    if not missing:
        return store
    store.drop_partials(space.methods)
    progress("load", 0, 1)
    weights_from = load_model(setup.source, "auto", setup.device)
    dtype = DTYPES[setup.dtype]
    same = next(weights_from.parameters()).dtype == dtype
    model = weights_from if same else copy.deepcopy(weights_from).to(dtype)
    progress("load", 1, 1)

    done = 0

    def factor(site: Site, statistics: dict[str, Any]) -> None:
        nonlocal done
        weights = weights_at(weights_from, site)
        store.prepare(site, missing[site], weights, statistics, anew)
        done += 1
        progress("factor", done, len(missing))

    needy = [site for site, options in missing.items() if any(get_method(o.method).needs for o in options)]
    needs = frozenset(n for options in missing.values() for o in options for n in get_method(o.method).needs)
    for site in missing.keys() - set(needy):
        factor(site, {})
    if needy:
        windows = setup.tokens["calibrate"]
        for site, statistics in calibrate(model, windows, needy, needs, lambda i, n: progress("calibrate", i, n)):
            factor(site, statistics)
    return store


# Of a window, at most, that menu and slopes read at once: at keep 0.8 the best step by 12,288 tokens takes 15% of the
# excess on windows of 512 where they come in pieces of 128, and 25% in whole windows (studies/results/steps.md).
PIECE_TOKENS = 512
FAILURES = (RuntimeError, MemoryError, ValueError, ArithmeticError)  # of a trial, which becomes a value of its record


def _reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Resident:
    """A model that stays loaded and lives through many trials; only sites whose option changed are swapped."""

    def __init__(self, setup: Setup, progress: Progress = lambda phase, done, total: None) -> None:
        self.setup = setup
        self.space = make_space(setup)
        self.store = prepare_store(setup, self.space, progress)  # only where this node has no copy of the store
        self.model = load_model(setup.source, DTYPES[setup.dtype], setup.device)
        use_attention(self.model, setup.config.model.attention)
        self.sites: dict[Site, Place] = find_sites(self.model)
        _check_same_sites(self.space.sites, self.sites)
        self.names = {site.name for site in self.sites}
        self.dense_values = count_parameters(self.model)
        self.dense_modules = {
            path: self.model.get_submodule(path)
            for site in self.sites
            for weight in site.weights
            for path in (weight.path, *weight.tied)
        }
        treated = (weight for site in self.space.choices for weight in site.weights)
        scales = {p: row_scale(self.dense_modules[p]) for weight in treated for p in (weight.path, *weight.tied)}
        self.scales = {path: {"scale": scale} for path, scale in scales.items() if scale is not None}
        self.current: dict[str, Option] = {}
        self.modules: dict[str, nn.Module] = {}  # what runs in the place of dense ones, by path
        self.layers: dict[str, dict[str, Any]] = {}  # their kinds and settings, as an export names them
        self.rungs = setup.config.rung_windows()
        self._teachers: dict[int, Teacher] = {}
        self._probed: Teacher | None = None  # on the windows of the menu's probes

    def apply(self, plan: Plan) -> None:
        """Make the model run ``plan``: only the sites whose option changed are touched.

        Raises `InputError` where the plan names a site that this model does not have, treats a weight twice, or has an
        option that is none there.
        """
        unknown = plan.by_site.keys() - self.names
        if unknown:
            raise InputError(f"the plan names {min(unknown)!r}, which this model does not have: it belongs to another")
        check_disjoint(site for site in self.sites if site.name in plan.by_site)
        changed = [
            (site, option)
            for site in self.sites
            if (option := plan.option(site.name)) != self.current.get(site.name, DENSE_OPTION)
        ]
        for site, option in changed:
            if option != DENSE_OPTION:
                check_option(site, option)
        # Dense first: a weight that one site lets go of may be another's to treat.
        for site, option in sorted(changed, key=lambda change: change[1] != DENSE_OPTION):
            self._swap(site, option)

    def join(self) -> list[dict[str, Any]]:
        """Run right factors that read the same input as one product where that is faster; what is joined.

        Nothing where weights are prepacked, each by itself.
        """
        if self._prepacks:
            return []
        lengths = next(iter(self._timed.values()), Latency())
        return join_faster(self.modules, self._inputs, lengths, self._watches)

    @cached_property
    def _timed(self) -> dict[str, Timed]:
        return timed_objectives(self.setup.config.objectives)

    @property
    def _prepacks(self) -> bool:
        return any(objective.prepack for objective in self._timed.values())

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """Path of every linear -> path of the first that reads the same input."""
        linears = [path for path, module in self.dense_modules.items() if not isinstance(module, nn.Embedding)]
        with self.dense():
            return shared_inputs(self.model, linears, self.windows(0)[:1, :8].to(self.setup.device))

    @cached_property
    def _watches(self) -> Stopwatches:
        return Stopwatches(Path(self.setup.cache), self.setup.device, DTYPES[self.setup.dtype], self._prepacks)

    def apply_one(self, site: Site, option: Option) -> None:
        """Make the model run dense but for one site."""
        self.apply(Plan.of({site.name: option}))

    def _swap(self, site: Site, option: Option) -> None:
        if option.method == DENSE:
            for weight in site.weights:
                for path in (weight.path, *weight.tied):
                    self.modules.pop(path, None)
                    self.layers.pop(path, None)
                    set_module(self.model, path, self.dense_modules[path])
        else:
            self.replace(site, self.store.factors(site, option))
        self.current[site.name] = option

    def replace(self, site: Site, factors: Mapping[str, Factors]) -> None:
        """Run ``factors`` at a site that the plan treats, instead of those of its option, until the site changes."""
        paths = {weight.role: (weight.path, *weight.tied) for weight in site.weights}
        modules = self._made(paths, factors)
        self.modules |= modules
        for path, module in modules.items():
            set_module(self.model, path, module)
        for role, own in paths.items():
            self.layers |= {
                path: {"kind": factors[role].kind, **factors[role].settings, **self.scales.get(path, {})}
                for path in own
            }

    def _made(self, paths: Mapping[str, Sequence[str]], factors: Mapping[str, Factors]) -> dict[str, nn.Module]:
        """Modules that run each role's ``factors`` in the place of the dense ones at its ``paths``.

        A tensor that several of them have stays one. All are made before any is put in place: a site is treated whole
        or not at all. All are copies: a process that runs what is mapped dies when the file is cut short.
        """
        device, dtype = self.setup.device, DTYPES[self.setup.dtype]
        distinct = {id(tensor): tensor for role in paths for tensor in factors[role].tensors.values()}
        held = {
            number: nn.Parameter(tensor.to(device, dtype, copy=True).contiguous(), requires_grad=False)
            if tensor.is_floating_point()
            else tensor.to(device, copy=True)
            for number, tensor in distinct.items()
        }
        modules = {}
        for role, own in paths.items():
            chosen = factors[role]
            tensors = {name: held[id(tensor)] for name, tensor in chosen.tensors.items()}
            for path in own:
                modules[path] = replacement(self.dense_modules[path], chosen.kind, tensors, chosen.settings)
        return modules

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Within, joint sites run as what does the same at their anchors alone, all else of theirs dense: what other
        options of them would read is there then."""
        joint = [site for site in self.sites if len(site.weights) > 1 and site.name in self.current]
        try:
            for site in joint:
                option = self.current[site.name]
                if option != DENSE_OPTION:
                    for weight in site.weights:
                        set_module(self.model, weight.path, self.dense_modules[weight.path])
                    for part in site.parts:
                        factors = get_method(option.method).alone(part, self.store.load(site, option), option)
                        role, path = part.anchor.role, part.anchor.path
                        set_module(self.model, path, self._made({role: [path]}, {role: factors})[path])
            yield
        finally:
            for path, module in self.modules.items():
                set_module(self.model, path, module)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within, the model runs dense; after, its plan again. Moves references only."""
        try:
            for path in self.modules:
                set_module(self.model, path, self.dense_modules[path])
            yield
        finally:
            for path, module in self.modules.items():
                set_module(self.model, path, module)

    def windows(self, rung: int) -> Tensor:
        """What trials at ``rung`` read of the search split."""
        return self.setup.tokens["search"][self.rungs[rung]]

    def spare(self, number: int, tokens: int) -> Tensor:
        """Pieces of windows that no trial reads, about ``tokens`` tokens; where trials read the whole search split, or
        leave less, some of it. Those of neighbouring ``number`` are others, as far as there are.

        They are drawn from all over the text, and no longer than `PIECE_TOKENS`, for what tokens of one window say is
        much alike.
        """
        whole = self.setup.tokens["search"]
        pool = whole[self.rungs[-1].stop :]
        if pool.numel() < tokens:
            pool = whole
        length = whole.shape[1] // math.ceil(whole.shape[1] / PIECE_TOKENS)
        pieces = pool[:, : whole.shape[1] // length * length].reshape(-1, length)
        count = min(max(1, tokens // length), len(pieces))
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(self.setup.config.search.seed))
        first = int(number * GOLDEN % 1 * len(pieces))
        return pieces[order[(torch.arange(count) + first) % len(pieces)]]

    def teacher(self, rung: int) -> Teacher:
        """The dense model's predictions on the windows of a rung, computed once."""
        if rung not in self._teachers:
            with self.dense():
                self._teachers[rung] = teach(self.model, self.windows(rung))
        return self._teachers[rung]

    def subject(self, plan: Plan, clock: Clock, rung: int = 0) -> Subject:
        """``plan`` applied, ready for objectives on the windows of ``rung``."""
        with clock.phase("apply"):
            self.apply(plan)
        if self._timed:
            with clock.phase("join"):
                self.join()
        inside = {site: place.block is not None for site, place in self.sites.items()}
        cost = cost_of(plan, inside, self.dense_values, DTYPES[self.setup.dtype].itemsize)
        teacher = None
        if "divergence" in self.setup.config.objectives:
            with clock.phase("teacher"):
                teacher = self.teacher(rung)
        return Subject(self.model, self.dense if self.modules else None, self.windows(rung), teacher, cost, clock)

    def run(self, job: Job) -> Record:
        """Measure ``job``. A failure of the trial is a value of the record (``failure``), never an exception; ``lost``
        is there too where memory was short.

        `InputError` (a corrupt factor file, say) is raised: it would fail every trial alike.
        """
        try:
            measure = {
                "trial": self._trial,
                "report": self._report,
                "menu": self._menu,
                "slopes": self._slopes,
                "timing": self._timing,
            }
            record = measure[job.kind](job)
            self.store.check()
            if job.kind in ("menu", "slopes"):  # which look at every option of every site
                give_back_memory()
            return record
        except InputError:
            raise
        except FAILURES as error:
            record = {"failure": _reason(error)} | ({"lost": True} if out_of_memory(error) else {})
        self._recover()  # outside the handler, whose traceback holds on to the failed trial's tensors
        self.store.check()
        return record

    def _recover(self) -> None:
        """Back to dense, with whatever the failed trial still held given back."""
        self.apply(Plan(()))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _trial(self, job: Job) -> Record:
        clock = Clock()
        with clock.phase("total"):
            taught = job.rung in self._teachers
            subject = self.subject(job.plan, clock, job.rung)
            values = {
                name: make_objective(name, settings).value(subject)
                for name, settings in self.setup.config.objectives.items()
            }
            perplexity = subject.scores.perplexity
            note_running(subject)
        bad = {name: value for name, value in {"perplexity": perplexity, **values}.items() if not math.isfinite(value)}
        if bad:
            return {"failure": f"not finite: {', '.join(f'{name} is {value}' for name, value in bad.items())}"}
        return {
            "values": values,
            "perplexity": perplexity,
            "parameters": subject.cost.parameters,
            "block_parameters": subject.cost.block_parameters,
            "parameter_count": subject.cost.values,
            "bytes": subject.cost.bytes,
            "tokens": subject.scores.tokens + (0 if taught or subject.teacher is None else subject.windows.numel()),
            "rung": job.rung,
            "fidelity": subject.windows.numel(),
            "notes": subject.notes,
            "seconds": clock.seconds,
            "split": hash_tokens(subject.windows),
            "seed": self.setup.config.search.seed,
        }

    def _menu(self, job: Job) -> Record:
        """Predicted divergence of every option alone, from the source that the study names: the sites of one job.

        A job with a plan measures the divergence of that plan instead, which predictions are scaled by.
        """
        clock = Clock()
        if job.plan.choices:
            with clock.phase("menu"):
                return self._probe(job.plan) | {"seconds": clock.seconds}
        self.apply(job.plan)
        search = self.setup.config.search
        wanted = self.store.usable(self.space.wanted())
        jobs = menu_jobs(search.menu, len(self.space.choices))
        own = dict(list(wanted.items())[job.number :: jobs])
        with clock.phase("menu"):
            windows = self.spare(0, MENU_TOKENS)
            found = predict(self.model, self.apply_one, windows, own, self.store, search.menu, search.seed)
        return found | {"seconds": clock.seconds}

    def _probe(self, plan: Plan) -> Record:
        windows = self.spare(0, PROBE_TOKENS)
        tokens = windows.numel()
        if self._probed is None:
            tokens += windows.numel()
            with self.dense():
                self._probed = teach(self.model, windows)
        self.apply(plan)
        divergence = score(self.model, windows, self._probed).divergence
        return {
            "probed": {site: option.label for site, option in plan.by_site.items()},
            "divergence": divergence if math.isfinite(divergence) else None,
            "tokens": tokens,
        }

    def _slopes(self, job: Job) -> Record:
        """What switching any option of the plan changes: site -> [a, b], in the order of its variable's options."""
        clock = Clock()
        windows, quality = self.spare(job.number, job.tokens), quality_of(self.setup.config)
        teacher = None
        if quality == "divergence":
            with clock.phase("teacher"):
                self.apply(Plan(()))
                teacher = teach(self.model, windows)
        with clock.phase("apply"):
            self.apply(job.plan)
        with clock.phase("slopes"), self.anchored():
            found = measure_slopes(
                self.model,
                windows,
                self.store.usable(self.space.wanted()),
                self.current,
                self.dense_modules,
                self.store,
                teacher,
                self.setup.config.search.seed + job.number,
            )
        packed = {}
        for variable in self.space.variables:
            if isinstance(variable, Single) and variable.name in found:
                pairs = [found[variable.name].get(option.label) for option in variable.options]
                packed[variable.name] = [[None if p is None else float(f"{p[i]:.4g}") for p in pairs] for i in (0, 1)]
        read = windows.numel()
        return {"slopes": packed, "slope_tokens": read, "tokens": PASSES[quality] * read, "seconds": clock.seconds}

    def _timing(self, job: Job) -> Record:
        """The latency table of every latency among the objectives: name -> sites and the whole dense model."""
        clock = Clock()
        self.apply(job.plan)
        outside = {site.name for site, place in self.sites.items() if place.block is None}

        def made(site: Site, option: Option) -> dict[str, nn.Module]:
            return self._made({w.role: (w.path,) for w in site.weights}, self.store.factors(site, option))

        wanted, found = self.store.usable(self.space.wanted()), {}
        with clock.phase("timing"):
            for name, objective in self._timed.items():
                sites = time_sites(objective, wanted, outside, self.dense_modules, self.store, made, self._watches)
                whole = time_whole(objective, self.model, self.setup.tokens["search"])
                found[name] = {"sites": pack(sites), "whole": whole}
        return {"timing": found, "seconds": clock.seconds}

    def _report(self, job: Job) -> Record:
        clock = Clock()
        with clock.phase("apply"):
            self.apply(job.plan)
        with clock.phase("evaluate"):
            record = self.reported()
        if "failure" not in record and self.setup.config.search.refit == "sequential" and job.plan.choices:
            record |= self._refitted(job.plan, clock)
        return record | {"seconds": clock.seconds}

    def reported(self) -> Record:
        """Of what runs now: perplexity on the report split and on the control text, and what follows `PROMPTS`."""
        scores = score(self.model, self.setup.tokens["report"])
        if not math.isfinite(scores.perplexity):
            return {"failure": f"perplexity on the report split is {scores.perplexity}"}
        record: Record = {"perplexity": scores.perplexity, "tokens": scores.tokens}
        if "control" in self.setup.tokens:
            control = score(self.model, self.setup.tokens["control"]).perplexity
            record |= {"control": control} if math.isfinite(control) else {"control_failure": str(control)}
        return record | {"continuations": continuations(self.model, self.tokenizer)}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.setup.source)

    def _refitted(self, plan: Plan, clock: Clock) -> Record:
        """Perplexity on the report split after a refit, or why there is none: what was measured without it counts."""
        try:
            with clock.phase("refit"), refitted(self, plan):
                perplexity = score(self.model, self.setup.tokens["report"]).perplexity
            return {"refitted": perplexity} if math.isfinite(perplexity) else {"refit_failure": f"{perplexity=}"}
        except InputError:
            raise
        except FAILURES as error:
            reason = _reason(error)
        self._recover()
        return {"refit_failure": reason}
