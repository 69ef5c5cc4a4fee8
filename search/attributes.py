"""Names under which a study's records are stored: attributes of Optuna's trials and of its study.

They are on disk: a name that changes here is not found in studies that exist. What a trial measured is stored under
the keys of the worker's record; the figures among them are named as users name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

# Of a trial, when it is queued.
ORIGIN = "origin"  # who asked for it: a sampler, an anchor, the menu, slopes, an answer
LABEL = "anchor"  # what it is among those of one origin
RUNG = "rung"  # of runs of 0.1 alone: the fidelity, 0 the cheapest
PROMOTED = "promoted"  # likewise: number of the trial whose plan it measures at a higher fidelity
SLOPES_OF = "slopes_of"  # number of the trial whose plan slopes are measured around
SLOPE_TOKENS: Final = "slope_tokens"
PATH = "path"  # of runs of 0.1 alone: number of the continuation whose slopes it measures
REPLACES = "replaces"  # number of a damaged trial
AGAIN = "again"  # number of a lost or failed trial
DECIDING = (ORIGIN, LABEL, RUNG, PROMOTED, SLOPES_OF, SLOPE_TOKENS, PATH, REPLACES, AGAIN)
ASKED = "asked"  # of a damaged trial: parameters and attributes that it was queued with

# Of a trial, when it starts and ends.
PLAN, PLAN_KEY = "plan", "plan_key"
STORED: Final = "stored"  # values at each site that the plan treats, in its order
PREDICTED = "predicted"
SECONDS: Final = "seconds"
TOKENS: Final = "tokens"
FIDELITY = "fidelity"
SLOPES = "slopes"
NOTES = "notes"
FAILURE: Final = "failure"
LOST: Final = "lost"
PLACE: Final = "place"  # in the code, of what a failed trial raised
PARAMETER_COUNT, BLOCK_PARAMETERS = "parameter_count", "block_parameters"
BLOCK_COUNT = "block_parameter_count"
# What a failed trial has beside what it was queued with.
MEASURED = (FAILURE, LOST, PLACE, SECONDS, PREDICTED, PLAN, PLAN_KEY)

# Of the study.
TIMING = "timing"
SITES = "sites"  # of the model, see `inputs.known_sites`
HEALING = "healing"  # by what plans were healed last: its ``key``, ``settings`` and ``text``

INTERRUPTED = "interrupted: the launcher or its worker stopped before the trial was done"
DAMAGED = "damaged: its record in the storage does not match its checksum; the next launch measures it again"

Attributes = Mapping[str, Any]
Report = Mapping[str, Any]  # what was measured of a plan on the report split, see `measure.control.reported`


def is_void(attributes: Attributes) -> bool:
    """Whether a trial with these attributes counts for nothing: interrupted, or damaged in storage. It is due again."""
    return attributes.get(FAILURE) in (INTERRUPTED, DAMAGED)


def report_of(number: int) -> str:
    """The study's attribute that holds what was measured of a trial's plan on the report split: a finished trial's own
    attributes are frozen."""
    return f"report {number}"


def task_scores_of(report: Report | None) -> Mapping[str, float]:
    """Task -> score of a report; none where it has none."""
    scores: Mapping[str, float] = (report or {}).get("tasks", {}).get("scores", {})
    return scores


def healed_of(plan_key: str, healing: str) -> str:
    """The study's attribute that holds what became of a plan by the healing of this name."""
    return f"healed {plan_key} {healing}"


def halving_of(healing: str, size: str) -> str:
    """The study's attribute that holds what the halving of this name has made of a size: plans by their keys."""
    return f"halving {healing} {size}"


def menu_part(number: int) -> str:
    """The study's attribute that holds the record of one of the jobs that its menu is measured in."""
    return f"menu {number}"


def menu_parts(known: Attributes) -> list[Any] | None:
    """The records of all those jobs; None while any is missing. Each has the number of them all under ``jobs``."""
    jobs = known[menu_part(0)]["jobs"] if menu_part(0) in known else 1
    parts = [known[name] for number in range(jobs) if (name := menu_part(number)) in known]
    return parts if len(parts) == jobs else None


def menu_jobs_done(known: Attributes) -> int:
    """How many of those jobs have a record."""
    return sum(name.startswith(menu_part(0)[:-1]) for name in known)


def menu_tokens(known: Attributes) -> int:
    """Tokens that those jobs ran through the model so far."""
    return sum(record[TOKENS] for name, record in known.items() if name.startswith(menu_part(0)[:-1]))


def numbers_under(name: str, every: Iterable[Attributes]) -> set[int]:
    """The trials that others name under ``name`` (`AGAIN`, `REPLACES`), void ones aside."""
    return {attributes[name] for attributes in every if name in attributes and not is_void(attributes)}
