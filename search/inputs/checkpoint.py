"""What a checkpoint holds, against what its model runs: all of it was loaded, or the model is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from rankfront.methods import InputError

# Causal masks and rotary frequencies, which earlier releases of transformers saved and which models compute today.
SAVED_BUFFERS = re.compile(r"(^|\.)attn(\.attention)?\.(bias|masked_bias|causal_mask)$|(^|\.)rotary_emb\.inv_freq$")

# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ROWS = 4096  # of a table, compared at once; a guess


def check_whole(name: str, model: nn.Module, info: Mapping[str, Iterable[Any]], dropped: tuple[str, ...] = ()) -> None:
    """Raise `InputError`, naming the tensor, unless the checkpoint's tensors are those that ``model`` runs.

    ``info`` is what ``from_pretrained(output_loading_info=True)`` returns beside the model. transformers has left out
    of it what tying explains and what the model's class declares: missing tensors with a fixed initial value, and
    unexpected ones of parts that a causal language model drops (vision towers, multi-token prediction). Buffers that
    older releases saved are let through as well, and what begins with one of ``dropped``. Any other unexpected tensor
    is a weight (a bias, a further block) that the configuration leaves out, and the model would run without it.
    """
    computed = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    missing = sorted(info["missing_keys"])
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if key not in computed and not SAVED_BUFFERS.search(key) and not key.startswith(dropped)
    )
    wrong = [
        *_named("it lacks", missing),
        *_named("it has", unexpected, ", which its architecture does not run"),
        *(
            f"{key!r} is {list(found)} and the configuration makes it {list(wanted)}"
            for key, found, wanted in sorted(info["mismatched_keys"])[:1]
        ),
    ]
    if wrong:
        raise InputError(
            f"the checkpoint of model {name!r} does not fit its configuration: {'; '.join(wrong)}: restore the"
            " checkpoint, or the config.json that belongs to it"
        )


def _named(what: str, keys: list[str], ending: str = "") -> list[str]:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return [f"{what} {keys[0]!r}{more}{ending}"] if keys else []


def tensor_files(location: str, **arguments: Any) -> list[Path]:
    """The safetensors files of the checkpoint at ``location``; none where its weights are in others.

    ``arguments`` are those of ``cached_file``.
    """
    found = partial(cached_file, location, _raise_exceptions_for_missing_entries=False, **arguments)
    whole, index = (found(file) for file in WEIGHTS[:2])
    if whole or not index:
        return [Path(whole)] if whole else []
    where = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return [Path(found(file)) for file in dict.fromkeys(where.values())]


def hold_two(location: str, first: Sequence[str], second: Sequence[str], rows: int, **arguments: Any) -> bool:
    """Whether the checkpoint at ``location`` holds two tensors of ``rows`` rows whose values differ.

    Each goes by one of the names in ``first`` and ``second``. ``arguments`` are those of ``cached_file``. Only names
    are read unless it holds both, and then as far as the first difference.
    """
    found = partial(cached_file, location, _raise_exceptions_for_missing_entries=False, **arguments)
    file = next((file for file in WEIGHTS if found(file)), None)
    if file is None:
        return False
    if file.endswith(".json"):
        where = json.loads(Path(found(file)).read_text(encoding="utf-8"))["weight_map"]
    else:
        where = dict.fromkeys(_tensors(found(file)), file)
    held = [name for names in (first, second) for name in dict.fromkeys(names) if name in where]
    if len(held) < 2:
        return False
    one, other = (_tensors(found(where[name]))[name] for name in held)
    spans = (slice(start, start + ROWS) for start in range(0, rows, ROWS))
    return not all(torch.equal(one[span].float(), other[span].float()) for span in spans)


def _tensors(file: str) -> dict[str, Any]:
    """Name -> tensor, or what reads a slice of it, for each in ``file``."""
    if not file.endswith(".safetensors"):
        return dict(load_state_dict(file))
    opened = safe_open(file, framework="pt")
    return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
