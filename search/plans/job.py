"""What a search asks of the resident model, one job at a time: plain data, which goes to any process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rankfront.search.plans.plan import Plan

Record = dict[str, Any]  # what a job measured, or its ``failure``
Kind = Literal["trial", "report", "menu", "slopes", "timing"]


@dataclass(frozen=True)
class Job:
    """One thing to measure: a trial's plan on the search split, a front member's on the report split, the menu, the
    slopes around a plan, of so many ``tokens``, or the latency table."""

    kind: Kind
    number: int
    plan: Plan
    tokens: int = 0
