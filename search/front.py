"""The front: rows of a study, the non-dominated ones, hypervolume, knee, and picking under constraints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import moocore
import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from rankfront.methods import InputError, check_choice
from rankfront.objectives import make_objective
from rankfront.search.plan import Plan
from rankfront.search.samplers import INTERRUPTED

Settings = Mapping[str, dict[str, Any]]
DENSE_KEY = Plan(()).key


@dataclass(frozen=True)
class Row:
    """One trial, flat. ``values`` follow the study's objectives; ``report`` is measured on the report split;
    ``within`` says whether it meets the study's own limits."""

    number: int
    state: str
    origin: str
    plan_json: str | None
    plan_key: str | None
    values: dict[str, float] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    failure: str | None = None
    within: bool = True

    @property
    def counts(self) -> bool:
        """Whether the trial counts against the limit: complete, or failed by itself."""
        return self.state == "complete" or (self.state == "failed" and self.failure != INTERRUPTED)

    @property
    def is_dense(self) -> bool:
        """Whether its plan leaves every site dense."""
        return self.plan_key == DENSE_KEY

    @property
    def rung(self) -> int:
        """The fidelity that it was measured at, 0 the cheapest."""
        return int(self.attributes.get("rung", 0))

    @cached_property
    def plan(self) -> Plan:
        if self.plan_json is None:
            raise InputError(f"trial {self.number} has no plan: it was stopped before one was chosen; name another")
        return Plan.from_json(self.plan_json, f"the plan of trial {self.number}")

    def figure(self, name: str) -> float:
        """An objective's value, or another measured figure such as ``block_parameters``."""
        found = self.values.get(name, self.attributes.get(name, self.attributes.get("notes", {}).get(name)))
        if not isinstance(found, int | float):
            figures = {**self.attributes.get("notes", {}), **self.attributes, **self.values}
            check_choice("figure", name, sorted(k for k, v in figures.items() if isinstance(v, int | float)))
        return float(found)


STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.PRUNED: "repeated",
}
OWN_COLUMNS = ("origin", "plan", "plan_key", "failure", "anchor")


def rows_of(study: optuna.Study, objectives: Sequence[str]) -> list[Row]:
    """Every trial of a study, in order; proposals that had been measured before, and slopes, are left out."""
    reports = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    return [
        _row(trial, objectives, reports.get(f"report {trial.number}"))
        for trial in trials
        if trial.state != TrialState.PRUNED and "slopes_of" not in trial.user_attrs
    ]


def _row(trial: FrozenTrial, objectives: Sequence[str], report: dict[str, Any] | None) -> Row:
    attributes = trial.user_attrs
    complete = trial.state == TrialState.COMPLETE
    origin = attributes.get("origin", "")
    return Row(
        number=trial.number,
        state=STATES[trial.state],
        origin=f"{origin}: {attributes['anchor']}" if "anchor" in attributes else origin,
        plan_json=attributes.get("plan"),
        plan_key=attributes.get("plan_key"),
        values=dict(zip(objectives, trial.values, strict=True)) if complete else {},
        attributes={key: value for key, value in attributes.items() if key not in OWN_COLUMNS},
        report=report,
        failure=attributes.get("failure"),
        within=all(excess <= 0 for excess in trial.constraints.values()),
    )


def tokens_of(study: optuna.Study) -> int:
    """Tokens that trials, slopes and the menu ran through the model, a backward pass counted as two forward ones."""
    known = study.user_attrs
    menu = sum(record["tokens"] for name, record in known.items() if name.startswith("menu "))
    return int(menu + sum(trial.user_attrs.get("tokens", 0) for trial in study.get_trials(deepcopy=False)))


def _matrix(rows: Sequence[Row]) -> np.ndarray:
    return np.array([list(row.values.values()) for row in rows], dtype=float)


def comparable(rows: Iterable[Row], rung: int | None = None) -> list[Row]:
    """The complete rows of ``rung``, by default of that at which the front stands: like is compared with like."""
    rows = list(rows)
    rung = front_rung(rows) if rung is None else rung
    return [row for row in rows if row.state == "complete" and row.rung == rung]


def front_rung(rows: Sequence[Row]) -> int:
    """The rung at which the front stands: from the first up, as long as the next covers the front below it.

    It does where the dense model is complete there, and of the members below each was measured or failed by itself,
    and one at least is complete.
    """
    rung = 0
    while _covers(rows, rung + 1):
        rung += 1
    return rung


def _covers(rows: Sequence[Row], rung: int) -> bool:
    known = {row.plan_key: row.state for row in rows if row.rung == rung and row.counts}
    if known.get(DENSE_KEY) != "complete":
        return False
    states = [known.get(row.plan_key) for row in compressed_front(rows, rung - 1)]
    return None not in states and "complete" in states


def compressed_front(rows: Sequence[Row], rung: int) -> list[Row]:
    """The compressed members of the front at ``rung`` that meet the study's limits, or all where none does."""
    members = [row for row in front_of(rows, rung) if not row.is_dense]
    return [row for row in members if row.within] or members


def front_of(rows: Iterable[Row], rung: int | None = None) -> list[Row]:
    """The comparable rows that no other dominates, best in the first objective first. Every objective is minimised.

    Two latencies closer than the larger of their spreads count as equal, so that noise does not fill the front. As that
    is not transitive, rows are taken in order of their values: one joins unless a member is as good in everything, and
    puts out the members that it is as good as. Where nothing has a spread, this is the Pareto front, equals once.
    """
    measured = sorted(comparable(rows, rung), key=lambda row: list(row.values.values()))
    if not measured:
        return []
    values, spreads = _matrix(measured), np.array([_spreads(row) for row in measured])
    members: list[int] = []
    for number in range(len(measured)):
        apart = np.maximum(spreads[members], spreads[number])
        if not (values[members] <= values[number] + apart).all(1).any():
            kept = ~(values[number] <= values[members] + apart).all(1)
            members = [*(member for member, stays in zip(members, kept, strict=True) if stays), number]
    return [measured[number] for number in members]


def _spreads(row: Row) -> list[float]:
    """Of every objective, as it was measured; 0 for what the plan decides."""
    notes = row.attributes.get("notes", {})
    return [float(notes.get(f"{name}_spread", 0.0)) for name in row.values]


def dense_row(rows: Iterable[Row], rung: int | None = None) -> Row | None:
    """The complete row that measured the dense model at ``rung``, by default where the front stands."""
    return next((row for row in comparable(rows, rung) if row.is_dense), None)


@dataclass(frozen=True)
class Box:
    """What the hypervolume is measured in: every axis runs from its ideal (0) to its reference (1).

    ``logarithmic`` axes run evenly in the logarithm of the value: twice the excess loss is twice as far.
    """

    ideal: dict[str, float]
    reference: dict[str, float]
    logarithmic: frozenset[str] = frozenset()

    def scale(self, rows: Sequence[Row]) -> np.ndarray:
        """Rows as points (N, d) in units of the box."""
        return self.unit(_matrix(rows))

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Objective values (N, d), in the order of the axes, in units of the box; better than ideal counts as ideal."""
        corners = np.array([list(self.ideal.values()), list(self.reference.values())])  # (2, d)
        both = np.vstack([corners, np.asarray(values, dtype=float).reshape(-1, corners.shape[1])])
        for axis, name in enumerate(self.ideal):
            if name in self.logarithmic:
                both[:, axis] = np.log(both[:, axis])
        scaled: np.ndarray = np.maximum((both[2:] - both[0]) / (both[1] - both[0]), 0.0)
        return scaled


def box_of(objectives: Settings, dense: Row) -> Box:
    """The box that the objectives state for this dense model."""
    made = {name: make_objective(name, settings) for name, settings in objectives.items()}
    corners = {name: objective.box(dense.values[name]) for name, objective in made.items()}
    return Box(
        {name: low for name, (low, _) in corners.items()},
        {name: high for name, (_, high) in corners.items()},
        frozenset(name for name, objective in made.items() if objective.logarithmic),
    )


def hypervolume(rows: Sequence[Row], box: Box) -> float:
    """The share of the box that ``rows`` dominate, in [0, 1]; exact, by moocore. Points outside count nothing."""
    if not rows:
        return 0.0
    points = box.scale(rows)
    return float(moocore.hypervolume(points, ref=np.ones(points.shape[1])))


def knee(rows: Sequence[Row], box: Box) -> Row:
    """The row nearest to the ideal corner of the box, in Euclidean distance after scaling."""
    if not rows:
        raise InputError("no trial is complete, so there is no knee: launch the study first")
    return rows[int(np.argmin(np.linalg.norm(box.scale(rows), axis=1)))]


@dataclass(frozen=True)
class Calibration:
    """How well the sampler's predictions, made before each trial, agree with what was measured.

    Attributes:
        trials: how many predictions there are.
        spearman, kendall: rank correlations of predicted and measured values, over plans of all sizes.
        at_size: Spearman's partial correlation given the size, for size alone orders plans of all sizes well; None
            where too few trials, or nearly none of the order but what size decides, are left to tell.
        front_error: median relative error of the predictions of front members.
        error: median error of the log-divergence predicted of the last `RECENT` trials, measured or predicted below
            `FAINT` counted as that.
    """

    trials: int
    spearman: float
    kendall: float
    at_size: float | None
    front_error: float
    error: float

    @property
    def poor(self) -> bool:
        """Whether the predictions are too poor to lean on: in their order, or in how much recent plans would hurt."""
        wrong = self.spearman < POOR_SPEARMAN or self.error > POOR_ERROR
        return self.trials >= MIN_PREDICTIONS and wrong

    @property
    def brief(self) -> str:
        """The four figures that a status line has room for."""
        at_size = "" if self.at_size is None else f" (at a size {self.at_size:.2f})"
        front = "" if math.isnan(self.front_error) else f", front within {self.front_error:.1%}"
        return f"Spearman {self.spearman:.2f}{at_size}, Kendall {self.kendall:.2f}{front}"

    def __str__(self) -> str:
        at_size = "not to be told" if self.at_size is None else f"{self.at_size:.3f}"
        return (
            f"predicted against measured over {self.trials} trials: Spearman {self.spearman:.3f}, at comparable size"
            f" {at_size}, Kendall {self.kendall:.3f}, median error at the front {self.front_error:.1%}, of the"
            f" log-divergence of recent trials {self.error:.2f}"
            + (" (poor: trust the measured trials, not the predictions)" if self.poor else "")
        )


RECENT = 16  # trials
MIN_PREDICTIONS = 8  # fewer say nothing about a rank correlation or a median
POOR_SPEARMAN = 0.8
# Of log-divergence. On synthetic problems of 6 and 30 sites whose menu is off by a factor of 1.6 a site, with and
# without interactions and 10% noise, the median over 8 to 16 trials was 0.02 to 0.25; with the menu's divergences
# shuffled between sites and off by a factor of 7, 0.33 to 1.0 over the first 8 to 16, and 0.1 to 0.5 after 40.
POOR_ERROR = 0.3
FAINT = 0.02  # nats a token; of less, noise of a few thousandths decides the logarithm
LEAST_LEFT = 0.02  # of the variance of ranks; what size leaves of less is of a few neighbours that swap places


def calibration(rows: Sequence[Row], objective: str) -> Calibration | None:
    """The calibration of predictions of ``objective``; None below three predictions.

    They are of values at the first rung, which is where they are compared, those of the front's plans too.
    """
    known = [row for row in comparable(rows, rung=0) if row.attributes.get("predicted") is not None]
    pairs = np.array([(row.attributes["predicted"], row.values[objective]) for row in known]).reshape(-1, 2)
    if len(pairs) < 3 or len(np.unique(pairs[:, 0])) < 2 or len(np.unique(pairs[:, 1])) < 2:
        return None
    front = {row.plan_key for row in front_of(rows)}
    at_front = [abs(p / m - 1) for row, (p, m) in zip(known, pairs, strict=True) if row.plan_key in front]
    sizes = np.array([row.attributes.get("block_parameters", math.nan) for row in known])
    return Calibration(
        trials=len(pairs),
        spearman=float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic),
        kendall=float(stats.kendalltau(pairs[:, 0], pairs[:, 1]).statistic),
        at_size=_partial(pairs[:, 0], pairs[:, 1], sizes),
        front_error=float(np.median(at_front)) if at_front else math.nan,
        error=_recent_error(rows, pairs, objective),
    )


def _partial(predicted: np.ndarray, measured: np.ndarray, sizes: np.ndarray) -> float | None:
    """Spearman's correlation of ``predicted`` and ``measured`` given ``sizes``, (T,) each: that of what is left of
    their ranks after a regression on the ranks of the sizes."""
    if len(sizes) < MIN_PREDICTIONS or not np.isfinite(sizes).all():
        return None
    ranks = np.array([stats.rankdata(values) for values in (predicted, measured, sizes)])
    ranks -= ranks.mean(1, keepdims=True)
    by_size = ranks[2] / max(float(ranks[2] @ ranks[2]), 1.0)
    left = ranks[:2] - np.outer(ranks[:2] @ ranks[2], by_size)  # (2, T)
    if ((left**2).sum(1) < LEAST_LEFT * (ranks[:2] ** 2).sum(1)).any():
        return None
    return float(left[0] @ left[1] / np.sqrt((left**2).sum(1).prod()))


def _recent_error(rows: Sequence[Row], pairs: np.ndarray, objective: str) -> float:
    """The median of |log D predicted − log D measured| over the last of ``pairs`` (T, 2) of ``objective``; NaN where
    the dense model, which perplexities are relative to, is not measured."""
    divergences = pairs[-RECENT:]
    if objective == "perplexity":
        dense = dense_row(rows, rung=0)
        divergences = np.log(divergences / (dense.values[objective] if dense else math.nan))
    logs = np.log(np.maximum(divergences, FAINT))
    return float(np.median(np.abs(logs[:, 0] - logs[:, 1])))


CONSTRAINT = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
TESTS = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


@dataclass(frozen=True)
class Constraint:
    """``figure operator bound``, such as ``parameters<=0.8``."""

    figure: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        match = CONSTRAINT.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            return cls(match[1], match[2], float(match[3]))
        except ValueError as error:
            raise InputError(
                f"constraint {text!r} does not read as FIGURE<=NUMBER, such as 'parameters<=0.8'"
            ) from error

    def holds(self, row: Row) -> bool:
        return bool(TESTS[self.operator](row.figure(self.figure), self.bound))

    def excess(self, row: Row) -> float:
        """How far ``row`` misses the bound, relative to it; 0 where it holds."""
        return self.missed(row.figure(self.figure))

    def missed(self, value: float) -> float:
        """How far ``value`` misses the bound, relative to it; 0 where it holds."""
        gap = abs(value - self.bound) / max(abs(self.bound), 1e-12)
        return 0.0 if TESTS[self.operator](value, self.bound) else max(gap, 1e-12)

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.bound:g}"


def meeting(rows: Sequence[Row], constraints: Sequence[Constraint]) -> list[Row]:
    """The rows that meet every constraint; `InputError` naming the closest where none does."""
    if not rows:
        raise InputError("no trial is complete yet: launch the study first")
    met = _met(rows, constraints)
    if not met:
        closest = min(rows, key=lambda row: sum(constraint.excess(row) for constraint in constraints))
        figures = ", ".join(f"{c.figure}={closest.figure(c.figure):.4g}" for c in constraints)
        wanted = " and ".join(str(constraint) for constraint in constraints)
        raise InputError(f"no trial meets {wanted}; the closest is trial {closest.number} with {figures}")
    return met


def _met(rows: Iterable[Row], constraints: Sequence[Constraint]) -> list[Row]:
    return [row for row in rows if all(constraint.holds(row) for constraint in constraints)]


def best_meeting(rows: Sequence[Row], constraints: Sequence[Constraint]) -> Row:
    """Of the rows that meet ``constraints``, the best in the first objective.

    Those of the front's rung where one meets them, else of the next below: not every plan went up. Raises `InputError`
    naming the closest where none does.
    """
    for rung in range(front_rung(rows), 0, -1):
        met = _met(comparable(rows, rung), constraints)
        if met:
            break
    else:
        met = meeting(comparable(rows, 0), constraints)
    return min(met, key=lambda row: list(row.values.values()))


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One flat row per trial: nested records become columns such as ``seconds.apply``."""
    front = {row.number for row in front_of(rows)}
    records = []
    for row in rows:
        record = asdict(row) | {"pareto": row.number in front}
        flat = {key: record[key] for key in ("number", "state", "origin", "pareto", "failure", "plan_key")}
        flat |= {key: value for key, value in row.attributes.items() if not isinstance(value, dict)} | row.values
        for name in ("seconds", "notes"):
            flat |= {f"{name}.{key}": value for key, value in row.attributes.get(name, {}).items()}
        flat |= {f"report.{key}": value for key, value in (row.report or {}).items() if not isinstance(value, dict)}
        records.append(flat)
    return pd.DataFrame.from_records(records)
