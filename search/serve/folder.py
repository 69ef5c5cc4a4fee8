"""Writing a model that transformers has a class for, with weights from a `Structure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankfront.methods import InputError
from rankfront.search.inputs.model import count_parameters, quiet
from rankfront.search.serve.structure import Structure


def save(structure: Structure, target: Any, folder: Path) -> int:
    """Fill ``target``, which has no weights yet, from ``structure`` and save it to ``folder``; how many values it has.

    Raises `InputError` where a tensor of ``target`` has another shape.
    """
    state = {}
    for name, empty in target.state_dict().items():
        state[name] = structure.tensor(name).contiguous()
        if state[name].shape != empty.shape:
            raise InputError(
                f"{structure.original(name)!r} is {tuple(state[name].shape)} and a {type(target).__name__} of that"
                f" configuration has {tuple(empty.shape)}: use --format dense"
            )
    target.load_state_dict(state, assign=True)
    target.tie_weights()
    target.config.dtype = structure.dtype
    target.generation_config = structure.model.generation_config
    with quiet():
        target.save_pretrained(folder)
    return count_parameters(target)
