"""The front: rows of a study, the non-dominated ones of a rung, hypervolume, knee."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import moocore
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import InputError, check_choice
from rankfront.objectives import make_objective
from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.names import VALUE_BYTES
from rankfront.search.plans.plan import Plan

if TYPE_CHECKING:  # a front is shown without a frame
    import pandas as pd

Settings = Mapping[str, dict[str, Any]]
DENSE_KEY = Plan(()).key


@dataclass(frozen=True)
class Row:
    """One trial, flat. ``values`` follow the study's objectives; ``report`` is measured on the report split;
    ``within`` says whether it meets the study's own limits, ``retried`` whether another trial measures it again,
    ``stored`` how many values each site stores that the plan treats, in its order; None where that was not kept."""

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
    retried: bool = False
    stored: tuple[int, ...] | None = None

    @property
    def counts(self) -> bool:
        """Whether the trial counts against the limit: complete, or failed by itself."""
        failed = self.state == "failed" and not is_void({keys.FAILURE: self.failure}) and not self.retried
        return self.state == "complete" or failed

    @property
    def is_dense(self) -> bool:
        """Whether its plan leaves every site dense."""
        return self.plan_key == DENSE_KEY

    @property
    def rung(self) -> int:
        """The fidelity that it was measured at, 0 the cheapest: others are in runs of 0.1 alone."""
        return int(self.attributes.get(keys.RUNG, 0))

    @cached_property
    def plan(self) -> Plan:
        if self.plan_json is None:
            why = self.failure or "it was stopped before one was chosen"
            raise InputError(f"trial {self.number} has no plan ({why}): name another")
        return Plan.from_json(self.plan_json, f"the plan of trial {self.number}")

    @property
    def value_bytes(self) -> int:
        """Bytes of a value in the dtype of the model that its plan is of."""
        return VALUE_BYTES[dict(self.plan.origin)["dtype"]]

    @cached_property
    def plan_to_show(self) -> Plan:
        """`plan`, its levels as they are stored: no method is imported to check them."""
        return self.plan if self.plan_json is None else Plan.from_json(self.plan_json, levels=False)

    def figure(self, name: str) -> float:
        """An objective's value, or another measured figure such as ``block_parameters``."""
        found = self.values.get(name, self.attributes.get(name, self.attributes.get(keys.NOTES, {}).get(name)))
        if not isinstance(found, int | float):
            figures = {**self.attributes.get(keys.NOTES, {}), **self.attributes, **self.values}
            check_choice("figure", name, sorted(k for k, v in figures.items() if isinstance(v, int | float)))
        return float(found)


STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.PRUNED: "repeated",
}
OWN_COLUMNS = (keys.ORIGIN, keys.PLAN, keys.PLAN_KEY, keys.FAILURE, keys.LABEL, keys.STORED)


class StudyReader:
    """Reads a study that grows: rows of finished trials, which change no more, are made once."""

    def __init__(self, study: optuna.Study, objectives: Sequence[str]) -> None:
        self.study = study
        self.objectives = objectives
        self._rows: dict[int, Row] = {}

    def read(self) -> StudyState:
        """The study as it is now."""
        known = dict(self.study._storage.get_study_user_attrs(self.study._study_id))  # not a deep copy, as Optuna's is
        return state_of(known, self.study.get_trials(deepcopy=False), self.objectives, self._rows)


@dataclass(frozen=True)
class StudyState:
    """A study as it was read: its trials by number, its attributes, and its rows: trials without proposals that had
    been measured before and without slopes."""

    trials: Sequence[FrozenTrial]
    known: Mapping[str, Any]
    rows: Sequence[Row]

    @cached_property
    def waiting(self) -> list[FrozenTrial]:
        """The queue."""
        return [trial for trial in self.trials if trial.state == TrialState.WAITING]

    @cached_property
    def measured(self) -> set[str | None]:
        """Plans that were measured, failed by themselves, or run: not to be measured once more."""
        return {row.plan_key for row in self.rows if row.counts or row.state == "running"}

    @cached_property
    def spent(self) -> int:
        """Trials that count against the limit: finished ones, and failed ones that failed by themselves."""
        return sum(row.counts for row in self.rows)

    @cached_property
    def tokens(self) -> int:
        """Tokens that trials, slopes and the menu ran through the model, a backward pass counted as two forward
        ones."""
        return int(keys.menu_tokens(self.known) + sum(t.user_attrs.get(keys.TOKENS, 0) for t in self.trials))


def state_of(
    known: Mapping[str, Any],
    trials: Sequence[FrozenTrial],
    objectives: Sequence[str],
    made: dict[int, Row] | None = None,
) -> StudyState:
    """A study with these attributes and trials; rows of finished trials are taken from ``made``, and kept there."""
    made = {} if made is None else made
    again = keys.numbers_under(keys.AGAIN, (trial.user_attrs for trial in trials))
    rows = []
    for trial in trials:
        if trial.state == TrialState.PRUNED or keys.SLOPES_OF in trial.user_attrs:
            continue
        report, retried = known.get(keys.report_of(trial.number)), trial.number in again
        row = made.get(trial.number)
        if row is None or row.report != report or row.retried != retried:
            row = _row(trial, objectives, report, retried)
            if trial.state.is_finished():
                made[trial.number] = row
        rows.append(row)
    return StudyState(trials, known, rows)


def _row(trial: FrozenTrial, objectives: Sequence[str], report: dict[str, Any] | None, again: bool) -> Row:
    attributes = trial.user_attrs
    complete = trial.state == TrialState.COMPLETE
    origin = attributes.get(keys.ORIGIN, "")
    return Row(
        number=trial.number,
        state=STATES[trial.state],
        origin=f"{origin}: {attributes[keys.LABEL]}" if keys.LABEL in attributes else origin,
        plan_json=attributes.get(keys.PLAN),
        plan_key=attributes.get(keys.PLAN_KEY),
        values=dict(zip(objectives, trial.values, strict=True)) if complete else {},
        attributes={key: value for key, value in attributes.items() if key not in OWN_COLUMNS},
        report=report,
        failure=attributes.get(keys.FAILURE),
        within=all(excess <= 0 for excess in trial.constraints.values()),
        retried=again,
        stored=tuple(attributes[keys.STORED]) if keys.STORED in attributes else None,
    )


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
    if not spreads.any():  # the loop is for noise, and for equals
        kept = np.flatnonzero(moocore.is_nondominated(values, keep_weakly=True))
        measured, values, spreads = [measured[number] for number in kept], values[kept], spreads[kept]
    members: list[int] = []
    for number in range(len(measured)):
        apart = np.maximum(spreads[members], spreads[number])
        if not (values[members] <= values[number] + apart).all(1).any():
            kept = ~(values[number] <= values[members] + apart).all(1)
            members = [*(member for member, stays in zip(members, kept, strict=True) if stays), number]
    return [measured[number] for number in members]


def _spreads(row: Row) -> list[float]:
    """Of every objective, as it was measured; 0 for what the plan decides."""
    notes = row.attributes.get(keys.NOTES, {})
    return [float(notes.get(f"{name}_spread", 0.0)) for name in row.values]


def dense_row(rows: Iterable[Row], rung: int | None = None) -> Row | None:
    """The complete row that measured the dense model at ``rung``, by default where the front stands."""
    return next((row for row in comparable(rows, rung) if row.is_dense), None)


def check_dense(rows: Iterable[Row]) -> None:
    """Raise `InputError` with the reason where the dense model was tried, last of all, and could not be measured."""
    tried = [row for row in rows if row.is_dense and row.rung == 0 and row.counts]
    if tried and tried[-1].state == "failed":
        raise InputError(f"the dense model could not be measured ({tried[-1].failure}): launch the study again")


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


def frame(rows: Sequence[Row], more: Mapping[int, Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """One flat row per trial: nested records become columns such as ``seconds.apply``; ``more`` columns by trial."""
    import pandas as pd

    front = {row.number for row in front_of(rows)}
    records = []
    for row in rows:
        record = asdict(row) | {"pareto": row.number in front}
        flat = {key: record[key] for key in ("number", "state", "origin", "pareto", "failure", "plan_key")}
        flat |= {key: value for key, value in row.attributes.items() if not isinstance(value, dict)} | row.values
        for name in (keys.SECONDS, keys.NOTES):
            flat |= {f"{name}.{key}": value for key, value in row.attributes.get(name, {}).items()}
        flat |= {f"report.{key}": value for key, value in (row.report or {}).items() if not isinstance(value, dict)}
        records.append(flat | dict((more or {}).get(row.number, {})))
    return pd.DataFrame.from_records(records)
