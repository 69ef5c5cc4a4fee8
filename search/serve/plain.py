"""``plain``: an ordinary configuration of the model's own class, with fewer neurons in every MLP and fewer blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.plain import several
from rankfront.search.serve.folder import save
from rankfront.search.serve.structure import Structure

NEURONS = ("intermediate_size", "ffn_dim", "n_inner")  # what configurations call the width of their MLPs


def write_plain(structure: Structure, folder: Path) -> int:
    """Write ``structure`` to ``folder``; how many values it stores.

    Raises `InputError` where it has blocks of different widths, or half a block.
    """
    halves = [
        block.mlp_site if block.attention else block.attention_site
        for block in structure.blocks
        if not (block.attention and block.width)
    ]
    if halves:
        raise InputError(
            f"plain leaves out whole blocks alone and the plan leaves out {several(halves)}: use --format nemotron-nas"
            " or gguf, which hold a block without attention or MLP"
        )
    widths = sorted({block.width for block in structure.blocks})
    if len(widths) > 1:
        narrow = [block.mlp_site for block in structure.blocks if block.width < widths[-1]]
        raise InputError(
            f"plain has one width for all MLPs and the plan has {widths[0]} to {widths[-1]} neurons, fewer at"
            f" {several(narrow)}: use --format nemotron-nas or gguf, which hold a width for each block"
        )
    config = copy.deepcopy(structure.config)
    config.num_hidden_layers = len(structure.blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[block.number] for block in structure.blocks]
    if structure.width:
        setattr(config, width_key(config), widths[0])
    with torch.device("meta"):
        target: Any = AutoModelForCausalLM.from_config(config)
    return save(structure, target, folder)


def width_key(config: Any) -> str:
    """What ``config`` calls the width of its MLPs; `InputError` where it does not say."""
    found = next((name for name in NEURONS if hasattr(config, name)), None)
    if found is None:
        raise InputError(f"a {type(config).__name__} does not say how wide its MLPs are: use --format dense")
    return found
