"""The run folder: one study's files. Optuna's storage holds the trials; here lie its definition and its lock."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from rankfront.methods import InputError
from rankfront.search.atomic import write_whole
from rankfront.search.config import StudyConfig, definition_of, make_config, moved
from rankfront.search.storage.database import (
    ANY_FILE,
    Place,
    guard_of,
    name_objectives,
    open_file,
    open_study,
    place_of,
    read_study,
)
from rankfront.search.storage.front import StudyState, state_of
from rankfront.search.urls import masked, parse_url, without_password

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
        self.database = path / "study.db"
        self.own_text_file = path / "self.safetensors"

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
            return Definition(make_config(_as_now(config)), resolved)
        except InputError as error:
            raise InputError(f"{self.file} is corrupt ({error}): restore it, or launch into a new folder") from error

    def resolved(self) -> dict[str, str]:
        """What `Definition` says of the first launch; nothing before it."""
        return self.definition().resolved if self.file.exists() else {}

    def settled(self, config: StudyConfig) -> StudyConfig:
        """``config`` with the grid of ranks that the first launch found, where it was to ask the device."""
        known = self.resolved().get("rank_multiple")
        return config if known is None else config.on_grid(int(known))

    def remembered(self, config: StudyConfig) -> StudyConfig:
        """``config`` with the absolute paths of the first launch for relative ones that name nothing from here."""
        if not self.file.exists():
            return config
        before, now = (known.model_dump(mode="json") for known in (self.definition().config, config))
        return make_config(now | {key: moved(before[key], now[key]) for key in ("model", "data")})

    def identity(self) -> str:
        """What sets this run apart from others in a storage that they share."""
        return str(json.loads(self.file.read_text(encoding="utf-8"))["id"])

    def define(self, config: StudyConfig, resolved: dict[str, str]) -> None:
        """Write the definition, or check it against the one that is there.

        Limits may differ between launches, and a storage may be reached otherwise or move with what it holds; any other
        difference raises `InputError` naming it.
        """
        if self.file.exists():
            before = self.definition()
            now = definition_of(config)
            _refuse_changes(self.path, moved(now, definition_of(before.config)), now)  # earlier ones had relative paths
            self._refuse_move(before.config.search.storage, config)
            known = {key: value for key, value in resolved.items() if key in before.resolved}  # not what is new since
            _refuse_changes(self.path, before.resolved, known)
        self.path.mkdir(parents=True, exist_ok=True)
        identity = self.identity() if self.file.exists() else uuid.uuid4().hex
        data = {"version": VERSION, "id": identity, "config": config.model_dump(mode="json"), "resolved": resolved}
        secret = config.search.storage is not None and parse_url(config.search.storage).password is not None
        write_whole(self.file, (json.dumps(data, indent=1) + "\n").encode(), 0o600 if secret else 0o666)

    def keep_own_text(self, ids: Mapping[str, np.ndarray]) -> None:
        """Write the model's own texts, seed -> token ids (N,): what it samples is not the same on every machine."""
        write_whole(self.own_text_file, save(dict(ids)))

    def own_text(self) -> dict[str, np.ndarray]:
        """What `keep_own_text` wrote, none where it did not. Raises `InputError` where the file is corrupt."""
        if not (self.file.is_file() and self.own_text_file.is_file()):
            return {}
        try:
            ids: dict[str, np.ndarray] = load_file(self.own_text_file)
            return ids
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.own_text_file} is corrupt ({error}): restore it, or remove it to sample the text again"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one launcher; `InputError` where another holds it. Freed by any kind of death."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run {str(self.path)!r} is a file: name a folder, new or of an earlier launch")
        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / "lock"), self.path / "launcher"
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            process = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
            raise InputError(
                f"run {str(self.path)!r} is being launched by process {process}: wait for it, stop it, or use --run"
            ) from error
        try:
            write_whole(holder, str(os.getpid()).encode())  # the lock itself cannot be read everywhere
            yield
        finally:
            lock.release()

    def study(self, config: StudyConfig, write: bool = False) -> optuna.Study:
        """The Optuna study: in the run folder's SQLite file, or at the study's own storage URL.

        To read, nothing is made or written, and there are no trials before the first launch. With ``write``, under the
        run's lock, what is not there yet is made.
        """
        place, objectives = self._place(config), len(config.objectives)
        if config.search.storage is not None:
            found = open_study(place, objectives, write, guard_of(self.file, self.database))
        elif not write and not self.database.exists():
            return optuna.create_study(directions=["minimize"] * objectives)
        else:
            found = open_file(place, self.file, self.database, objectives, write)
        if write:
            name_objectives(found, list(config.objectives))
        return found

    def read(self, config: StudyConfig) -> tuple[StudyState, list[str]]:
        """The study as it is, and names of what is damaged in it; it is empty before the first launch."""
        place = self._place(config)
        if config.search.storage is None and not self.database.exists():
            return state_of({}, [], ()), []
        trials, known, damaged = read_study(place)
        return state_of(known, trials, list(config.objectives)), damaged

    def _place(self, config: StudyConfig) -> Place:
        if config.search.storage is None:
            return Place(ANY_FILE, repr(str(self.database)), self.database, STUDY_NAME)
        return place_of(config.search.storage, self.path, f"{STUDY_NAME}-{self.identity()}")

    def _refuse_move(self, before: str | None, config: StudyConfig) -> None:
        """`InputError` where the study's storage is another one than ``before``, which does not hold the run."""
        now = config.search.storage
        if without_password(before) == without_password(now):
            return
        try:
            if now is None:
                raise InputError("no storage")
            self.study(config)
        except InputError as error:
            old, new = (json.dumps(None if url is None else masked(url)) for url in (before, now))
            raise InputError(
                f"run {str(self.path)!r} was begun with search.storage = {old} and the study now has {new}, which does"
                f" not hold it ({error}): change it back, move the database, or use --run for a new folder"
            ) from error


def _as_now(config: Any) -> Any:
    """The configuration of a run that 0.1 began: of several fidelities, which trials had then, the first is left."""
    before = config.get("search") if isinstance(config, dict) else None
    rungs = before.get("rungs") if isinstance(before, dict) else None
    if not isinstance(before, dict) or not isinstance(rungs, list):
        return config
    search = {key: value for key, value in before.items() if key not in ("rungs", "reduction")}
    return config | {"search": search | ({"trial_tokens": rungs[0]} if rungs else {})}


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
