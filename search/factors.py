"""The factor store: each (site, method) prepared once, kept on disk, memory-mapped, sliced at any level."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import socket
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rankfront.methods import (
    Factors,
    InputError,
    Method,
    Option,
    Prepared,
    Site,
    Statistics,
    get_method,
    source_of,
)
from rankfront.search import calibration

KEY_LENGTH = 16  # hex digits of a cache key
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:KEY_LENGTH]


class FactorStore:
    """Prepared factors of one model on one calibration text.

    A file per (site, method), or per (site, option) for methods that do not nest. The folder's name hashes
    weights, the method's code, the factors' dtype and, for methods that need statistics, the calibration; so
    what is found under it is what would be computed again. Files appear whole or not at all.
    """

    def __init__(self, fingerprint: str, calibration_hash: str, dtype: torch.dtype, root: Path) -> None:
        self.root = root
        self.fingerprint = fingerprint
        self.calibration_hash = calibration_hash
        self.dtype = dtype
        self.seconds: dict[str, float] = defaultdict(float)  # spent on factoring here, by method
        self._open: dict[Path, Prepared] = {}

    def folder(self, method: Method) -> Path:
        text = self.calibration_hash + inspect.getsource(calibration) if method.needs else "no text"
        key = _digest(self.fingerprint, text, str(self.dtype), source_of(method), method.formula)
        return self.root / f"{method.name}-{key}"

    def path(self, site: Site, option: Option) -> Path:
        """The file that serves ``option`` at ``site``."""
        method = get_method(option.method)
        level = "" if method.nested else "." + _digest(option.label)
        return self.folder(method) / f"{site.name}{level}.safetensors"

    def missing(self, wanted: Mapping[Site, Iterable[Option]]) -> dict[Site, list[Option]]:
        """Of the options wanted at each site, those that were not tried yet."""
        absent = {
            site: [o for o in options if not self.path(site, o).is_file() and self.failure(site, o) is None]
            for site, options in wanted.items()
        }
        return {site: options for site, options in absent.items() if options}

    def failure(self, site: Site, option: Option) -> str | None:
        """Why factoring for ``option`` failed, or None."""
        file = _failure_file(self.path(site, option))
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def usable(self, wanted: Mapping[Site, Sequence[Option]]) -> dict[Site, list[Option]]:
        """``wanted`` without the options whose factorisation failed."""
        kept = {site: [o for o in options if self.failure(site, o) is None] for site, options in wanted.items()}
        return {site: options for site, options in kept.items() if options}

    def prepare(
        self,
        site: Site,
        options: Sequence[Option],
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
    ) -> None:
        """Factor ``site`` for ``options`` and write what is missing.

        A factorisation that fails is kept as its reason: the trials that want it fail with it, others go on.
        """
        by_file: dict[Path, list[Option]] = {}
        for option in options:
            by_file.setdefault(self.path(site, option), []).append(option)
        for path, served in by_file.items():
            method = get_method(served[0].method)
            started = time.perf_counter()
            try:
                prepared = method.prepare(site, weights, statistics, served)
            except torch.OutOfMemoryError:
                raise  # another day there may be room
            except (RuntimeError, ValueError) as error:
                path.parent.mkdir(parents=True, exist_ok=True)
                _failure_file(path).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                continue
            finally:
                self.seconds[method.name] += time.perf_counter() - started
            _failure_file(path).unlink(missing_ok=True)
            self._write(path, {name: self._narrow(tensor) for name, tensor in prepared.items()})

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Matrices in the dtype they will run in; spectra and other vectors, and what is in fp64, in fp32."""
        if tensor.dtype == torch.float64:
            tensor = tensor.float()
        elif tensor.ndim >= 2 and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor.contiguous().cpu()

    @staticmethod
    def _write(path: Path, tensors: Prepared) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{_HOST}-{os.getpid()}")
        try:
            partial.write_bytes(save(tensors, metadata={"crc32": _checksum(tensors)}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def drop_partials(self, methods: Iterable[str]) -> None:
        """Drop what writers on this machine that were killed have left half written."""
        for name in methods:
            for partial in self.folder(get_method(name)).glob(f".*.{_HOST}-*"):
                if not _is_alive(int(partial.name.rpartition("-")[2])):
                    partial.unlink(missing_ok=True)

    def load(self, site: Site, option: Option) -> Prepared:
        """The prepared tensors behind ``option``, memory-mapped; checked once per process.

        Raises `InputError` naming the file where it is missing or corrupt, RuntimeError where factoring had failed.
        """
        path = self.path(site, option)
        if path not in self._open:
            reason = self.failure(site, option)
            if reason is not None:
                raise RuntimeError(f"{option.method} could not factor {site.name}: {reason}")
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
                    intact = (file.metadata() or {}).get("crc32") == _checksum(tensors)
            except FileNotFoundError as error:
                raise InputError(f"factor file {path} is missing: launch the study again to rebuild it") from error
            except SafetensorError as error:
                raise InputError(f"factor file {path} is corrupt ({error}): {REBUILD}") from error
            if not intact:
                raise InputError(f"factor file {path} is corrupt (its checksum differs): {REBUILD}")
            self._open[path] = tensors
        return self._open[path]

    def factors(self, site: Site, option: Option) -> dict[str, Factors]:
        """Role -> factors of ``option`` at ``site``."""
        return get_method(option.method).truncate(self.load(site, option), option)

    def clear(self, methods: Iterable[str]) -> None:
        """Drop everything kept for ``methods`` on this model and text."""
        for name in methods:
            shutil.rmtree(self.folder(get_method(name)), ignore_errors=True)
        self._open.clear()


REBUILD = "rebuild it with `rankfront launch STUDY.toml --rebuild`"


def _is_alive(process: int) -> bool:
    """Whether a process with this number runs here; taken for granted where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _failure_file(path: Path) -> Path:
    return path.with_suffix(".failed")


def _checksum(tensors: Prepared) -> str:
    """CRC-32 over names and bytes, in order of name."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
