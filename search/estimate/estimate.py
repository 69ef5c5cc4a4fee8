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
from rankfront.search.factors.gradient import PASS_TOKENS
from rankfront.search.heal.logits import AT_ONCE
from rankfront.search.heal.memory import KEPT, STATE
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.model import converts
from rankfront.search.inputs.own_text import BATCH, ROW
from rankfront.search.inputs.source import cache_folder
from rankfront.search.measure.control import CONTINUED
from rankfront.search.measure.footprint import Footprint, Phase
from rankfront.search.measure.predictions import MENU_TOKENS, PROBE_TOKENS
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.quantities import said_bytes, said_time
from rankfront.search.splits import PROMPTS, own_text_seed
from rankfront.search.tuning import TUNING

MEMBERS = 10  # of a front that are measured on the report split; guess
FRESH = 10.0  # seconds of the process that an export is reloaded in; guess
# Times as long as the passes alone, with what every option would change: 2.2 for slopes and 2.9 for the menu of
# smollm2-135m on one core, over five methods and seven levels.
PRODUCTS = 2.5
HEALING = "leave it out here, and heal the export with --stages blocks"
STEP = 4  # forward passes that healing takes for a token: the teacher's, and the student's forward and backward


@dataclass(frozen=True)
class Estimate:
    """What a study will take.

    Attributes:
        seconds: by phase, in order. What the cache holds already is done in none.
        memory: the phase that needs most.
        disk: bytes that the cache of factors grows by.
    """

    seconds: Mapping[str, float]
    memory: Phase
    disk: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def lines(self, device: str) -> Iterator[str]:
        """What is said before a study starts."""
        phases = ", ".join(f"{name} {said_time(taken)}" for name, taken in self.seconds.items() if taken >= 1)
        yield f"about {said_time(self.total)}: {phases}"
        yield f"  it may be half or twice as long; what {cache_folder()} holds of it already takes no time"
        room = said_bytes(_room())
        yield f"{self.memory.line(torch.device(device))}, and {said_bytes(self.disk)} on disk of {room} free"

    def check(self, device: str) -> None:
        """Raise `InputError` where it cannot fit this machine."""
        self.memory.check(torch.device(device))
        room = _room()
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
    takes = _footprint(subject, config)
    phases = [*takes.phases(), *([takes.phase("healing", _healing(subject, config), HEALING)] if healed else [])]
    return Estimate(seconds, max(phases, key=lambda phase: phase.bytes), found.stored)


def _footprint(subject: Subject, config: StudyConfig) -> Footprint:
    dtype = DTYPES[subject.dtype]
    device = torch.device(subject.device)
    return Footprint(subject.outline, config, dtype, device, converts(subject.source, dtype))


def _healing(subject: Subject, config: StudyConfig) -> float:
    """Bytes of training what is kept end to end, beside the models."""
    limits = [Constraint.parse(text) for text in config.search.where]
    kept = share_of_blocks(subject, {c.figure: c.bound for c in limits if c.operator.startswith("<")})
    trained = (1.0 if kept is None else kept) * subject.prices.of(Plan(())).dense_block_values
    weights = {weight.path: weight for site in subject.outline.sites for weight in site.weights}.values()
    features = sum(w.in_features + w.out_features for w in weights if w.kind == "linear")
    at_once = max(AT_ONCE[torch.device(subject.device).type], config.data.length)
    return STATE * trained + KEPT * 4 * features * at_once
