"""Files and folders that appear whole or not at all, JSON that carries a checksum, and what dead writers leave.

Whatever is written takes its name by a rename, so that readers find all of it or nothing, and those who have the old
file mapped keep it. Until then it has a hidden name beside its place that says who writes it, such as
``.a.json.1f0c9d2e.ab12cd34-4711``: a digest of the machine, and the process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfront.methods import InputError

LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)")


def _host() -> str:
    """A digest of the machine and of the namespace that process numbers are of: containers have their own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


HOST = _host()


def partial_of(path: Path) -> Path:
    """A hidden name beside ``path``, this process's own, for what is to become ``path``."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{HOST}-{os.getpid()}")


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write ``path``, replacing it whole, with the permissions ``mode`` as far as the process's mask leaves them; its
    folder is made."""
    with replaced(path) as partial, open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which is ``path`` after, replacing it whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_state(path: Path) -> tuple[int, int, int, int]:
    """Inode, size, and times of change in ns: of its content, which a writer can set, and of anything about it."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def drop_left(folder: Path, name: str | None = None) -> None:
    """Drop what writers on this machine that are gone have left in ``folder``, of ``name`` or of any."""
    for path in folder.glob(".*"):
        left = LEFT.fullmatch(path.name)
        if left is None or left["host"] != HOST or name not in (None, left["name"]) or _is_alive(int(left["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether a process with this number runs here; taken for granted where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_checked(path: Path, data: Any) -> None:
    """Write ``data`` as JSON with its CRC-32, whole."""
    text = json.dumps(data, indent=0, sort_keys=True)
    sealed = f'{{"crc32": "{_crc32(text)}",\n"data": {text}}}\n'
    write_whole(path, sealed.encode())


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote. Raises FileNotFoundError, or ValueError where anything of it is missing or other."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        crc, data = sealed["crc32"], sealed["data"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it has no checksum") from error
    if crc != _crc32(json.dumps(data, indent=0, sort_keys=True)):
        raise ValueError("its checksum differs")
    return data


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def new_folder(path: Path) -> Path:
    """Where ``path`` leads, of a link what it names; `InputError` where something is there but an empty folder."""
    found = Path(os.path.realpath(path))
    if found.is_symlink() or (found.exists() and (not found.is_dir() or any(found.iterdir()))):
        raise InputError(f"{str(found)!r} exists and is not empty: name a new folder")
    return found


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its name when the body succeeds and vanishes when it does not.

    What earlier processes that were killed have left of it is dropped first. Raises `InputError` where ``folder`` is
    taken in the end: an empty folder is not.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    drop_left(folder.parent, folder.name)
    staging = partial_of(folder)
    try:
        staging.mkdir()
        yield staging
        try:
            staging.rename(folder)  # which replaces an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise InputError(f"{str(folder)!r} was written by another process meanwhile: name a new folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
