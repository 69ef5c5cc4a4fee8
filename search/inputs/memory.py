"""Memory that this machine has left."""

from __future__ import annotations

from pathlib import Path

import torch

AMPLE = 0.25  # of what is free, that weights may take beside what they are read from; guess
CGROUP = Path("/sys/fs/cgroup")  # of this process's own limit, where it has a namespace of its own: a container's


def free_bytes(device: torch.device) -> int | None:
    """What may still be taken; None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = 1024 * _field(Path("/proc/meminfo"), "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        return None
    try:
        most = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        taken = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        return min(free, most - taken + _field(CGROUP / "memory.stat", "inactive_file"))
    except (OSError, StopIteration, ValueError):  # there is no limit
        return free


def ample(size: float, device: torch.device) -> bool:
    """Whether ``size`` bytes of weights may be held; else they are better mapped from a file, whose pages the system
    takes back where it is short. A GPU maps nothing."""
    free = None if device.type != "cpu" else free_bytes(device)
    return free is None or size <= AMPLE * free


def _field(file: Path, name: str) -> int:
    """The number beside ``name``."""
    lines = file.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[:1] == [name])
