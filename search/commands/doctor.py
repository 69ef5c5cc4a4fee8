"""What this machine has of what rankfront needs: doctor."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import typer

from rankfront.search.commands.console import output, say
from rankfront.search.quantities import said_bytes

app = typer.Typer()
PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One line: ``what`` was found to be ``said``; ``remedy`` where something is missing, which may be ``needed``."""

    what: str
    said: str
    remedy: str | None = None
    needed: bool = True

    @property
    def failed(self) -> bool:
        """Whether nothing works without what is missing."""
        return self.remedy is not None and self.needed

    def __str__(self) -> str:
        mark = "ok" if self.remedy is None else "MISSING" if self.needed else "-"
        return f"{mark:<8}{self.what:<16}{self.said}{'' if self.remedy is None else f': {self.remedy}'}"


@app.command(epilog="Example: rankfront doctor")
def doctor() -> int:
    """Check what is installed, the devices, memory, disk, Ray and the hub, a line each; exit code 1 where something
    that is needed is missing."""
    missing = 0
    for check in _checks():
        say(output(), check)
        missing += check.failed
    return int(missing > 0)


def _checks() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= PYTHON
    yield Check("python", version, None if enough else "install Python 3.11 or newer")
    packages = list(_packages())
    yield from packages
    if any(check.failed for check in packages):
        return  # what follows would fail for want of it
    yield from _devices()
    yield _cache()
    yield _ray()
    yield _hub()
    compiler = shutil.which("cc") or shutil.which("gcc")
    yield Check("compiler", f"{compiler or 'none'}; only [objectives.latency] with compile = true asks for one")


def _packages() -> Iterator[Check]:
    """Every dependency, and those of every extra but the developers'."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("rankfront") or ()]
    except metadata.PackageNotFoundError:
        yield Check("rankfront", "is not installed", "pip install . in its checkout")
        return
    yield Check("rankfront", metadata.version("rankfront"))
    extras = sorted(set(metadata.metadata("rankfront").get_all("Provides-Extra") or ()) - {"dev"})
    for extra in (None, *extras):
        for each in wanted:
            of_extra = each.marker is not None and "extra" in str(each.marker)
            if of_extra if extra is None else not (of_extra and each.marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
                continue
            yield _package(each.name, str(each.specifier), extra)


def _package(name: str, versions: str, extra: str | None) -> Check:
    from packaging.specifiers import SpecifierSet

    remedy = f"pip install '{name}{versions}'" if extra is None else f"pip install 'rankfront[{extra}]'"
    of = "" if extra is None else f" (the extra {extra})"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, f"not installed{of}", remedy, needed=extra is None)
    fits = SpecifierSet(versions).contains(version, prereleases=True)
    said = f"{version}{of}" if fits else f"{version}{of} is not {versions}"
    return Check(name, said, None if fits else remedy, needed=extra is None)


def _devices() -> Iterator[Check]:
    import torch

    from rankfront.search.inputs.device import pick_device, pick_dtype
    from rankfront.search.inputs.memory import free_bytes

    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield Check(f"cuda:{number}", f"{found.name}, {said_bytes(found.total_memory)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tiles, native = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    bf16 = "AMX" if tiles else "AVX-512" if native else "none: bfloat16 would be slow"
    yield Check("cpu", f"{cores} cores to use, bf16 products by {bf16}")
    device = pick_device("auto")
    yield Check("trials run on", f"{device}, in {pick_dtype('auto', device)}")
    free = free_bytes(torch.device("cpu"))
    yield Check("memory", "unknown" if free is None else f"{said_bytes(free)} free")


def _cache() -> Check:
    from rankfront.search.inputs.source import cache_folder

    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    there = next(each for each in (folder, *folder.parents) if each.exists())
    said = f"{folder}: {said_bytes(size)}, {said_bytes(shutil.disk_usage(there).free)} free"
    return Check("cache", said, None if os.access(there, os.W_OK) else "set RANKFRONT_CACHE to a folder to write in")


def _ray() -> Check:
    from rankfront.search.run.workers import why_not

    reason = why_not()
    said = "starts" if reason is None else f"does not start ({reason})"
    return Check("ray", said, None if reason is None else "trials run one by one, with --workers 0", needed=False)


def _hub() -> Check:
    import huggingface_hub

    from rankfront.search.inputs.source import hub_reachable

    where = huggingface_hub.constants.ENDPOINT
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if offline or not hub_reachable():
        why = "HF_HUB_OFFLINE is set" if offline else f"{where} has no address here"
        return Check("hub", why, "only local models and texts, and what was downloaded before", needed=False)
    return Check("hub", f"{where} has an address")
