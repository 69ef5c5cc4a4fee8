"""Optuna's tables as this project reads them: a checksum on every record, no object for every row.

    checksum = first 64 bits of SHA-256 of the rows that hold the record, as JSON

Neither Optuna's tables nor SQLite's pages have one, so that a flipped byte is another plan or another value. A finished
trial has its checksum among its system attributes, with a copy of what it was asked for under a checksum of its own; an
attribute of the study has it beside the record. A trial whose rows do not match reads as failed with `DAMAGED`, and the
next launch measures what it was asked for again; such an attribute reads as if it were not there. Trials of earlier
versions have no checksum: of these only the plan is compared with its key. `checked.CheckedStorage` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Engine

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.attributes import ASKED, DAMAGED
from rankfront.search.plans.plan import Plan

TRIALS: Any = models.TrialModel.__table__
CHECKSUM, REQUEST = "rankfront:checksum", "rankfront:request"  # system attributes
PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "values": (models.TrialValueModel.__table__, ("objective", "value", "value_type")),
    "params": (models.TrialParamModel.__table__, ("param_name", "param_value", "distribution_json")),
    "user": (models.TrialUserAttributeModel.__table__, ("key", "value_json")),
    "system": (models.TrialSystemAttributeModel.__table__, ("key", "value_json")),
}
CORRUPT = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)  # what parsing spoiled rows raises
NUMBERS = {"FINITE": None, "INF_POS": float("inf"), "INF_NEG": -float("inf")}


Rows = dict[str, list[Any]]  # of one trial, by part, as the tables hold them


class Chosen:
    """Queries for the trials that a condition on their table chooses, in order: made once, which takes longer than to
    run them. No column is converted: it may be spoiled.

    Attributes:
        heads: of each trial its id, number, state, start and end.
        parts: by part, of each of its rows the trial's id and the columns in `PARTS`.
    """

    def __init__(self, condition: Any) -> None:
        ids = sqlalchemy.select(TRIALS.c.trial_id).where(condition)
        head = _raw(TRIALS, ("number", "state", "datetime_start", "datetime_complete"))
        self.heads = ids.add_columns(*head).order_by(TRIALS.c.trial_id)
        self.parts = {
            part: sqlalchemy.select(table.c.trial_id, *_raw(table, columns))
            .where(table.c.trial_id.in_(ids))
            .order_by(*table.primary_key)
            for part, (table, columns) in PARTS.items()
        }


def _raw(table: Any, columns: Iterable[str]) -> list[Any]:
    return [sqlalchemy.type_coerce(table.c[name], sqlalchemy.types.NullType()) for name in columns]


_OF_STUDY = TRIALS.c.study_id == sqlalchemy.bindparam("study")
OF_STUDY = Chosen(_OF_STUDY)
NEWER_OR_INCLUDED = Chosen(
    _OF_STUDY
    & (
        (TRIALS.c.trial_id > sqlalchemy.bindparam("newest"))
        | TRIALS.c.trial_id.in_(sqlalchemy.bindparam("included", expanding=True))
    )
)
ONE = Chosen(TRIALS.c.trial_id == sqlalchemy.bindparam("trial"))


def checksum_of(record: Any) -> str:
    """Of plain data; what is not (bytes, where a column's type was spoiled) counts as its representation."""
    return hashlib.sha256(json.dumps(record, default=repr).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def trial_checksum(number: Any, state: Any, rows: Rows) -> str:
    system = [row for row in rows["system"] if row[0] not in (CHECKSUM, REQUEST)]
    return checksum_of([number, state, *(sorted(part, key=repr) for part in (rows | {"system": system}).values())])


def params_of(rows: Rows) -> dict[str, Any]:
    return {name: _distribution(kind).to_external_repr(value) for name, value, kind in rows["params"]}


@lru_cache(maxsize=2**14)
def _distribution(text: str) -> BaseDistribution:
    """One object for all trials, which changes no more: parsing each takes most of the time of reading a study."""
    return json_to_distribution(text)


class Records:
    """The trials of a study and its attributes, from the tables that ``engine`` reaches.

    Attributes:
        dropped: names of the study's attributes that did not match when they were last read.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dropped: tuple[str, ...] = ()
        self._first_checked: int | None = None  # id of the first trial with a checksum: later ones have it too
        self._known: dict[str, tuple[str, Any]] = {}  # the study's attributes: as stored, and parsed

    def trials(self, chosen: Chosen, **given: Any) -> list[FrozenTrial]:
        """The ``chosen`` trials at the values ``given`` to the condition, in order; damaged ones have no number."""
        with self.engine.connect() as connection:
            heads = [tuple(head) for head in connection.execute(chosen.heads, given)]
            if not heads:
                return []
            parts = self.parts(connection, [head[0] for head in heads], chosen, **given)
        checked = [trial_id for trial_id, rows in parts.items() if any(row[0] == CHECKSUM for row in rows["system"])]
        self._first_checked = min(
            [*checked, *([] if self._first_checked is None else [self._first_checked])], default=None
        )
        return [self._trial(parts[head[0]], *head) for head in heads]

    def _trial(self, rows: Rows, trial_id: int, number: Any, state: Any, start: Any, end: Any) -> FrozenTrial:
        try:
            if not self._intact(trial_id, number, state, rows):
                return _damaged(trial_id, rows)
            return _frozen(trial_id, number, state, start, end, rows)
        except CORRUPT:
            return _damaged(trial_id, rows)

    def _intact(self, trial_id: int, number: Any, state: Any, rows: Rows) -> bool:
        if not TrialState[state].is_finished():
            return True
        known = dict(rows["system"])
        if CHECKSUM in known:
            return bool(json.loads(known[CHECKSUM]) == trial_checksum(number, state, rows))
        user = dict(rows["user"])
        if keys.PLAN in user and Plan.key_in(json.loads(user[keys.PLAN])) != json.loads(user[keys.PLAN_KEY]):
            return False
        return self._first_checked is None or trial_id < self._first_checked

    def parts(self, connection: Any, trial_ids: Iterable[int], chosen: Chosen, **given: Any) -> dict[int, Rows]:
        """The rows of the ``chosen`` trials, by trial."""
        found: dict[int, Rows] = {trial_id: {part: [] for part in PARTS} for trial_id in trial_ids}
        for part, query in chosen.parts.items():
            for trial_id, *row in connection.execute(query, given):
                if trial_id in found:  # an index that was spoiled leads to rows of others
                    found[trial_id][part].append(tuple(row))
        return found

    def attributes(self, study_id: int) -> dict[str, Any]:
        """Those of the study whose checksum matches, and those of earlier versions, which have none."""
        table = models.StudyUserAttributeModel.__table__
        with self.engine.connect() as connection:
            query = sqlalchemy.select(table.c.key, table.c.value_json).where(table.c.study_id == study_id)
            stored = {str(key): text for key, text in connection.execute(query)}
        for key, text in stored.items():
            if self._known.get(key, (None,))[0] != text:
                self._known[key] = text, _record(key, text)
        found = {key: self._known[key][1] for key in stored}
        self.dropped = tuple(sorted(key for key, record in found.items() if record is DAMAGED))
        return {key: record for key, record in found.items() if record is not DAMAGED}


def _record(key: str, text: Any) -> Any:
    """What was stored under ``key``; `DAMAGED` where it does not match."""
    try:
        stored = json.loads(text)
    except CORRUPT:
        return DAMAGED
    if not isinstance(stored, dict) or len(stored) != 2 or stored.keys().isdisjoint({"checksum", "record"}):
        return stored  # of an earlier version
    matches = stored.get("checksum") == checksum_of([key, stored.get("record")])
    return stored["record"] if matches and "record" in stored else DAMAGED


def _frozen(trial_id: int, number: int, state: str, start: Any, end: Any, rows: Rows) -> FrozenTrial:
    ordered = sorted(rows["values"])
    return FrozenTrial(
        number=number,
        state=TrialState[state],
        value=None,
        values=[value if kind == "FINITE" else NUMBERS[kind] for _, value, kind in ordered] or None,
        datetime_start=_local(start),
        datetime_complete=_local(end),
        params=params_of(rows),
        distributions={name: _distribution(kind) for name, _, kind in rows["params"]},
        user_attrs={key: json.loads(text) for key, text in rows["user"]},
        system_attrs={key: json.loads(text) for key, text in rows["system"] if key not in (CHECKSUM, REQUEST)},
        intermediate_values={},
        trial_id=trial_id,
    )


def _damaged(trial_id: int, rows: Rows) -> FrozenTrial:
    """A failed trial in the place of one that does not match, with what it was asked for where that does."""
    try:
        request = json.loads(dict(rows["system"])[REQUEST])
        intact = request.pop("checksum") == checksum_of(request)
    except CORRUPT:
        intact = False
    asked = {**request["attributes"], ASKED: request} if intact else {}
    now = datetime.now()
    return FrozenTrial(
        number=-1,
        state=TrialState.FAIL,
        value=None,
        datetime_start=now,
        datetime_complete=now,
        params={},
        distributions={},
        user_attrs={**asked, keys.FAILURE: DAMAGED},
        system_attrs={},
        intermediate_values={},
        trial_id=trial_id,
    )


def number_damaged(trials: Iterable[FrozenTrial]) -> None:
    """Number the damaged trials: those left over, in order. `InputError` where one is missing altogether."""
    trials = list(trials)
    taken = {trial.number for trial in trials}
    free = (number for number in range(len(trials)) if number not in taken)
    for trial in trials:
        if trial.number == -1:
            trial.number = next(free, -1)
    missing = set(range(len(trials))) - {trial.number for trial in trials}
    if missing:
        raise InputError(
            f"the study's storage is damaged: trial {min(missing)} is missing from it; restore it, or launch into a new"
            " folder"
        )


def _local(moment: Any) -> datetime | None:
    """Naive local time, as Optuna has it, of what it stores in UTC: text in SQLite."""
    if moment is None:
        return None
    known = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return known.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def damaged_names(trials: Sequence[FrozenTrial], dropped: Iterable[str]) -> list[str]:
    """What is damaged and was not measured again: ``trial 3``, and ``dropped`` attributes such as ``report 5``."""
    replaced = keys.numbers_under(keys.REPLACES, (t.user_attrs for t in trials if t.state.is_finished()))
    lost = [t.number for t in trials if t.user_attrs.get(keys.FAILURE) == DAMAGED and t.number not in replaced]
    return [*(f"trial {number}" for number in lost), *dropped]
