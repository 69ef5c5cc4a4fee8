"""A short probe: how fast this machine runs a model and what a study does to it, by doing a little of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import Option, Prepared, Site, Statistics, get_method
from rankfront.search.config import StudyConfig
from rankfront.search.estimate.draft import Subject
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs.decoding import decoder
from rankfront.search.inputs.device import DTYPES, give_back_memory, set_threads
from rankfront.search.inputs.model import load_model, use_attention
from rankfront.search.inputs.own_text import BATCH
from rankfront.search.inputs.sites import weights_at
from rankfront.search.plans.space import Space

TOKENS = (32, 2048)  # that are run at once, at least and at most: what a study runs at once, and what says something
SECONDS = 3.0  # that one kind of work is probed for, once more than that is likely; guess
STEPS = 3  # tokens decoded, the last of which is timed

Wanted = Mapping[Site, Sequence[Option]]


@dataclass(frozen=True)
class Probe:
    """What was measured, in seconds.

    Attributes:
        load: the model.
        forward: a token of a forward pass.
        calibrate: a token of calibration, for all sites at once.
        decode: one token of `own_text.BATCH` sequences; 0 where nothing is sampled.
        factor: every site by every method.
        stored: bytes of all those factors.
    """

    load: float
    forward: float
    calibrate: float
    decode: float
    factor: float
    stored: float


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    """Gives a function of the seconds since; what a GPU was told to do is waited for."""
    started = time.perf_counter()

    def seconds() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    yield seconds


def probe(subject: Subject, config: StudyConfig, samples: bool, say: Callable[[str], None]) -> Probe:
    """Load the model of ``config`` and do a little of what its study does; ``samples`` where that samples text.

    The model is let go of in the end. Raises what loading it does.
    """
    set_threads(config.search.resources.cpu)
    with _timed() as seconds:
        say("loading the model")
        model = load_model(subject.source, DTYPES[subject.dtype], subject.device)
        use_attention(model, config.model.attention)
        load = seconds()
    wanted = Space(subject.outline.sites, config.space, 0).wanted()
    say("timing a forward pass")
    ids, forward = _forward(model, subject, config.data.length)
    say("timing calibration and a factorisation of every kind")
    calibrating, statistics = _calibrate(model, ids, wanted)
    factor, stored = _factor(model, wanted, statistics, DTYPES[subject.dtype].itemsize)
    decode = 0.0
    if samples:
        say("timing how fast it samples")
        decode = _decode(model)
    del model, statistics
    give_back_memory()
    return Probe(load, forward, calibrating, decode, factor, stored)


@torch.inference_mode()
def _forward(model: Any, subject: Subject, length: int) -> tuple[Tensor, float]:
    """Windows (W, L) of random ids, as many tokens as a few seconds are enough for, and the seconds of one of them."""
    device = next(model.parameters()).device
    least, most = TOKENS
    count = min(least, length)
    model(input_ids=torch.zeros(1, count, dtype=torch.int64, device=device), use_cache=False)  # the first is slow
    while True:
        ids = torch.randint(subject.outline.capacity.rows, (max(1, count // length), min(count, length)), device=device)
        with _timed() as seconds:
            model(input_ids=ids, use_cache=False)
            taken = seconds()
        if count >= most or (count > least and 4 * taken > SECONDS):
            return ids.cpu(), taken / ids.numel()
        count *= 4


def _calibrate(model: Any, ids: Tensor, wanted: Wanted) -> tuple[float, dict[str, dict[str, Statistics]]]:
    """Seconds of a token of calibration, and the statistics of the sites that are factored as a sample."""
    needs = frozenset(need for options in wanted.values() for o in options for need in get_method(o.method).needs)
    needy = [site for site, options in wanted.items() if any(get_method(o.method).needs for o in options)]
    if not needy:
        return 0.0, {}
    sampled = {sites[0] for sites in _samples(wanted).values()} & set(needy)
    statistics: dict[str, dict[str, Statistics]] = {}
    with _timed() as seconds:
        for site, found in calibrate(model, ids, needy, needs, lambda done, total: None):
            if site in sampled:
                statistics[site.name] = found
        return seconds() / ids.numel(), statistics


def _samples(wanted: Wanted) -> dict[tuple[str, tuple[tuple[int, int], ...]], list[Site]]:
    """Method and shapes of the weights -> the sites that have them, the least work first."""
    found: dict[tuple[str, tuple[tuple[int, int], ...]], list[Site]] = defaultdict(list)
    for site, options in wanted.items():
        shapes = tuple((weight.out_features, weight.in_features) for weight in site.weights)
        for name in dict.fromkeys(option.method for option in options):
            found[name, shapes].append(site)
    return dict(sorted(found.items(), key=lambda item: work(item[1][0])))


def work(site: Site) -> float:
    """What a factorisation of ``site`` takes grows with: Σ m n min(m, n) over its weights (m, n)."""
    return float(sum(w.out_features * w.in_features * min(w.out_features, w.in_features) for w in site.weights))


def _factor(
    model: Any, wanted: Wanted, statistics: Mapping[str, Mapping[str, Statistics]], value_bytes: int
) -> tuple[float, float]:
    """Seconds of factoring every site by every method, and bytes of what comes of it: of one site of each method and
    shape, the least first, until time is up, the others by their `work`."""
    seconds, stored = 0.0, 0.0
    rates: dict[str, tuple[float, float]] = {}  # method -> seconds and bytes for each unit of work, as measured last
    with _timed() as spent:
        for (name, _), sites in _samples(wanted).items():
            if name not in rates or spent() < SECONDS:
                options = [o for o in wanted[sites[0]] if o.method == name]
                taken, size = _one(model, sites[0], options, statistics.get(sites[0].name, {}), value_bytes)
                rates[name] = taken / work(sites[0]), size / work(sites[0])
            every = sum(work(site) for site in sites)
            seconds += rates[name][0] * every
            stored += rates[name][1] * every
    return seconds, stored


def _one(
    model: Any, site: Site, options: Sequence[Option], statistics: Mapping[str, Statistics], value_bytes: int
) -> tuple[float, float]:
    """Seconds and bytes of factoring ``site`` for ``options`` of one method; nothing where that fails here."""
    method = get_method(options[0].method)
    weights, size = weights_at(model, site), 0.0
    batches = [options] if method.nested else [[option] for option in options]
    with _timed() as seconds:
        try:
            prepared: list[Prepared] = [method.prepare(site, weights, statistics, batches[0])]
        except Exception:  # noqa: BLE001 - of so few tokens
            return 0.0, 0.0
        taken = seconds()
    for tensor in (tensor for each in prepared for tensor in each.values()):
        size += tensor.numel() * (value_bytes if tensor.ndim >= 2 and tensor.is_floating_point() else 4)
    return taken * len(batches), size * len(batches)


@torch.inference_mode()
def _decode(model: Any) -> float:
    """Seconds of one token of `BATCH` sequences."""
    ids, taken = torch.zeros(BATCH, 1, dtype=torch.int64, device=next(model.parameters()).device), 0.0
    with decoder(model, STEPS) as step:
        for _ in range(STEPS):
            with _timed() as seconds:
                step(ids)
                taken = seconds()
    return taken
