"""Factor files as a process reads them: memory-mapped, verified, and verified again once a file is another."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rankfront.methods import InputError, Prepared
from rankfront.search.atomic import file_state

REBUILD = "rebuild it with `rankfront launch STUDY.toml --rebuild`"


@dataclass(frozen=True)
class _Mapped:
    """A factor file as it was when its checksum was verified.

    Attributes:
        tensors: memory-mapped.
        checksum: of names and bytes.
        state: see `file_state`.
    """

    tensors: Prepared
    checksum: str
    state: tuple[int, ...]


class MappedFiles:
    """The factor files that were read so far, each mapped once. What others do to one shows in its inode, size or time
    of change."""

    def __init__(self) -> None:
        self._mapped: dict[Path, _Mapped] = {}

    def __contains__(self, path: Path) -> bool:
        return path in self._mapped

    def read(self, path: Path) -> Prepared:
        """Its tensors; `InputError` naming the file where it is missing, corrupt or another than before."""
        known = self._mapped.get(path)
        try:
            if known is None or known.state != file_state(path):
                found = _verified(path)
                if known is not None and found.checksum != known.checksum:
                    raise InputError(
                        f"factor file {path} has other content than before in this launch, so trials would not compare:"
                        " launch the study again"
                    )
                self._mapped[path] = found
        except FileNotFoundError as error:
            raise InputError(f"factor file {path} is missing: launch the study again to rebuild it") from error
        return self._mapped[path].tensors

    def check(self) -> None:
        """Raise `InputError` where a file that was read is no longer what it was: what came of it may be wrong."""
        for path in list(self._mapped):
            self.read(path)


def _verified(path: Path) -> _Mapped:
    """The file at ``path``, verified; `InputError` where it is corrupt."""
    state = file_state(path)  # before it is read: a change meanwhile shows the next time
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"factor file {path} is corrupt ({error}): {REBUILD}") from error
    checksum = checksum_of(tensors)
    if metadata.get("crc32") != checksum:
        raise InputError(f"factor file {path} is corrupt (its checksum differs): {REBUILD}")
    return _Mapped(tensors, checksum, state)


def checksum_of(tensors: Prepared) -> str:
    """CRC-32 over names and bytes, in order of name."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
