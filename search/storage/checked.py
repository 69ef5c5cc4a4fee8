"""Optuna's storage that writes a checksum on every record, and compares it when it reads; see `records`."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar

import optuna
import sqlalchemy
from optuna.distributions import check_distribution_compatibility, distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from rankfront.search import attributes as keys
from rankfront.search.attributes import ASKED, DECIDING
from rankfront.search.storage.records import (
    CHECKSUM,
    NEWER_OR_INCLUDED,
    OF_STUDY,
    ONE,
    REQUEST,
    Records,
    checksum_of,
    number_damaged,
    params_of,
    trial_checksum,
)


class CheckedStorage(optuna.storages.RDBStorage):
    """`RDBStorage` that writes and compares checksums.

    Attributes:
        guard: called before anything is finished; raises where what is written would be lost.
        records: what reads the tables.
    """

    guard: Callable[[], None]
    _newest: ClassVar[str | None] = None

    def __init__(self, url: str, guard: Callable[[], None] = lambda: None, **arguments: Any) -> None:
        super().__init__(url, skip_compatibility_check=True, **arguments)
        if self.get_current_version() != self._newest_schema():
            self._version_manager.check_table_schema_compatibility()
        self.guard = guard
        self.records = Records(self.engine)
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
        scheduling's time."""
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
            number = connection.scalar(sqlalchemy.select(table.c.number).where(table.c.trial_id == trial_id))
            rows = self.records.parts(connection, [trial_id], ONE, trial=trial_id)[trial_id]
        stored = [models.TrialValueModel.value_to_stored_repr(value) for value in values or ()]
        rows["values"] = [(place, value, kind.name) for place, (value, kind) in enumerate(stored)]
        known = {key: json.loads(text) for key, text in rows["user"]}
        request = {"params": params_of(rows), "attributes": {key: known[key] for key in DECIDING if key in known}}
        self.set_trial_system_attr(trial_id, REQUEST, request | {"checksum": checksum_of(request)})
        self.set_trial_system_attr(trial_id, CHECKSUM, trial_checksum(number, state.name, rows))
        self._write()

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """As Optuna's, by one query for each table instead of an object for each row."""
        self._write()
        if trial_id_greater_than > -1:
            newer = {"newest": trial_id_greater_than, "included": sorted(included_trial_ids)}
            trials = self.records.trials(NEWER_OR_INCLUDED, study=study_id, **newer)
        else:
            trials = self.records.trials(OF_STUDY, study=study_id)
            number_damaged(trials)
        return [trial for trial in trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's, likewise."""
        self._write()
        found = self.records.trials(ONE, trial=trial_id)
        if not found:
            raise KeyError(trial_id)
        return found[0]

    # -- attributes of the study

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self.guard()
        record = json.loads(json.dumps(value))  # as it will be read
        super().set_study_user_attr(study_id, key, {"checksum": checksum_of([key, record]), "record": record})

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self.records.attributes(study_id)


def close(study: optuna.Study) -> None:
    """Let go of the database: SQLite then puts its log away."""
    backend = getattr(study._storage, "_backend", None)
    if isinstance(backend, CheckedStorage):
        backend.remove_session()
        backend.engine.dispose()


def asked_again(study: optuna.Study) -> list[FrozenTrial]:
    """The damaged trials whose request is known and that no other replaces."""
    trials = study.get_trials(deepcopy=False)
    replaced = keys.numbers_under(keys.REPLACES, (trial.user_attrs for trial in trials))
    return [trial for trial in trials if ASKED in trial.user_attrs and trial.number not in replaced]
