"""The run folder: one study's files. Optuna's storage holds the trials; here lie its definition and its lock."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from rankfront.methods import InputError
from rankfront.search.config import StudyConfig, definition_of, make_config

VERSION = 1
STUDY_NAME = "rankfront"


@dataclass(frozen=True)
class Definition:
    """What defines the trials of a run.

    Attributes:
        config: the validated study, with the limits of its last launch.
        resolved: what ``auto`` and the texts came to: dtype, device, fingerprint of the weights, token hashes.
    """

    config: StudyConfig
    resolved: dict[str, str]


class Run:
    """A folder that holds one study."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "study.json"

    def definition(self) -> Definition:
        """What the run was launched with; `InputError` where the folder is no run or its file is corrupt."""
        if not self.file.is_file():
            raise InputError(
                f"{str(self.path)!r} is not a run folder (no study.json): name one that `rankfront launch` made"
            )
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            config, resolved, version = data["config"], data["resolved"], data["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.file} is corrupt ({error}): restore it, or launch into a new folder") from error
        if version != VERSION:
            raise InputError(
                f"{self.file} has version {version}, this rankfront reads {VERSION}: launch into a new folder"
            )
        try:
            return Definition(make_config(config), resolved)
        except InputError as error:
            raise InputError(f"{self.file} is corrupt ({error}): restore it, or launch into a new folder") from error

    def identity(self) -> str:
        """What sets this run apart from others in a storage that they share."""
        return str(json.loads(self.file.read_text(encoding="utf-8"))["id"])

    def define(self, config: StudyConfig, resolved: dict[str, str]) -> None:
        """Write the definition, or check it against the one that is there.

        Limits may differ between launches; any other difference raises `InputError` naming it.
        """
        if self.file.exists():
            before = self.definition()
            _refuse_changes(self.path, definition_of(before.config), definition_of(config))
            _refuse_changes(self.path, before.resolved, resolved)
        self.path.mkdir(parents=True, exist_ok=True)
        identity = self.identity() if self.file.exists() else uuid.uuid4().hex
        data = {"version": VERSION, "id": identity, "config": config.model_dump(mode="json"), "resolved": resolved}
        text = json.dumps(data, indent=1)
        partial = self.file.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one launcher; `InputError` where another holds it. Freed by any kind of death."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run {str(self.path)!r} is a file: name a folder, new or of an earlier launch")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise InputError(
                    f"run {str(self.path)!r} is being launched by process {holder}: wait for it, stop it, or use --run"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _connect(self) -> sqlite3.Connection:
        """A connection to the run's own database. With a write-ahead log a commit needs no flush of the disk: a
        killed process loses nothing, a power cut at most the last trials."""
        connection = sqlite3.connect(self.path / "study.db", check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def study(self, config: StudyConfig) -> optuna.Study:
        """The Optuna study: in the run folder's SQLite file, or at the study's own storage URL."""
        local = {} if config.search.storage else {"creator": self._connect}
        url = config.search.storage or f"sqlite:///{self.path / 'study.db'}"
        name = f"{STUDY_NAME}-{self.identity()}" if config.search.storage else STUDY_NAME
        try:
            return optuna.create_study(
                study_name=name,
                storage=optuna.storages.RDBStorage(url, engine_kwargs=local) if local else url,
                directions=["minimize" for _ in config.objectives],
                load_if_exists=True,
            )
        except (SQLAlchemyError, sqlite3.Error, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the study's storage {url!r} cannot be opened ({reason}): restore it or use --run"
            ) from error


def _refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, old, new in _differences(before, now):
        raise InputError(
            f"run {str(path)!r} was begun with {key} = {json.dumps(old)} and the study now has {json.dumps(new)}:"
            " its trials would not compare; change it back, or use --run for a new folder"
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield key, before, now
