"""The latency table: what each option's modules take, and what a plan is predicted to take by it.

With T the seconds of the whole dense model and t_w those of its weight w,

    T(plan) = T + Σ_{w treated} (t_w(option) − t_w(dense)),

so what is no linear is the measured remainder. The sum leaves out what modules do to each other; a slope through "as
dense", fitted to the trials of a study, corrects for it (see `Timing.calibrated`). `measure.timing` fills the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rankfront.methods import DENSE_OPTION, InputError, Option
from rankfront.objectives import make_objective
from rankfront.objectives.latency import Run, Timed
from rankfront.search.attributes import TIMING
from rankfront.search.plans.plan import Plan

PHASES = ("prefill", "decode")
Seconds = dict[str, float]  # phase -> seconds


@dataclass(frozen=True)
class Timing:
    """What a study knows of its options' latency.

    Attributes:
        sites: site name -> option label, dense among them -> seconds by phase of what runs there.
        whole: seconds by phase of the dense model.
        slope: by which predicted savings are multiplied.
    """

    sites: Mapping[str, Mapping[str, Seconds]]
    whole: Seconds
    slope: float = 1.0

    def seconds(self, objective: Timed, site: str, option: Option) -> float | None:
        """What counts for the objective of one site's seconds; None where they are not known."""
        found = self.sites.get(site, {}).get(option.label)
        return None if found is None else objective.of(Run(**found))

    def ratio(self, objective: Timed, plan: Plan) -> float | None:
        """The objective's predicted value, as a ratio to dense; None where an option was not timed."""
        more = 0.0
        for site, option in plan.choices:
            ours, dense = (self.seconds(objective, site, each) for each in (option, DENSE_OPTION))
            if ours is None or dense is None:
                return None
            more += ours - dense
        return 1.0 + self.slope * more / objective.of(Run(**self.whole))

    def calibrated(self, objective: Timed, trials: Sequence[tuple[Plan, float]]) -> Calibrated:
        """What it predicts beside what trials (plan, measured ratio) gave; the dense plan takes as long as itself."""
        known = [(self.ratio(objective, plan), measured) for plan, measured in trials if plan.choices]
        pairs = np.array([(p, m) for p, m in known if p is not None]).reshape(-1, 2) - 1.0
        doubt = float(np.mean(pairs[:, 0] ** 2)) if len(pairs) else 1.0
        slope = float((pairs[:, 0] @ pairs[:, 1] + doubt) / (pairs[:, 0] @ pairs[:, 0] + doubt)) if doubt else 1.0
        errors = np.abs(slope * pairs[:, 0] - pairs[:, 1])
        median, worst = (float(np.median(errors)), float(errors.max())) if len(errors) else (np.nan, np.nan)
        return Calibrated(replace(self, slope=self.slope * slope), len(pairs), median, worst)


Timings = Mapping[str, tuple[Timed, Timing]]  # objective -> it and its table


@dataclass(frozen=True)
class Calibrated:
    """A table with its slope fitted to trials, one trial's worth of doubt included.

    Attributes:
        timing: the table.
        trials: how many it was fitted to.
        median, worst: absolute error over these, as a fraction of dense; NaN where there are none.
    """

    timing: Timing
    trials: int
    median: float
    worst: float

    def figures(self) -> dict[str, float | None]:
        """``trials``, ``slope``, ``median`` and ``worst``, plain."""
        errors = {"median": self.median, "worst": self.worst}
        known = {name: None if np.isnan(value) else value for name, value in errors.items()}
        return {"trials": self.trials, "slope": self.timing.slope, **known}

    def __str__(self) -> str:
        if not self.trials:
            return "predicted module by module, and no trial to compare with yet"
        return (
            f"predicted against measured over {self.trials} trials: median error {self.median:.1%} of dense, worst"
            f" {self.worst:.1%}; whole models save {self.timing.slope:.2f} of what their modules were timed to"
        )


def pack(timing: Mapping[str, Mapping[str, Seconds]]) -> dict[str, dict[str, list[float]]]:
    """``sites`` as plain data, microseconds."""
    return {
        site: {label: [float(f"{1e6 * found[phase]:.4g}") for phase in PHASES] for label, found in options.items()}
        for site, options in timing.items()
    }


def unpack(record: Mapping[str, Any]) -> Timing:
    """What a study keeps of one objective's table."""
    sites = {
        site: {label: dict(zip(PHASES, (1e-6 * t for t in times), strict=True)) for label, times in options.items()}
        for site, options in record["sites"].items()
    }
    return Timing(sites, record["whole"])


def timed_objectives(objectives: Mapping[str, dict[str, Any]]) -> dict[str, Timed]:
    """Those of a study's objectives that are latencies."""
    made = {name: make_objective(name, settings) for name, settings in objectives.items()}
    timed = {name: objective for name, objective in made.items() if isinstance(objective, Timed)}
    if len({objective.prepack for objective in timed.values()}) > 1:
        raise InputError(f"objectives {', '.join(timed)} differ in prepack: set it for all of them, or for none")
    return timed


def timings_of(settings: Mapping[str, dict[str, Any]], known: Mapping[str, Any]) -> Timings:
    """The latency tables that a study's attributes hold, with the objectives that they are of."""
    found = known.get(TIMING, {}).get(TIMING, {})
    objectives = timed_objectives(settings)
    return {name: (objective, unpack(found[name])) for name, objective in objectives.items() if name in found}
