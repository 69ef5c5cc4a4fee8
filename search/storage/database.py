"""Opening a study's database, to launch or to read only."""

from __future__ import annotations

import re
import sqlite3
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Engine, ExceptionContext, create_engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from rankfront.methods import InputError
from rankfront.search.storage.checked import CheckedStorage
from rankfront.search.storage.records import OF_STUDY, Records, damaged_names, number_damaged
from rankfront.search.urls import masked, parse_url, sqlite_file

PATIENCE = 60  # seconds that a statement waits for another process to let go of the database
ANY_FILE = "sqlite:///study.db"  # names the dialect where a function connects
Connect = Callable[[], sqlite3.Connection]


def reason_of(error: BaseException, secret: str = "") -> str:
    """The first line of what went wrong at the bottom, without ``secret``."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    first = text.splitlines()[0]
    for known in {secret, urllib.parse.quote_plus(secret)} - {""}:
        first = first.replace(known, "***")
    return first


@contextmanager
def opening(shown: str, url: str = "") -> Iterator[None]:
    """Within, what a database or Optuna refuses is an `InputError` of one line, without the password of ``url``."""
    secret = str(parse_url(url).password or "") if url else ""
    try:
        yield
    except InputError:
        raise
    except (
        SQLAlchemyError,
        sqlite3.Error,
        StorageInternalError,
        RuntimeError,
        ValueError,
        LookupError,
        ImportError,
    ) as error:
        reason = reason_of(error, secret)
        raise InputError(f"the study's storage {shown} cannot be opened ({reason}): restore it or use --run") from error


@dataclass(frozen=True)
class Place:
    """Where a study lies.

    Attributes:
        url: of its database.
        shown: the same for messages, without a password.
        file: the SQLite file that it is; None for other databases.
        name: the study's in the database.
    """

    url: str
    shown: str
    file: Path | None
    name: str

    def check_there(self) -> None:
        """Raise `InputError` where the file of a database that is to be read is not there."""
        if self.file is not None and not self.file.exists():
            raise InputError(f"the study's storage {self.shown} does not exist: restore it, or launch the study")


def place_of(text: str, folder: Path, name: str) -> Place:
    """Where the study ``name`` lies at the storage URL ``text``; a relative SQLite file is in the run's ``folder``."""
    url, file = parse_url(text), sqlite_file(text, folder.absolute())
    if file is None:
        return Place(text, repr(masked(text)), None, name)
    before = Path(str(url.database))  # where earlier versions had it: in the folder they were started in
    if before.exists() and not file.exists():
        raise InputError(
            f"the study's storage {text!r} is {str(file)!r}, for it is relative to the run folder, and there is"
            f" {str(before.absolute())!r}: move it there, or write its absolute path"
        )
    return Place(url.set(database=str(file)).render_as_string(hide_password=False), repr(masked(text)), file, name)


def guard_of(definition: Path, database: Path) -> Callable[[], None]:
    """Raises `InputError` from when on these files of a run are gone or replaced: writing to a database that was opened
    goes on without an error, and all of it is lost."""
    opened = {path: path.stat().st_ino for path in (definition, database) if path.exists()}

    def guard() -> None:
        if not all(path.exists() and path.stat().st_ino == number for path, number in opened.items()):
            raise InputError(
                f"run {str(definition.parent)!r} was deleted or replaced while it was being launched: nothing that is"
                " measured can be kept; restore it, or launch again to begin anew"
            )

    return guard


def checked(place: Place, connect: Connect | None, create: bool, guard: Callable[[], None]) -> CheckedStorage:
    """The storage at ``place``, whose errors are `InputError` of one line from here on; ``create`` what it lacks."""
    arguments = {} if connect is None else {"creator": connect}
    escaped = place.url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a template
    storage = CheckedStorage(escaped, guard, engine_kwargs=arguments, skip_table_creation=not create)
    _refuse_errors(storage.engine, place)
    if create:
        _complete(storage)
    return storage


def _refuse_errors(engine: Engine, place: Place) -> None:
    """From here on, what the database refuses is an `InputError` of one line."""
    secret = str(parse_url(place.url).password or "")

    @sqlalchemy.event.listens_for(engine, "handle_error")
    def refuse(context: ExceptionContext) -> None:
        if not isinstance(context.sqlalchemy_exception, IntegrityError):  # which Optuna handles
            reason = reason_of(context.original_exception, secret)
            raise InputError(
                f"the study's storage {place.shown} failed ({reason}): every trial it holds is kept; mend that, and"
                " launch again to go on"
            ) from context.original_exception


def read_study(place: Place) -> tuple[list[FrozenTrial], dict[str, Any], list[str]]:
    """(trials by number, attributes, names of what is damaged) of the study at ``place``, which is only read.

    No object of Optuna's storage is made: it imports what migrates databases, which takes longer than reading one.
    """
    place.check_there()
    with opening(place.shown, place.url):
        connect = None if place.file is None else partial(read_only, place.file)
        engine = create_engine(place.url) if connect is None else create_engine(ANY_FILE, creator=connect)
        try:
            if not _has_newest_schema(engine):
                checked(place, connect, False, lambda: None)  # raises where it cannot be read
            _refuse_errors(engine, place)
            return _read_study(engine, place)
        finally:
            engine.dispose()


def _read_study(engine: Engine, place: Place) -> tuple[list[FrozenTrial], dict[str, Any], list[str]]:
    studies, records = models.StudyModel.__table__, Records(engine)
    with engine.connect() as connection:
        number = connection.scalar(sqlalchemy.select(studies.c.study_id).where(studies.c.study_name == place.name))
    if number is None:
        raise InputError(f"the study's storage {place.shown} does not hold this run: launch it first")
    trials = records.trials(OF_STUDY, study=number)
    number_damaged(trials)
    known = records.attributes(number)
    trials.sort(key=lambda trial: trial.number)
    return trials, known, damaged_names(trials, records.dropped)


def _has_newest_schema(engine: Engine) -> bool:
    """Whether the tables are as the last of Optuna's migrations leaves them, going by the names of their files."""
    files = (Path(models.__file__).parent / "alembic" / "versions").glob("v*.py")
    newest = max((file.stem.rstrip("_") for file in files), key=lambda name: re.split(r"(\d+)", name), default=None)
    with engine.connect() as connection:
        return bool(connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version")) == newest)


def _complete(storage: CheckedStorage) -> None:
    """Make the indexes that a killed creation left out: without that of names, a study is created twice."""
    for table in models.BaseModel.metadata.tables.values():
        for index in table.indexes:
            index.create(storage.engine, checkfirst=True)


def read_only(file: Path) -> sqlite3.Connection:
    """A connection to the SQLite file that writes nothing, makes no file and works in a folder that cannot be written.

    SQLite makes files beside a database with a write-ahead log even to read it, unless it is told that nobody writes,
    as is so where they are not there. Where they are, the index of the log is memory that its readers share.
    """
    log, index = (file.with_name(file.name + end) for end in ("-wal", "-shm"))
    name = f"file:{urllib.parse.quote(str(file.absolute()))}?mode=ro"
    if index.exists() and log.exists():
        return _lenient(sqlite3.connect(name, uri=True, check_same_thread=False))
    if not log.exists() or not log.stat().st_size:
        return _lenient(sqlite3.connect(f"{name}&immutable=1", uri=True, check_same_thread=False))
    memory = sqlite3.connect(":memory:", check_same_thread=False)  # a log that was copied without its index
    with TemporaryDirectory() as folder:
        for part in (file, log):
            Path(folder, part.name).write_bytes(part.read_bytes())
        with closing(sqlite3.connect(Path(folder, file.name))) as copy:
            copy.backup(memory)
    return _lenient(memory)


def to_write(file: Path) -> sqlite3.Connection:
    """A connection to a run's own database. With a write-ahead log a commit needs no flush of the disk: a killed
    process loses nothing, a power cut at most the last trials."""
    connection = sqlite3.connect(file, check_same_thread=False, timeout=PATIENCE)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return _lenient(connection)


def _lenient(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Spoiled text is read, and found by its checksum, rather than refused with all that is beside it."""
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    return connection


def create_file(file: Path, name: str, objectives: int) -> None:
    """A new database with an empty study at ``file``: complete under another name before it takes this one."""
    partial = file.with_name(f".{file.name}.partial")
    beside = [path.with_name(path.name + end) for path in (partial, file) for end in ("-journal", "-wal", "-shm")]
    for stale in (partial, *beside):  # a log would be taken for that of the new database
        stale.unlink(missing_ok=True)
    storage = CheckedStorage("sqlite:///partial", engine_kwargs={"creator": lambda: sqlite3.connect(partial)})
    optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * objectives)
    storage.engine.dispose()
    partial.replace(file)


def never_used(file: Path) -> bool:
    """Whether ``file`` is what a creation that was cut short left behind: of Optuna's tables some, and no trial."""
    known = {*models.BaseModel.metadata.tables, "alembic_version"}
    with closing(read_only(file)) as connection:
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            used = tables - {"version_info", "alembic_version", "studies", "study_directions"}
            return tables <= known and not any(connection.execute(f"SELECT 1 FROM {name}").fetchone() for name in used)
        except sqlite3.DatabaseError:
            return False


def open_study(place: Place, objectives: int, create: bool, guard: Callable[[], None]) -> optuna.Study:
    """The study in a database of the user's; with ``create``, to write, and what is not there yet is made."""
    if not create:
        place.check_there()
    connect = partial(read_only, place.file) if place.file is not None and not create else None
    with opening(place.shown, place.url):
        storage = checked(place, connect, create, guard)
        try:
            return optuna.load_study(study_name=place.name, storage=storage)
        except KeyError:
            if not create:
                raise InputError(f"the study's storage {place.shown} does not hold this run: launch it first") from None
        return optuna.create_study(study_name=place.name, storage=storage, directions=["minimize"] * objectives)


def name_objectives(study: optuna.Study, names: list[str]) -> None:
    """Say what the values of trials are: Optuna's plots and its dashboard show these names."""
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(names)


def open_file(place: Place, definition: Path, file: Path, objectives: int, write: bool) -> optuna.Study:
    """The study in the ``file`` beside its ``definition``; with ``write`` it is made where it is missing or unused."""
    with opening(place.shown):
        if write and (not file.exists() or never_used(file)):
            create_file(file, place.name, objectives)
        guard = guard_of(definition, file)
        storage = checked(place, partial(to_write if write else read_only, file), False, guard)
        return optuna.load_study(study_name=place.name, storage=storage)
