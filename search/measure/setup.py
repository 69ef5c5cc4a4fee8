"""What is measured: a study resolved on this machine, and the space of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rankfront.objectives import CAUSAL, Task
from rankfront.search.config import StudyConfig
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.outline import Outline
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import hash_tokens
from rankfront.search.plans.latency_table import timed_objectives
from rankfront.search.plans.space import Space


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to build its resident model, plain enough to send anywhere.

    Attributes:
        config: the validated study.
        source: the model, resolved where the study was launched: paths are absolute.
        outline: the model without its weights.
        dtype, device: as resolved at the study's first launch.
        fingerprint: hash of the weights.
        tokens: split -> windows (W, L).
        cache: folder of the factor store.
        groups: bands of depth that share an option of each kind of projection, for samplers that need few variables;
            0 where every site is a variable.
        loss: whose slopes are measured: ``divergence`` or ``perplexity``, which stands for the log-likelihood.
        refused: sites that numbers refuse, and why, by name: joint ones that are not what they seem (see
            `inputs.acceptance`), and those that no text reaches (see `inputs.reached`). The outline lacks them.
        unmade: factor files that this launch could not make, and why: its trials that want them fail.
        task: what the model is for.
    """

    config: StudyConfig
    source: Source
    outline: Outline
    dtype: str
    device: str
    fingerprint: str
    tokens: dict[str, Tensor]
    cache: str
    groups: int = 0
    loss: str = "perplexity"
    refused: Mapping[str, str] = field(default_factory=dict)
    unmade: Mapping[Path, str] = field(default_factory=dict)
    task: Task = CAUSAL

    def store(self) -> FactorStore:
        read = self.dtype if self.task == CAUSAL else f"{self.dtype} {self.task}"
        text = f"{hash_tokens(self.tokens['calibrate'])} {read}"
        return FactorStore(self.fingerprint, text, DTYPES[self.dtype], Path(self.cache), self.unmade)

    def without(self, refused: Mapping[str, str]) -> Setup:
        """The same but for the sites that are ``refused``."""
        return replace(self, outline=self.outline.without(refused), refused=refused)

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
    """The study's space; `InputError` where its model cannot read what the study measures on."""
    capacity = setup.outline.capacity
    capacity.check_tokens(setup.tokens)
    for name, timed in timed_objectives(setup.config.objectives).items():
        capacity.check_length(timed.prompt + timed.decode, f"objectives.{name}.prompt + decode")
    return Space(setup.outline.sites, setup.config.space, setup.groups)
