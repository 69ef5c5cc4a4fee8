"""Optuna's storage with a checksum on every record: what a disk changed is named, not believed.

    checksum = first 64 bits of SHA-256 of the rows that hold the record, as JSON

Neither Optuna's tables nor SQLite's pages have one, so that a flipped byte is another plan or another value. A finished
trial has its checksum among its system attributes, with a copy of what it was asked for under a checksum of its own; an
attribute of the study has it beside the record. A trial whose rows do not match reads as failed with `DAMAGED`, and the
next launch measures what it was asked for again; such an attribute reads as if it were not there. Trials of earlier
versions have no checksum: of these only the plan is compared with its key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import optuna
import sqlalchemy
from optuna.distributions import check_distribution_compatibility, distribution_to_json, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.attributes import ASKED, DAMAGED, DECIDING
from rankfront.search.plans.plan import Plan

CHECKSUM, REQUEST = "rankfront:checksum", "rankfront:request"  # system attributes
PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "values": (models.TrialValueModel, ("objective", "value", "value_type")),
    "params": (models.TrialParamModel, ("param_name", "param_value", "distribution_json")),
    "user": (models.TrialUserAttributeModel, ("key", "value_json")),
    "system": (models.TrialSystemAttributeModel, ("key", "value_json")),
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


def checksum_of(record: Any) -> str:
    """Of plain data; what is not (bytes, where a column's type was spoiled) counts as its representation."""
    return hashlib.sha256(json.dumps(record, default=repr).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _trial_checksum(number: Any, state: Any, rows: Rows) -> str:
    system = [row for row in rows["system"] if row[0] not in (CHECKSUM, REQUEST)]
    return checksum_of([number, state, *(sorted(part, key=repr) for part in (rows | {"system": system}).values())])


def _params(rows: Rows) -> dict[str, Any]:
    return {name: json_to_distribution(kind).to_external_repr(value) for name, value, kind in rows["params"]}


class CheckedStorage(optuna.storages.RDBStorage):
    """`RDBStorage` that writes and compares checksums.

    Attributes:
        guard: called before anything is finished; raises where what is written would be lost.
        dropped: names of the study's attributes that did not match when they were last read.
    """

    guard: Callable[[], None]
    dropped: tuple[str, ...] = ()
    _newest: ClassVar[str | None] = None

    def __init__(self, url: str, guard: Callable[[], None] = lambda: None, **arguments: Any) -> None:
        super().__init__(url, skip_compatibility_check=True, **arguments)
        if self.get_current_version() != self._newest_schema():
            self._version_manager.check_table_schema_compatibility()
        self.guard = guard
        self._first_checked: int | None = None  # id of the first trial with a checksum: later ones have it too
        self._known: dict[str, tuple[str, Any]] = {}  # the study's attributes: as stored, and parsed
        self._unwritten: dict[Any, dict[tuple[int, str], dict[str, Any]]] = {}  # rows by table, trial and name

    def _newest_schema(self) -> str:
        """Found once: it takes longer than reading a study."""
        if CheckedStorage._newest is None:
            CheckedStorage._newest = str(self.get_head_version())
        return CheckedStorage._newest

    # -- trials: what is set of one is written at the next read, or with its state

    def _set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any, previous: Any
    ) -> None:
        if previous is None:  # the first by this name: Optuna compares it with what the study has
            super()._set_trial_param(trial_id, param_name, param_value_internal, distribution, previous)
            return
        check_distribution_compatibility(previous, distribution)
        row = {"param_value": param_value_internal, "distribution_json": distribution_to_json(distribution)}
        self._later(models.TrialParamModel, "param_name", trial_id, param_name, row)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._later(models.TrialUserAttributeModel, "key", trial_id, key, {"value_json": json.dumps(value)})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._later(models.TrialSystemAttributeModel, "key", trial_id, key, {"value_json": json.dumps(value)})

    def _later(self, model: Any, column: str, trial_id: int, name: str, row: dict[str, Any]) -> None:
        rows = self._unwritten.setdefault(model.__table__, {})
        rows[trial_id, name] = {"trial_id": trial_id, column: name, **row}

    def _write(self) -> None:
        """Write what was set of trials since the last time, in one transaction: one for each name takes most of a
        driver's time."""
        unwritten, self._unwritten = self._unwritten, {}
        if not unwritten:
            return
        with self.engine.begin() as connection:
            head = models.TrialModel.__table__
            changed = sorted({trial_id for rows in unwritten.values() for trial_id, _ in rows})
            query = sqlalchemy.select(head.c.trial_id, head.c.state).where(head.c.trial_id.in_(changed))
            for trial_id, state in connection.execute(query):
                self.check_trial_is_updatable(trial_id, state)
            for table, rows in unwritten.items():
                named = table.c.param_name if "param_name" in table.c else table.c.key
                for trial_id in {trial_id for trial_id, _ in rows}:
                    own = [name for of, name in rows if of == trial_id]
                    connection.execute(table.delete().where(table.c.trial_id == trial_id, named.in_(own)))
                connection.execute(table.insert(), list(rows.values()))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self.guard()
        self._write()
        if state.is_finished():
            self._write_checksum(trial_id, state, values)
        return bool(super().set_trial_state_values(trial_id, state, values))

    def _write_checksum(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Of the trial as it will be: killed in between, it stays unfinished, and nobody looks at it."""
        table = models.TrialModel.__table__
        with self.engine.connect() as connection:
            one = sqlalchemy.select(table.c.trial_id).where(table.c.trial_id == trial_id)
            number = connection.scalar(sqlalchemy.select(table.c.number).where(table.c.trial_id == trial_id))
            rows = self._parts(connection, one)[trial_id]
        stored = [models.TrialValueModel.value_to_stored_repr(value) for value in values or ()]
        rows["values"] = [(place, value, kind.name) for place, (value, kind) in enumerate(stored)]
        known = {key: json.loads(text) for key, text in rows["user"]}
        request = {"params": _params(rows), "attributes": {key: known[key] for key in DECIDING if key in known}}
        self.set_trial_system_attr(trial_id, REQUEST, request | {"checksum": checksum_of(request)})
        self.set_trial_system_attr(trial_id, CHECKSUM, _trial_checksum(number, state.name, rows))
        self._write()

    def _parts(self, connection: Any, chosen: Any) -> dict[int, Rows]:
        """The rows of the ``chosen`` trials (a query of ids), by trial. No column is converted: it may be spoiled."""
        found: dict[int, Rows] = {trial_id: {part: [] for part in PARTS} for (trial_id,) in connection.execute(chosen)}
        for part, (model, columns) in PARTS.items():
            table = model.__table__
            raw = [sqlalchemy.type_coerce(table.c[name], sqlalchemy.types.NullType()) for name in columns]
            query = sqlalchemy.select(table.c.trial_id, *raw).where(table.c.trial_id.in_(chosen))
            for trial_id, *row in connection.execute(query.order_by(*table.primary_key)):
                if trial_id in found:  # an index that was spoiled leads to rows of others
                    found[trial_id][part].append(tuple(row))
        return found

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """As Optuna's, by one query for each table instead of an object for each row."""
        table = models.TrialModel.__table__
        of_study = table.c.study_id == study_id
        if trial_id_greater_than > -1:
            newer = table.c.trial_id > trial_id_greater_than
            of_study &= sqlalchemy.or_(newer, table.c.trial_id.in_(included_trial_ids))
        trials = self._read(of_study)
        if trial_id_greater_than == -1:
            _number(trials)
        return [trial for trial in trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's, likewise."""
        found = self._read(models.TrialModel.__table__.c.trial_id == trial_id)
        if not found:
            raise KeyError(trial_id)
        return found[0]

    def _read(self, chosen: Any) -> list[FrozenTrial]:
        """The trials that a condition on their table chooses, in order; damaged ones have no number."""
        self._write()
        table = models.TrialModel.__table__
        head = ("number", "state", "datetime_start", "datetime_complete")
        columns = [sqlalchemy.type_coerce(table.c[name], sqlalchemy.types.NullType()) for name in head]
        with self.engine.connect() as connection:
            query = sqlalchemy.select(table.c.trial_id, *columns).where(chosen)
            heads = [tuple(head) for head in connection.execute(query.order_by(table.c.trial_id))]
            parts = self._parts(connection, sqlalchemy.select(table.c.trial_id).where(chosen))
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
            return bool(json.loads(known[CHECKSUM]) == _trial_checksum(number, state, rows))
        user = dict(rows["user"])
        if keys.PLAN in user and Plan.key_in(json.loads(user[keys.PLAN])) != json.loads(user[keys.PLAN_KEY]):
            return False
        return self._first_checked is None or trial_id < self._first_checked

    # -- attributes of the study

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.guard()
        record = json.loads(json.dumps(value))  # as it will be read
        super().set_study_user_attr(study_id, key, {"checksum": checksum_of([key, record]), "record": record})

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Those whose checksum matches, and those of earlier versions, which have none."""
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
        params=_params(rows),
        distributions={name: json_to_distribution(kind) for name, _, kind in rows["params"]},
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


def _number(trials: Iterable[FrozenTrial]) -> None:
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


def close(study: optuna.Study) -> None:
    """Let go of the database: SQLite then puts its log away."""
    backend = getattr(study._storage, "_backend", None)
    if isinstance(backend, CheckedStorage):
        backend.remove_session()
        backend.engine.dispose()


def damages(study: optuna.Study) -> list[str]:
    """What is damaged and was not measured again: ``trial 3``, and names of attributes such as ``report 5``."""
    backend = getattr(study._storage, "_backend", None)
    if not isinstance(backend, CheckedStorage):
        return []
    trials = study.get_trials(deepcopy=False)
    replaced = keys.numbers_under(keys.REPLACES, (t.user_attrs for t in trials if t.state.is_finished()))
    lost = [t.number for t in trials if t.user_attrs.get(keys.FAILURE) == DAMAGED and t.number not in replaced]
    backend.get_study_user_attrs(study._study_id)
    return [*(f"trial {number}" for number in lost), *backend.dropped]


def asked_again(study: optuna.Study) -> list[FrozenTrial]:
    """The damaged trials whose request is known and that no other replaces."""
    trials = study.get_trials(deepcopy=False)
    replaced = keys.numbers_under(keys.REPLACES, (trial.user_attrs for trial in trials))
    return [trial for trial in trials if ASKED in trial.user_attrs and trial.number not in replaced]
