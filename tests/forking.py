"""Commands in processes of their own that start at once: forks of a process that has imported what commands import.

As a script this is that process. Standard input is a socket. A request is the arguments, the environment and the folder
as JSON, with three descriptors: for standard output, standard error and the answers. Answers are eight bytes each:
the command's process id, then its exit status. The process ends with its requests.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache

LONGEST = 1 << 17  # bytes of a request


class Forked:
    """A command as `subprocess.Popen` has one: what tests use of it. Its output goes to files."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._output, self._error = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (read later)
        self._answers, theirs = os.pipe()
        request = json.dumps([arguments, environment, os.getcwd()]).encode()
        assert len(request) <= LONGEST
        descriptors = [self._output.fileno(), self._error.fileno(), theirs]
        socket.send_fds(_server(), [request], descriptors)
        os.close(theirs)
        self.pid = self._answer()

    def _answer(self) -> int:
        answer = os.read(self._answers, 8)
        assert answer, "the process that forks commands has ended"
        return int.from_bytes(answer, signed=True)

    def poll(self) -> int | None:
        return self._wait(0)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = self._answer()
            os.close(self._answers)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        for file in (self._output, self._error):
            file.seek(0)
        return self._output.read().decode(), self._error.read().decode()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@cache
def _server() -> socket.socket:
    """The socket of the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, __file__], stdin=theirs, start_new_session=True)
    theirs.close()
    return ours


def serve() -> list[str]:
    """Fork for each request; returns in each command, with its arguments, in its environment and folder."""
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            command = os.fork()
            if command == 0:
                break
            os.write(descriptors[2], command.to_bytes(8, signed=True))
            status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
            os.write(descriptors[2], status.to_bytes(8, signed=True))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
    requests.close()
    arguments, environment, folder = json.loads(request)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, descriptor in enumerate(descriptors[:2], 1):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


if __name__ == "__main__":
    import torch
    import transformers

    import rankfront.search.measure.runner
    import rankfront.search.run.scheduler  # noqa: F401 (imported for the commands)
    from rankfront.search.__main__ import main

    transformers.LlamaForCausalLM  # noqa: B018 (imported when it is named)
    torch.set_num_threads(1)
    sys.argv[1:] = serve()
    main()
