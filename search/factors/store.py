"""The factor store: each (site, method) prepared once, kept on disk, memory-mapped, sliced at any level.

Files take their names whole and are never written again in place: `prepare` renames a new one over an old one, whose
readers keep what they have mapped (see `mapped`).
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rankfront.methods import Factors, InputError, Method, Option, Prepared, Site, Statistics, get_method, narrow_of
from rankfront.search.atomic import drop_left, read_checked, write_checked, write_whole
from rankfront.search.errors import reason_of
from rankfront.search.factors import calibration
from rankfront.search.factors.mapped import MappedFiles, checksum_of

KEY_LENGTH = 16  # hex digits of a cache key


class Unfactored(RuntimeError):
    """A trial wants factors that could not be made."""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:KEY_LENGTH]


class FactorStore:
    """Prepared factors of one model on one calibration text.

    A file per (site, method), or per (site, option) for methods that do not nest. The folder's name hashes
    weights, the method's version, the factors' dtype and, for methods that need statistics, the calibration; so
    what is found under it is what would be computed again. Files appear whole or not at all.

    ``unmade`` are those that could not be made for a cause that may pass, such as a shortage of memory, with their
    reason: they are tried again by another store, that of the next launch.
    """

    def __init__(
        self,
        fingerprint: str,
        calibration_hash: str,
        dtype: torch.dtype,
        root: Path,
        unmade: Mapping[Path, str] | None = None,
    ) -> None:
        self.root = root
        self.fingerprint = fingerprint
        self.calibration_hash = calibration_hash
        self.dtype = dtype
        self.seconds: dict[str, float] = defaultdict(float)  # spent on factoring here, by method
        self.unmade = dict(unmade or {})
        self._files = MappedFiles()

    def folder(self, method: Method) -> Path:
        text = f"{self.calibration_hash} {calibration.VERSION}" if method.needs else "no text"
        key = _digest(self.fingerprint, text, str(self.dtype), str(method.version), method.formula)
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
        """Why factoring for ``option`` failed, or None. A kept reason that is not whole is not believed."""
        path = self.path(site, option)
        if path in self.unmade:
            return self.unmade[path]
        try:
            return str(read_checked(_failure_file(path)))
        except (FileNotFoundError, ValueError):
            return None

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
        anew: bool = False,
    ) -> None:
        """Factor ``site`` for ``options`` and write what is missing, or with ``anew`` all of it.

        A factorisation that does not converge is kept as its reason, for the weights are what they are: the trials that
        want it fail with it, others go on. Any other failure is in `unmade`.
        """
        by_file: dict[Path, list[Option]] = {}
        for option in options:
            by_file.setdefault(self.path(site, option), []).append(option)
        for path, served in by_file.items():
            if anew or not path.is_file():  # which another study may have made by now
                self._prepare(path, site, served, weights, statistics, anew)

    def _prepare(
        self,
        path: Path,
        site: Site,
        served: Sequence[Option],
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        anew: bool,
    ) -> None:
        method = get_method(served[0].method)
        narrow = narrow_of(method)
        plain = None if narrow is None else narrow.plain(served[0])
        if plain is not None:  # the same in all bits, of which it is rounded
            self.prepare(site, [plain], weights, statistics)
        started = time.perf_counter()
        try:
            if narrow is not None and plain is not None:
                prepared = narrow.rounded(site, weights, statistics, self.load(site, plain), served[0])
            else:
                prepared = method.prepare(site, weights, statistics, served)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - of any method: it costs the trials that want it
            reason = reason_of(error)
            if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                write_checked(_failure_file(path), reason)
            else:
                self.unmade[path] = reason
            return
        finally:
            self.seconds[method.name] += time.perf_counter() - started
        tensors = {name: self._narrow(tensor) for name, tensor in prepared.items()}
        if anew or not path.is_file():
            write_whole(path, save(tensors, metadata={"crc32": checksum_of(tensors)}))
        _failure_file(path).unlink(missing_ok=True)

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Matrices in the dtype they will run in; spectra and other vectors, and what is in fp64, in fp32."""
        if tensor.dtype == torch.float64:
            tensor = tensor.float()
        elif tensor.ndim >= 2 and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor.contiguous().cpu()

    def leave(self, site: Site, options: Sequence[Option], reason: str) -> None:
        """Keep why ``options`` cannot be made for ``site`` in this launch, such as where nothing was measured of it."""
        self.unmade |= {self.path(site, option): reason for option in options}

    def drop_partials(self, methods: Iterable[str]) -> None:
        """Drop what writers on this machine that were killed have left half written."""
        for name in methods:
            drop_left(self.folder(get_method(name)))

    def load(self, site: Site, option: Option) -> Prepared:
        """The prepared tensors behind ``option``, memory-mapped; verified when they are, and again once the file is
        another.

        Raises `InputError` naming the file where it is missing, corrupt or another than before, `Unfactored` where
        factoring had failed.
        """
        path = self.path(site, option)
        if path not in self._files:
            reason = self.failure(site, option)
            if reason is not None:
                raise Unfactored(f"{option.method} could not factor {site.name}: {reason}")
        return self._files.read(path)

    def check(self) -> None:
        """Raise `InputError` where a file that was read is no longer what it was: what came of it may be wrong."""
        self._files.check()

    def factors(self, site: Site, option: Option) -> dict[str, Factors]:
        """Role -> factors of ``option`` at ``site``."""
        return get_method(option.method).truncate(self.load(site, option), option)


def _failure_file(path: Path) -> Path:
    return path.with_suffix(".failed")
