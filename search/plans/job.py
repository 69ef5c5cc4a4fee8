"""What a search asks of the resident model, one job at a time, and what comes back: plain data, which goes to any
process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from rankfront.search.plans.plan import Plan

Kind = Literal["trial", "report", "menu", "slopes", "timing"]
# Tokens that slopes cost for each that they read (see `measure.slopes`), by the loss that they are of: one forward pass
# and a backward one of twice its cost; for KL a second backward one, and the teacher's forward one.
PASSES = {"perplexity": 3, "divergence": 6}


class Record(TypedDict, total=False):
    """What a job measured: the fields of its kind, or its ``failure``. Fields are on disk under these names.

    Divergences are in nats a token, sizes as `methods.Cost` has them.
    """

    # of every kind
    seconds: dict[str, float]  # by phase
    tokens: int  # that went through the model
    failure: str  # why there is nothing else
    lost: bool  # with a failure: by the worker's death or a shortage of memory, so that it is tried again
    place: str  # with a failure: the line of code that raised it
    refused: str | None  # what would fail every job alike, from a worker that cannot raise; None where it only waited

    # of a trial
    values: dict[str, float]  # by objective
    stored: list[int]  # values at each site that the plan treats, in its order
    perplexity: float  # on the search split; of a report, on the report split
    parameters: float
    block_parameters: float
    parameter_count: int
    block_parameter_count: int
    bytes: int
    fidelity: int  # tokens that were scored
    notes: dict[str, float]  # figures that objectives leave beside their values
    notes_failure: str  # why those of how the model runs are not there
    split: str  # hash of the tokens that were scored
    seed: int

    # of a report
    control: float  # perplexity on the control text
    control_failure: str
    error_rate: float  # on the report split, of a model that classifies
    continuations: list[str]  # of the prompts
    continuations_failure: str
    tasks: dict[str, Any]  # what was asked, and scores by task, or a failure
    refitted: float  # perplexity after a refit
    refit_failure: str

    # of a part of the menu
    predictions: Mapping[str, Mapping[str, float]]  # site name -> option label -> divergence
    unscored: Mapping[str, str]  # site name -> why nothing is predicted of it
    probed: dict[str, str]  # site name -> option label of a group that was probed
    divergence: float | None  # measured of that; None where it is not finite
    jobs: int  # that the menu is measured in

    # of slopes
    slopes: dict[str, list[list[float | None]]]  # site name -> a and b of its variable's options
    slope_tokens: int

    # of the latency table
    timing: dict[str, dict[str, Any]]  # objective -> sites and the whole dense model, see `latency_table.pack`


@dataclass(frozen=True)
class Job:
    """One thing to measure: a trial's plan on the search split, a front member's on the report split, the menu, the
    slopes around a plan, of so many ``tokens``, or the latency table."""

    kind: Kind
    number: int
    plan: Plan
    tokens: int = 0
