"""What a study will take, from a probe: seconds by phase, memory and disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from rankfront.methods import InputError
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.estimate.draft import Subject, share_of_blocks
from rankfront.search.estimate.probe import Probe
from rankfront.search.factors.calibration import MEMORY_LIMIT
from rankfront.search.factors.gradient import BATCH_TOKENS, PASS_TOKENS
from rankfront.search.heal.logits import AT_ONCE
from rankfront.search.heal.memory import KEPT, STATE
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.memory import free_bytes
from rankfront.search.inputs.own_text import BATCH, ROW
from rankfront.search.inputs.source import cache_folder
from rankfront.search.measure.control import CONTINUED
from rankfront.search.measure.predictions import MENU_TOKENS, PROBE_TOKENS
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.quantities import said_bytes, said_time
from rankfront.search.splits import PROMPTS, own_text_seed
from rankfront.search.tuning import TUNING

PROCESS = 7e8  # bytes of a process with torch, transformers and Optuna
LOGITS = 16  # bytes for each logit of a backward pass: bf16 and fp32, its softmax and its gradient
MEMBERS = 10  # of a front that are measured on the report split; guess
FRESH = 10.0  # seconds of the process that an export is reloaded in; guess
# Times as long as the passes alone, with what every option would change: 2.2 for slopes and 2.9 for the menu of
# smollm2-135m on one core, over five methods and seven levels.
PRODUCTS = 2.5
STEP = 4  # forward passes that healing takes for a token: the teacher's, and the student's forward and backward


@dataclass(frozen=True)
class Estimate:
    """What a study will take.

    Attributes:
        seconds: by phase, in order. What the cache holds already is done in none.
        memory: bytes at most, of this process.
        models: bytes of the models alone, which are needed for certain.
        disk: bytes that the cache of factors grows by.
    """

    seconds: Mapping[str, float]
    memory: float
    models: float
    disk: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def lines(self, device: str) -> Iterator[str]:
        """What is said before a study starts."""
        phases = ", ".join(f"{name} {said_time(taken)}" for name, taken in self.seconds.items() if taken >= 1)
        yield f"about {said_time(self.total)}: {phases}"
        yield f"  it may be half or twice as long; what {cache_folder()} holds of it already takes no time"
        free = free_bytes(torch.device(device))
        there = "" if free is None else f" of {said_bytes(free)} free"
        room = said_bytes(_room())
        yield f"about {said_bytes(self.memory)} of memory{there}, and {said_bytes(self.disk)} on disk of {room} free"

    def check(self, device: str) -> None:
        """Raise `InputError` where it cannot fit this machine."""
        free, room = free_bytes(torch.device(device)), _room()
        if free is not None and self.models > free:
            raise InputError(
                f"the models alone take {said_bytes(self.models)} of memory and {device} has {said_bytes(free)} free:"
                " use a machine with more, a smaller dtype (--set model.dtype=bfloat16), or free some"
            )
        if self.disk > room:
            raise InputError(
                f"factors take about {said_bytes(self.disk)} and {said_bytes(room)} are free at {cache_folder()}: free"
                " some, or set RANKFRONT_CACHE to another disk"
            )


def _room() -> int:
    """Free bytes where the cache is."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def own_tokens(config: StudyConfig) -> dict[int, int]:
    """Seed of a text that the model samples -> the tokens of it that the splits read."""
    splits = [*config.data.splits().values(), *([config.data.heal.split] if config.data.heal else [])]
    found: dict[int, int] = {}
    for split in splits:
        for text, count in split.counts().items():
            seed = own_text_seed(text)
            if seed is not None:
                found[seed] = found.get(seed, 0) + count * config.data.length
    return found


def estimate(subject: Subject, config: StudyConfig, found: Probe, healed: int = 0) -> Estimate:
    """Of ``config``, whose export is healed by so many tokens, from what was ``found``."""
    data, search, length = config.data, config.search, config.data.length
    row = min(ROW, subject.positions or ROW)
    sampled = sum(math.ceil(tokens / (BATCH * row)) * row for tokens in own_tokens(config).values())
    space = Space(subject.outline.sites, config.space, 0)
    groups = len(space.bands(TUNING.group_bands))
    menu = PRODUCTS * PASS_TOKENS * MENU_TOKENS + (groups + 1) * PROBE_TOKENS
    trial = config.trial_windows * length
    between = sum(TUNING.steps_after_slopes) / len(TUNING.steps_after_slopes)
    slopes = 1 + max(0, search.trials - len(TUNING.opening_fractions)) / between
    steps = PRODUCTS * PASS_TOKENS * slopes * TUNING.slope_tokens
    members = min(MEMBERS, search.trials)
    asked = CONTINUED * 2 * sum(len(prompt.split()) for prompt in PROMPTS)
    report = members * (length * (data.report.windows + data.control.windows) + asked)
    seconds = {
        "sampling text": sampled * found.decode,
        "calibrating": data.calibrate.windows * length * found.calibrate,
        "factoring": found.factor,
        "predicting": found.load + menu * found.forward,
        f"{search.trials} trials": (search.trials * trial + steps) * found.forward,
        "reporting": report * found.forward,
        "exporting": 2 * found.load + FRESH + trial * found.forward,
        "healing": healed * STEP * found.forward,
    }
    return Estimate(seconds, *_memory(subject, config, healed), found.stored)


def _memory(subject: Subject, config: StudyConfig, healed: int) -> tuple[float, float]:
    """(Bytes at the most demanding phase, bytes of the models alone)."""
    values, value_bytes = subject.outline.parameters, DTYPES[subject.dtype].itemsize
    checkpoint = getattr(subject.config, "dtype", None) or torch.float32
    dense = values * value_bytes
    loaded = values * (checkpoint.itemsize + (0 if checkpoint == DTYPES[subject.dtype] else value_bytes))
    statistics = min(MEMORY_LIMIT, loaded)  # those of a small model are about its size; guess
    logits = LOGITS * BATCH_TOKENS * subject.outline.capacity.rows
    limits = [Constraint.parse(text) for text in config.search.where]
    kept = share_of_blocks(subject, {c.figure: c.bound for c in limits if c.operator.startswith("<")})
    trained = (1.0 if kept is None else kept) * subject.prices.of(Plan(())).dense_block_values
    weights = {weight.path: weight for site in subject.outline.sites for weight in site.weights}.values()
    features = sum(w.in_features + w.out_features for w in weights if w.kind == "linear")
    at_once = max(AT_ONCE[torch.device(subject.device).type], config.data.length)
    healing = 2 * dense + STATE * trained + KEPT * 4 * features * at_once if healed else 0.0
    models = max(loaded, 2 * dense if healed else dense)
    return PROCESS + max(loaded + statistics, 2 * dense + logits, healing), models
