"""What a healing leaves on disk while it runs: its identity, and the newest checkpoint, each whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfront.methods import InputError
from rankfront.search.atomic import drop_left, read_checked, replaced, write_checked

STATE, IDENTITY = "state.json", "healing.json"
AT_ONCE = 2**24  # bytes of a file that are read at once


@dataclass(frozen=True)
class Checkpoint:
    """Where a healing was: ``where`` as its stage says, and its tensors by name."""

    where: Mapping[str, Any]
    tensors: dict[str, Tensor]


class Keeper:
    """The working folder of one healing, beside what it will become.

    The tensors are written first and `STATE` names them after: a reader has a whole checkpoint at any moment, the one
    before until then. Older ones are dropped.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        drop_left(folder)
        known = folder / IDENTITY
        if not known.exists():
            write_checked(known, identity)
            return
        try:
            before = read_checked(known)
        except ValueError as error:
            raise InputError(f"{known} is corrupt ({error}): remove {str(folder)!r} to heal from the start") from error
        now = json.loads(json.dumps(identity))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{str(folder)!r} holds checkpoints of another healing: its {key} is {before.get(key)!r} and now"
                    f" {now.get(key)!r}; change it back, name another folder, or remove this one to heal from the start"
                )

    def save(self, where: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint. An OSError leaves the one before."""
        file = self.folder / f"state-{secrets.token_hex(4)}.safetensors"
        with replaced(file) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
            checksum = _crc32(partial)
        write_checked(self.folder / STATE, {"where": dict(where), "file": file.name, "crc32": checksum})
        for other in self.folder.glob("state-*.safetensors"):
            if other != file:
                other.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, or None. Raises `InputError` where it is damaged."""
        state = self.folder / STATE
        try:
            found = read_checked(state)
            file = self.folder / found["file"]
            if _crc32(file) != found["crc32"]:
                raise ValueError("its checksum differs")
            return Checkpoint(found["where"], load_file(file))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"the checkpoint in {str(self.folder)!r} is corrupt ({error}): remove the folder to heal from the start"
            ) from error

    def drop(self) -> None:
        """Remove the folder: what was healed has a place of its own."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _crc32(file: Path) -> int:
    """Of a file's bytes, a part at a time."""
    found = 0
    with file.open("rb") as content:
        while part := content.read(AT_ONCE):
            found = zlib.crc32(part, found)
    return found
