"""A checkpoint in the dtype that its model runs in, kept in the cache: what is mapped from there needs no memory of the
process, and workers share it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfront.search.atomic import staged, write_checked
from rankfront.search.inputs.source import CHECKSUM, Source, cache_folder, check_unpacked, hash_folder

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AT_ONCE = 2**30  # bytes of a file, which are held while it is written
BESIDE = ("config.json", "generation_config.json", "*.py")  # what a model is loaded by, beside its weights


def bytes_to_convert(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes in ``dtype`` of the floating tensors that ``files`` have in another."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - it is no dict
            others = [each for each in slices if FLOATING.get(each.get_dtype(), dtype) != dtype]
            total += sum(dtype.itemsize * torch.Size(each.get_shape()).numel() for each in others)
    return total


def converted(source: Source, files: Sequence[Path], dtype: torch.dtype, fixed: Collection[str]) -> Source:
    """``source`` with the weights of its ``files`` in ``dtype``, converted once.

    Tensors whose names have one of the patterns ``fixed`` in them stay as they are: the model keeps them in a dtype of
    its own. Raises `InputError` where the copy in the cache is damaged.
    """
    folder = cache_folder() / f"weights-{source.fingerprint[:16]}-{str(dtype).removeprefix('torch.')}"
    found = replace(source, location=str(folder), gguf=None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with staged(folder) as staging:
                _write(_in_dtype(files, dtype, fixed), staging)
                for other in (path for pattern in BESIDE for path in files[0].parent.glob(pattern)):
                    shutil.copyfile(other, staging / other.name)
                write_checked(staging / CHECKSUM, hash_folder(staging))
    check_unpacked(found)
    return found


def _in_dtype(files: Sequence[Path], dtype: torch.dtype, fixed: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    keeps = re.compile("|".join(pattern.replace("*", ".*") for pattern in fixed) or "(?!)")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                tensor = opened.get_tensor(name)
                narrow = tensor.is_floating_point() and not keeps.search(name)
                yield name, tensor.to(dtype) if narrow else tensor


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """As a checkpoint in several files, each of `AT_ONCE` bytes or of the tensor that goes beyond."""
    where: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def keep() -> None:
        file = f"model-{len(set(where.values())):05d}.safetensors"
        save_file(held, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        if sum(each.nbytes for each in held.values()) >= AT_ONCE:
            keep()
    keep()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
