"""Opening a study's database, to launch or to read only."""

from __future__ import annotations

import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages._rdb import models
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from rankfront.methods import InputError
from rankfront.search.storage.checked import CheckedStorage
from rankfront.search.urls import parse_url

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


def checked(url: str, shown: str, connect: Connect | None, create: bool, guard: Callable[[], None]) -> CheckedStorage:
    """The storage at ``url``, whose errors are `InputError` of one line from here on; ``create`` what it lacks."""
    secret = str(parse_url(url).password or "")
    arguments = {} if connect is None else {"creator": connect}
    escaped = url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a template
    storage = CheckedStorage(escaped, guard, engine_kwargs=arguments, skip_table_creation=not create)

    @sqlalchemy.event.listens_for(storage.engine, "handle_error")
    def refuse(context: ExceptionContext) -> None:
        if not isinstance(context.sqlalchemy_exception, IntegrityError):  # which Optuna handles
            reason = reason_of(context.original_exception, secret)
            raise InputError(
                f"the study's storage {shown} failed ({reason}): every trial it holds is kept; mend that, and launch"
                " again to go on"
            ) from context.original_exception

    if create:
        _complete(storage)
    return storage


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
    connection.text_factory = lambda content: content.decode("utf-8", "replace")
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
