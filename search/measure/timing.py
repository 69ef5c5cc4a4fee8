"""The stopwatch that fills the latency table: what each option's modules take on this device, timed once.

A module is timed as it runs, with its own factors, for the tokens of a prefill and for those of a decoding step, in
turns with the dense module that it replaces and over enough copies of both that the weights come from memory, as they
do in a model. Its seconds are the median ratio times the dense module's. Figures are kept by device, threads, dtype,
versions and our code in the cache folder and shared by all studies. What is predicted of them is `plans.latency_table`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from torch import Tensor, nn

from rankfront.methods import DENSE_OPTION, Factors, Option, Site, Weight, source_behind
from rankfront.methods.expert_prune import ROUTER
from rankfront.methods.layers import layers
from rankfront.methods.prepacked import prepacked
from rankfront.objectives import CAUSAL, Task
from rankfront.objectives.latency import Timed
from rankfront.search.atomic import read_checked, write_checked
from rankfront.search.factors.store import FactorStore
from rankfront.search.plain import plain
from rankfront.search.plans.latency_table import PHASES, Seconds

COLD = 2**25  # bytes of weights gone through before the same copy comes again
COPIES = 64
ROUNDS = 15
WHOLE_RUNS = 5
LEAST_FIGURE, MOST_FIGURE = 1e-9, 1e4  # of seconds of a call, and of ratios of two: a guess, beyond which clocks err
LEAST = 2e-4  # seconds of one round, at least: below, the clock and the interpreter are what is timed

log = logging.getLogger(__name__)


def time_sites(
    objective: Timed,
    wanted: Mapping[Site, Sequence[Option]],
    outside: Collection[str],
    dense_modules: Mapping[str, nn.Module],
    store: FactorStore,
    make: Callable[[Site, Option], Mapping[str, nn.Module]],
    watches: Stopwatches,
) -> dict[str, dict[str, Seconds]]:
    """``sites`` of a `Timing`: every option wanted and dense, at the lengths of ``objective``.

    ``make`` gives what an option runs, by module path. Sites named ``outside`` the blocks run on the last token of a
    prompt alone, as generation has it. Lookups in embedding tables take no time worth counting.
    """
    found: dict[str, dict[str, Seconds]] = {}
    alike: dict[tuple[Any, ...], dict[str, Seconds]] = {}  # what sites of one kind have in common: role -> seconds
    for site, options in wanted.items():
        found.setdefault(site.name, {})
        prompt = 1 if site.name in outside else objective.prompt
        weights = [weight for weight in site.weights if weight.kind != "embedding" and weight.role != ROUTER]
        dense = {weight.role: dense_modules[weight.path] for weight in weights}
        kind = [(w.role, w.out_features, w.in_features, w.share, type(dense[w.role])) for w in weights]
        for option in (DENSE_OPTION, *options):
            seconds = alike.get((option, prompt, *kind))
            if seconds is None:
                # Of a layer with fewer experts as many run for each token as before.
                same = option == DENSE_OPTION or site.roles[0] == ROUTER
                factors = {} if same else store.factors(site, option)
                made = partial(make, site, option)
                seconds = alike[option, prompt, *kind] = {
                    w.role: _weight_seconds(objective, prompt, w, dense[w.role], factors.get(w.role), made, watches)
                    for w in weights
                }
            found[site.name][option.label] = {phase: sum(s[phase] for s in seconds.values()) for phase in PHASES}
            if option == DENSE_OPTION:  # of a joint site's weights too, which may have no site of their own here
                for weight in weights:
                    found.setdefault(weight.path, {}).setdefault(option.label, seconds[weight.role])
        watches.save()
    return found


def _weight_seconds(
    objective: Timed,
    prompt: int,
    weight: Weight,
    dense: nn.Module,
    own: Factors | None,
    make: Callable[[], Mapping[str, nn.Module]],
    watches: Stopwatches,
) -> Seconds:
    """What runs at one weight, dense or its ``own`` factors: for ``prompt`` tokens, and for every token decoded.

    An expert of a mixture is given a share of a prompt's tokens, and of those decoded: on average, which is what counts
    over all experts of a layer.
    """
    parameter, size = next(dense.parameters()), f"{type(dense).__name__} {weight.out_features}x{weight.in_features}"
    found = {}
    routed = max(1, round(weight.share * prompt))
    for phase, tokens, steps in (("prefill", routed, 1.0), ("decode", 1, weight.share * objective.decode)):
        shape = (objective.batch, tokens, weight.in_features)
        x = torch.ones(shape, dtype=parameter.dtype, device=parameter.device)
        found[phase] = steps * watches.seconds(f"dense {size}", dense, x)
        if own is not None:
            level = " ".join(f"{name}={value}" for name, value in sorted(own.settings.items()))
            found[phase] *= watches.ratio(
                f"{own.kind} {level} for {size}", lambda: dense, x, lambda: make()[weight.path]
            )
    return found


def time_whole(objective: Timed, model: nn.Module, windows: Tensor, task: Task = CAUSAL) -> Seconds:
    """``whole`` of a `Timing`: the dense model, median of a few runs."""
    ids = objective.prompts(windows, next(model.parameters()).device)
    run = objective.runner(model, task)
    with prepacked(model) if objective.prepack else nullcontext():
        run(ids)
        runs = [run(ids) for _ in range(WHOLE_RUNS)]
    return {phase: float(np.median([getattr(run, phase) for run in runs])) for phase in PHASES}


class Stopwatches:
    """Seconds of dense modules and ratios of modules to others, by what they are and by tokens, kept on disk.

    ``prepack``: whether all of them run prepacked. What is on disk and is not whole, or holds a figure that no clock
    gives, is discarded with a warning and timed anew.
    """

    def __init__(self, root: Path, device: str, dtype: torch.dtype, prepack: bool = False) -> None:
        self.path = root / f"latency-{_machine(device, dtype)}{'-prepacked' if prepack else ''}.json"
        self.prepack = prepack
        self.known: dict[str, float] = self._kept()
        self.new = False

    def _kept(self) -> dict[str, float]:
        try:
            return _checked(read_checked(self.path))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            reason = str(error)
            log.warning(
                "the latency table %s is discarded (%s): its modules are timed anew", plain(self.path), plain(reason)
            )
            self.path.unlink(missing_ok=True)
            return {}

    def seconds(self, key: str, dense: nn.Module, x: Tensor) -> float:
        """Those of ``dense``, which ``key`` describes, on x (batch, tokens, n)."""
        return self._figure(key, x, lambda: timed(dense, x, self.prepack))

    def ratio(self, key: str, base: Callable[[], nn.Module], x: Tensor, module: Callable[[], nn.Module]) -> float:
        """Seconds of ``module`` over those of ``base``, which ``key`` describes; both are made where nobody knows."""
        return self._figure(key, x, lambda: compared(module(), base(), x, self.prepack))

    def _figure(self, key: str, x: Tensor, measure: Callable[[], float]) -> float:
        name = f"{key} on {x.shape[0]}x{x.shape[1]}"
        if name not in self.known:
            self.known |= _checked({name: measure()})
            self.new = True
        return self.known[name]

    def save(self) -> None:
        """Write what is new beside what others have written meanwhile."""
        if self.new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):  # two that merge at once would lose one's figures
                write_checked(self.path, self._kept() | self.known)
            self.new = False


def _checked(figures: Any) -> dict[str, float]:
    """``figures`` by name, if each can be of a clock; ValueError otherwise."""
    if not isinstance(figures, dict):
        raise ValueError("it is no table of figures")
    for name, figure in figures.items():
        if type(figure) is not float or not LEAST_FIGURE <= figure <= MOST_FIGURE:  # NaN is in no range
            raise ValueError(f"{name!r} is {figure!r} and lies outside {LEAST_FIGURE:g} to {MOST_FIGURE:g}")
    return figures


def _machine(device: str, dtype: torch.dtype) -> str:
    """A hash of what figures depend on."""
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.processor()} {_model_name()}"
    )
    code = inspect.getsource(sys.modules[__name__]) + source_behind(*(layer.__module__ for layer in layers().values()))
    parts = (name, str(torch.get_num_threads()), str(dtype), torch.__version__, transformers.__version__, code)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _model_name() -> str:
    """What the CPU calls itself, and how many of them there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return f"{next((line for line in lines if line.startswith('model name')), platform.machine())} {os.cpu_count()}"


@torch.inference_mode()
def timed(module: nn.Module, x: Tensor, prepack: bool = False) -> float:
    """Median seconds of a call, over rounds through copies whose weights come from memory."""
    copies = _copies(module)
    with prepacked(*copies) if prepack else nullcontext():
        _round(copies, x)
        return float(np.median([_round(copies, x) for _ in range(ROUNDS)]))


@torch.inference_mode()
def compared(module: nn.Module, dense: nn.Module, x: Tensor, prepack: bool = False) -> float:
    """Median over rounds of ``module``'s seconds over ``dense``'s, taking turns at going first.

    A module that says that it has fewer ``in_features`` than x (..., n) is given as many.
    """
    own = x[..., : getattr(module, "in_features", x.shape[-1])].contiguous()
    ours, theirs = (_copies(module), own), (_copies(dense), x)
    ratios = []
    with prepacked(*ours[0], *theirs[0]) if prepack else nullcontext():
        _round(*ours), _round(*theirs)
        for turn in range(ROUNDS):
            first, second = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
            a, b = _round(*first), _round(*second)
            ratios.append(a / b if turn % 2 == 0 else b / a)
    return float(np.median(ratios))


def _copies(module: nn.Module) -> list[nn.Module]:
    size = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    count = min(COPIES, max(1, -(-COLD // max(size, 1))))
    with torch.inference_mode(False):  # some keep what they unpack, but not of tensors whose changes nobody counts
        return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def _round(copies: Sequence[nn.Module], x: Tensor) -> float:
    """Seconds of a call, mean over all copies, and over several times through them where that is quick."""
    passes, spent = 0, 0.0
    cuda = x.device.type == "cuda"
    while spent < LEAST:
        if cuda:
            torch.cuda.synchronize(x.device)
        started = time.perf_counter()
        for module in copies:
            module(x)
        if cuda:
            torch.cuda.synchronize(x.device)
        spent += time.perf_counter() - started
        passes += 1
    return spent / (passes * len(copies))
