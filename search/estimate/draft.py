"""A study that fits a model, a machine and what is asked for, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL
from rankfront.search.config import MIN_WINDOW, SpaceConfig, located, make_config, overridden
from rankfront.search.constraint import Constraint
from rankfront.search.estimate.request import Request
from rankfront.search.inputs.device import DTYPES, pick_device, pick_dtype
from rankfront.search.inputs.model import load_tokenizer, read_config
from rankfront.search.inputs.outline import Outline, outline_of
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import read_text, tokenize
from rankfront.search.names import inside_blocks
from rankfront.search.plans.limits import exact_figures
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.plans.reach import check_reachable
from rankfront.search.plans.space import Space
from rankfront.search.servable import holds
from rankfront.search.serve.writing import check_servable
from rankfront.search.splits import SELF, own_text_seed

DEEPER = 0.35  # below the share that blocks may keep, levels that single weights may still go down to; guess
HEAL_TEXT = "self:1"  # what is healed on where no text is named: another sample than the search reads
# Times that healing goes over a text that has to be sampled first: up to four repetitions are nearly worth as much as
# new text (Muennighoff et al. 2305.16264, section 5).
PASSES = 4
HELD_OUT = 1.06  # windows for each that is trained on: a twentieth is held out
INTEGERS = "gptq-int8"  # beats every factorisation where bytes count: docs/methods.md#bits


@dataclass(frozen=True)
class Effort:
    """How much a study reads: windows of ``length`` tokens, and how many plans it measures."""

    length: int
    calibrate: int
    search: int
    trial: int  # of the search split, that a trial reads
    report: int
    control: int
    trials: int


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(256, 32, 24, 8, 8, 8, 16),  # that of studies/demo.toml
    "normal": Effort(512, 64, 24, 8, 24, 16, 32),  # 112 windows of own text: the default study's
}


@dataclass(frozen=True)
class Subject:
    """A model without its weights, and what it runs on here."""

    source: Source
    outline: Outline
    config: Any
    device: str
    dtype: str

    @classmethod
    def of(cls, request: Request) -> Subject:
        """Resolved on this machine; `InputError` where the model cannot be searched."""
        said = make_config(overridden({}, request.overrides)).model
        if said.task != CAUSAL.name:
            raise InputError(
                f"studies of causal language models alone are drafted, and model.task is {said.task!r}: write a study"
                " file, and launch it"
            )
        source = resolve(request.model, request.trust_remote_code)
        device = pick_device(said.device)
        outline = outline_of(source, said.attention)
        return cls(source, outline, read_config(source), device, pick_dtype(said.dtype, device))

    @property
    def prices(self) -> Prices:
        """Of the dense model and its plans."""
        found = self.outline
        value_bytes, block_values = DTYPES[self.dtype].itemsize, found.coverage.block_values
        return Prices(inside_blocks(found.sites), found.parameters, value_bytes, block_values)

    @property
    def positions(self) -> int | None:
        """The longest text that it was made for, where it says so."""
        found = (self.outline.capacity.positions, getattr(self.config, "max_position_embeddings", None))
        return min((each for each in found if isinstance(each, int)), default=None)


def draft(request: Request, subject: Subject, effort: Effort) -> dict[str, Any]:
    """The study as plain data, valid and with a plan that meets its limits; `InputError` where there is none."""
    length = max(MIN_WINDOW, min(effort.length, subject.positions or effort.length))
    limits = request.limits(subject.outline.parameters)
    data: dict[str, Any] = {
        "model": {"name": located(request.model), "dtype": subject.dtype, "device": subject.device},
        "data": {"length": length, **_splits(request.text, effort)},
        "space": _space(request, subject, limits),
        "objectives": {name: request.settings(name) for name in ("perplexity", *(limits or ["parameters"]))},
        "search": {"trials": effort.trials, "trial_tokens": effort.trial * length},
    }
    if request.trust_remote_code:
        data["model"]["trust_remote_code"] = True
    if limits:
        data["search"]["where"] = [f"{name}<={_plain(bound)}" for name, bound in limits.items()]
        share = share_of_blocks(subject, limits)
        if share is not None:  # at the level that is within the limits, or nearest to that
            levels = data["space"]["keep"]
            data["search"]["anchors"] = [max((level for level in levels if level <= share), default=min(levels))]
    if request.heal:
        data["data"]["heal"] = _heal_split(request, subject, data["data"])
        data["heal"] = {"tokens": request.heal}
    data = overridden(data, request.overrides)
    config = make_config(data)
    check_servable(subject.config, config.space.servable)
    where = [Constraint.parse(limit) for limit in config.search.where]
    check_reachable(where, Space(subject.outline.sites, config.space, 0).wanted(), subject.prices)
    return data


def _plain(bound: float) -> str:
    return str(int(bound)) if bound.is_integer() else repr(bound)


def _splits(text: str, effort: Effort) -> dict[str, Any]:
    """What each split reads. A text of the user's is mixed with the model's own in equal parts: plans found on it alone
    lose much more on others (docs/benchmarks.md#texts)."""
    text, own = located(text), own_text_seed(text) is not None
    mixed: Any = text if own else [{"text": SELF}, {"text": text}]
    return {
        "calibrate": {"text": mixed, "windows": effort.calibrate},
        "search": {"text": mixed, "windows": effort.search},
        "report": {"text": text, "windows": effort.report},
        "control": {"windows": effort.control},
    }


def _space(request: Request, subject: Subject, limits: Mapping[str, float]) -> dict[str, Any]:
    default = SpaceConfig()
    methods = list(default.methods)
    if request.serve is not None:
        methods = [name for name in methods if holds(request.serve, name)]
    elif "bytes" in limits:
        methods.append(INTEGERS)
    least = (share_of_blocks(subject, limits) or 0.0) - DEEPER
    space: dict[str, Any] = {"methods": methods, "keep": [level for level in default.keep if level >= least]}
    return space if request.serve is None else space | {"servable": request.serve}


def share_of_blocks(subject: Subject, limits: Mapping[str, float]) -> float | None:
    """What of the blocks' linear layers may be kept, all else being dense; None without a limit on storage."""
    dense = subject.prices.of(Plan(()))
    figures, inside = exact_figures(dense), dense.dense_block_values / dense.dense_values
    kept = [bound / figures[name] for name, bound in limits.items() if name in figures]
    return max(0.0, 1 - (1 - min(kept)) / inside) if kept else None


def _heal_split(request: Request, subject: Subject, data: Mapping[str, Any]) -> dict[str, Any]:
    """As many windows as the tokens need; of a text that has to be sampled, fewer that are gone over again."""
    wanted = max(2, math.ceil(HELD_OUT * request.heal / data["length"]))
    if own_text_seed(request.text) is not None:
        return {"text": HEAL_TEXT, "windows": max(2, math.ceil(wanted / PASSES))}
    there = len(tokenize(load_tokenizer(subject.source), read_text(request.text))) // data["length"]
    read = data["calibrate"]["windows"] // 2 + data["search"]["windows"] // 2 + data["report"]["windows"]
    left = there - read - 1  # of which a start token may take one
    if left < 2:
        raise InputError(
            f"text {request.text!r} has {there} windows of {data['length']} tokens, the search reads {read} of them and"
            " healing needs 2 more: give a longer text"
        )
    return {"text": located(request.text), "windows": min(wanted, left)}
