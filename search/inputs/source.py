"""Where a model comes from: its files, their hash, and whether a hub can be asked."""

from __future__ import annotations

import hashlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import huggingface_hub
from transformers.utils.hub import cached_file, extract_commit_hash

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL
from rankfront.search.atomic import file_state, read_checked

WEIGHT_FILES = ("*.safetensors", "*.bin")
CHECKSUM = "checksum.json"  # of the files of an unpacked model
MODEL_FILES = ("config.json", *WEIGHT_FILES)  # what a local folder's fingerprint covers


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved.

    Attributes:
        name: as the user wrote it.
        location: what transformers loads: a hub id or a local folder.
        gguf: the GGUF file that the folder was unpacked from, or None.
        trust_remote_code: whether Python code that comes with the model may run.
        task: what it is for, as ``model.task`` has it.
    """

    name: str
    location: str
    gguf: Path | None = None
    trust_remote_code: bool = False
    task: str = CAUSAL.name

    @property
    def hub_arguments(self) -> dict[str, bool]:
        """For a look-up: without a network, what the hub's cache holds is found at once or not at all."""
        return {"local_files_only": not (Path(self.location).is_dir() or hub_reachable())}

    @property
    def arguments(self) -> dict[str, bool]:
        """For from_pretrained. Unless it is told whether to run a model's own code, it asks on standard input."""
        return self.hub_arguments | {"trust_remote_code": self.trust_remote_code}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: of the files' contents where they are local, else the hub's commit."""
        if self.gguf:
            return hash_files([self.gguf])
        folder = Path(self.location)
        if folder.is_dir():
            patterns = (*MODEL_FILES, "*.py") if self.trust_remote_code else MODEL_FILES
            return hash_files(sorted(path for pattern in patterns for path in folder.glob(pattern)))
        config = Path(cached_file(self.location, "config.json", **self.hub_arguments))
        commit = extract_commit_hash(str(config), None)
        return hashlib.sha256(f"{self.location}@{commit}".encode()).hexdigest()


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves, or a proxy is set that may resolve it: else every request is retried in vain."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in hex. A file is read once in a process, and again once it is another."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + _hash_file(path, file_state(path)))
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _hash_file(path: Path, state: tuple[int, ...]) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def cache_folder() -> Path:
    """What is kept between runs, factors and unpacked models: ``$RANKFRONT_CACHE``, or ``~/.cache/rankfront``."""
    return Path(os.environ.get("RANKFRONT_CACHE") or Path.home() / ".cache" / "rankfront")


def hash_folder(folder: Path) -> str:
    return hash_files(sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUM))


def check_unpacked(source: Source) -> None:
    """Raise `InputError` where what a GGUF was unpacked to, or a checkpoint converted to, is no longer what it was."""
    folder = Path(source.location)
    try:
        intact = read_checked(folder / CHECKSUM) == hash_folder(folder)
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise InputError(
            f"{folder}, which {source.name!r} was unpacked or converted to, is damaged: delete it, and it is made again"
        )
