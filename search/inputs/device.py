"""What a trial runs on: the device, the dtype, the threads."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import torch

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.errors import place_of, reason_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> str:
    """``auto`` is the first GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"model.device is {device!r}: use auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device is {device!r} and torch sees no GPU: use auto or cpu")
    return device


def count_devices(device: str) -> int:
    """How many devices trials may run on that are told to run on ``device``: every GPU where that names none."""
    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


def pick_dtype(dtype: str, device: str) -> str:
    """The evaluation dtype. ``auto`` is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"model.dtype is {dtype!r}: use auto, {', '.join(DTYPES)}")
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device was short of memory: that passes, so what it took is measured again."""
    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return short or "DefaultCPUAllocator: can't allocate memory" in str(error)  # torch raises a plain RuntimeError


def failure_of(error: BaseException) -> dict[str, Any]:
    """The record of what failed by ``error``: why, and ``lost`` where memory was short, else the place in the code."""
    found: dict[str, Any] = {keys.FAILURE: reason_of(error)}
    return found | ({keys.LOST: True} if out_of_memory(error) else {keys.PLACE: place_of(error)})


def set_threads(cpus: float) -> None:
    """torch's intra-op threads for a worker that was given ``cpus`` CPUs."""
    torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))


def drop_unreachable() -> None:
    """Free what a failure has left, on the device too; called outside its handler, whose traceback holds on to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps most of what blocks of about a megabyte leave, gigabytes of it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
