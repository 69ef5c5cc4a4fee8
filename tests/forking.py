"""Commands in processes of their own that start at once: multiprocessing's fork server imports what they need."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

IMPORTED = [
    "transformers.models.llama.modeling_llama",
    "rankfront.search.measure.runner",
    "rankfront.search.run.scheduler",
]


class Forked:
    """A command as `subprocess.Popen` has one: what tests use of it. Its output goes to files."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.args = arguments
        self._written: list[IO[bytes]] = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 (read later)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        names = [file.name for file in self._written]
        self._process = context.Process(target=_run, args=(arguments, environment, os.getcwd(), names))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        for file in self._written:
            file.seek(0)
        return self._written[0].read().decode(), self._written[1].read().decode()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], folder: str, written: Sequence[str]) -> None:
    """The command line, in a process group of its own. Exports are verified in it where VERIFY_HERE is set."""
    import torch

    from rankfront.search.__main__ import main

    if environment.pop("VERIFY_HERE", ""):
        import launching
        import pytest

        launching.verify_here(pytest.MonkeyPatch())

    os.setsid()
    torch.set_num_threads(1)
    for number, path in enumerate((os.devnull, *written)):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a fork ends without
