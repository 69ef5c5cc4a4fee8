"""What every benchmark prints beside its table: command, commit, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> str:
    """Command, commit (with a mark where the tree was not clean, results aside) and machine, in three lines."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + (
        " with local changes" if git("status", "--porcelain", "-uno", ":!results") else ""
    )
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"\ncommand: python {' '.join(sys.argv)}\ncommit: {commit}\nmachine: {machine}"
