"""What a study takes of memory, phase by phase, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from rankfront.methods import InputError, Option, Site, Weight, get_method
from rankfront.objectives._scores import LOGITS_AT_ONCE, TEACHER_TOP_K
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig
from rankfront.search.factors import calibration, gradient
from rankfront.search.factors.held import held_by, passes_of
from rankfront.search.inputs import acceptance
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.memory import ample, free_bytes
from rankfront.search.inputs.model import converts
from rankfront.search.inputs.outline import Outline
from rankfront.search.inputs.own_text import BATCH, CACHE_BYTES, ROW
from rankfront.search.inputs.recomputed import KEPT
from rankfront.search.measure.setup import Setup
from rankfront.search.plans.space import Space
from rankfront.search.quantities import said_bytes
from rankfront.search.splits import own_text_seed

PROCESS = 5e8  # bytes of a process with torch, transformers and Optuna
LOGITS = 16  # bytes for each logit of a backward pass: bf16 and fp32, its softmax and its gradient
FACTORING = 48  # bytes for each value of a weight while it is factored: six matrices of its size in fp64
HALVED = 1.5  # times what joint sites are, that is held of them while they are looked at by halves
SURE = 0.75  # of an estimate, that is needed at the least
ONE_INPUT = (("query", "key", "value"), ("gate", "up"))  # roles of weights that read the same


@dataclass(frozen=True)
class Phase:
    """Bytes at its most demanding moment, and what makes it take less."""

    name: str
    bytes: float
    remedy: str

    def line(self, device: torch.device) -> str:
        """What is said before a study starts."""
        free = free_bytes(device)
        there = "" if free is None else f" of {said_bytes(free)} free"
        return f"about {said_bytes(self.bytes)} of memory{there}, most of it while {self.name}"

    def check(self, device: torch.device) -> None:
        """Raise `InputError` where it cannot fit."""
        free = free_bytes(device)
        if free is not None and SURE * self.bytes > free:
            raise InputError(
                f"{self.name} takes about {said_bytes(self.bytes)} of memory and {device} has {said_bytes(free)} free:"
                f" {self.remedy}, or use a machine with more"
            )


@dataclass(frozen=True)
class Footprint:
    """What a study of a model takes of memory, on a device in a dtype.

    Attributes:
        outline: the model.
        config: the study.
        dtype, device: that it runs in and on.
        converts: whether the checkpoint has other dtypes.
    """

    outline: Outline
    config: StudyConfig
    dtype: torch.dtype
    device: torch.device
    converts: bool

    @cached_property
    def wanted(self) -> Mapping[Site, Sequence[Option]]:
        return Space(self.outline.sites, self.config.space, 0).wanted()

    @property
    def weights(self) -> float:
        """Bytes of the dense model as it runs."""
        return self.outline.parameters * self.dtype.itemsize

    @property
    def held(self) -> float:
        """Bytes of weights that have to be in memory: all that are not mapped, and two blocks of those that are."""
        mapped = self.device.type == "cpu" and not (self.converts and ample(self.weights, self.device))
        return 2 * self.in_blocks / max(1, self.blocks) if mapped else self.weights

    @property
    def in_blocks(self) -> float:
        """Bytes of the matrices of all blocks."""
        return self.outline.coverage.block_values * self.dtype.itemsize

    @cached_property
    def blocks(self) -> int:
        return len({place.block for place in self.outline.sites.values() if place.block is not None})

    @cached_property
    def linears(self) -> list[Weight]:
        """Those of the blocks, each once."""
        sites = (site for site, place in self.outline.sites.items() if place.block is not None)
        return list({weight.path: weight for site in sites for weight in site.weights}.values())

    @property
    def features(self) -> int:
        """Inputs and outputs of the linear layers, of one token."""
        return sum(weight.in_features + weight.out_features for weight in self.linears)

    def phase(self, name: str, size: float, remedy: str) -> Phase:
        """One that takes ``size`` bytes beside what lies in memory all the time."""
        return Phase(name, PROCESS + self.held + size, remedy)

    def phases(self) -> list[Phase]:
        """In the order in which a launch comes to them."""
        return [self._sampling(), self._accepting(), self._calibrating(), self._predicting(), self._trials()]

    @cached_property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases(), key=lambda phase: phase.bytes)

    def _sampling(self) -> Phase:
        """Keys and values of the sequences that are drawn together, and their logits twice in fp32."""
        splits = [
            *self.config.data.splits().values(),
            *([self.config.data.heal.split] if self.config.data.heal else []),
        ]
        if all(own_text_seed(text) is None for split in splits for text in split.counts()):
            return self.phase("sampling text", 0.0, "")
        roles = {w.path: w.out_features for s in self.outline.sites for w in s.weights if w.role in ("key", "value")}
        cache = min(CACHE_BYTES, BATCH * ROW * self.dtype.itemsize * sum(roles.values()))
        return self.phase("sampling text", cache + BATCH * self.outline.capacity.rows * 8, "name texts under [data]")

    def _accepting(self) -> Phase:
        values = sum(site.storage.values for site in self.wanted if len(site.weights) > 1)
        held = HALVED * self.dtype.itemsize * min(values, acceptance.TOGETHER)
        return self.phase("looking at joint sites", held, "leave methods of joint sites out of space.methods")

    def _calibrating(self) -> Phase:
        """Statistics of a pass, and what runs or is factored beside them; hidden states that wait."""
        methods = {site: [get_method(option.method) for option in options] for site, options in self.wanted.items()}
        needs = frozenset(need for own in methods.values() for method in own for need in method.needs)
        sites = [
            site
            for site, own in methods.items()
            if any(method.needs for method in own) and all(w.kind == "linear" for w in site.weights)
        ]
        data = self.config.data
        tokens = self._at_once(calibration.BATCH_TOKENS, data.calibrate.windows)
        passes = passes_of(
            sites, self._groups(), needs, calibration.MEMORY_LIMIT, lambda site: self.outline.sites[site].block
        )
        statistics = max((held_by(run, self._groups(), needs).total for run in passes), default=0)
        widest = max((weight.in_features for site in sites for weight in site.measured), default=0)
        running = tokens * (self.features / max(1, self.blocks) / 2 * self.dtype.itemsize + 4 * widest)
        factored = FACTORING * max((site.storage.values for site in self.wanted if len(site.weights) == 1), default=0)
        waiting = data.calibrate.windows * data.length * self._width * self.dtype.itemsize * (len(passes) > 1)
        if needs & calibration.GRADIENTS:
            blocks = (
                self.blocks
                if len(passes) == 1
                else max(len({self.outline.sites[s].block for s in run}) for run in passes)
            )
            running += KEPT * tokens * self.dtype.itemsize * self.features * blocks / max(1, self.blocks)
            running += LOGITS * tokens * self.outline.capacity.rows
            waiting *= 1 + len(passes)
        waiting = waiting if ample(waiting, self.device) else 0
        remedy = "lower data.calibrate.windows, or take methods without gradients (not kfac-svd, fwsvd)"
        return self.phase("calibrating and factoring", statistics + waiting + max(running, factored), remedy)

    def _predicting(self) -> Phase:
        """A backward pass: of blocks one by one where all of them have no room."""
        if self.config.search.sampler != OURS:
            return self.phase("predicting", 0.0, "")
        tokens = self._at_once(gradient.BATCH_TOKENS, self.config.data.search.windows)
        graph = KEPT * tokens * self.dtype.itemsize * self.features
        if not ample(graph, self.device):
            graph = graph / self.blocks + tokens * self._width * self.dtype.itemsize * self.blocks
        logits = LOGITS * tokens * self.outline.capacity.rows
        return self.phase("predicting", self._factors + graph + logits, "lower data.length, or set search.sampler")

    def _trials(self) -> Phase:
        data, rows = self.config.data, self.outline.capacity.rows
        at_once = LOGITS_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"]
        logits = (self.dtype.itemsize + 4) * max(at_once, data.length * rows)
        taught = "divergence" in self.config.objectives
        teacher = 8 * min(TEACHER_TOP_K, rows) * self.config.trial_windows * data.length * taught
        return self.phase("measuring trials", self._factors + logits + teacher, "lower search.trial_tokens")

    def _at_once(self, most: int, windows: int) -> int:
        """Tokens of a batch of ``most``, of so many windows."""
        length = self.config.data.length
        return length * min(windows, max(1, most // length))

    @property
    def _factors(self) -> float:
        """Copies of a plan's, where there is room for them."""
        if not ample(self.weights, self.device):
            return 0.0
        treated = {weight.path: weight.storage.values for site in self.wanted for weight in site.weights}
        return max(self.config.space.every_keep, default=0.0) * self.dtype.itemsize * sum(treated.values())

    @property
    def _width(self) -> int:
        """Of hidden states: what most linears read."""
        (width, _), *_ = Counter(weight.in_features for weight in self.linears).most_common(1)
        return width

    def _groups(self) -> dict[str, str]:
        """Path of a weight -> path of the first that reads the same input, as far as joint sites say."""
        groups: dict[str, str] = {}
        for site in self.outline.sites:
            roles = {weight.role: weight.path for weight in site.weights}
            for alike in ONE_INPUT:
                found = [roles[role] for role in alike if role in roles]
                for first, other in pairwise(found):
                    groups[other] = groups.setdefault(first, first)
        return groups


def footprint_of(setup: Setup) -> Footprint:
    """What a study takes that is resolved."""
    dtype = DTYPES[setup.dtype]
    return Footprint(setup.outline, setup.config, dtype, torch.device(setup.device), converts(setup.source, dtype))
