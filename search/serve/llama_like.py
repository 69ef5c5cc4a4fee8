"""What formats for decoders like Llama ask of a model: one class of attention and of MLP, and where they differ."""

from __future__ import annotations

from typing import Any

from rankfront.methods import InputError
from rankfront.search.serve.structure import Structure

FAMILY = ("llama", "mistral", "qwen2")  # model types that differ in biases alone


def check(structure: Structure, form: str) -> None:
    """Raise `InputError` where ``form`` can describe nothing of what ``structure`` is."""
    check_model(structure.config, form)
    if not structure.blocks:
        raise InputError(f"{form} needs a block that does something and the plan leaves out all of them")


def check_model(config: Any, form: str) -> None:
    """Raise `InputError` where a dense model of this configuration is none that ``form`` can describe."""
    if config.model_type not in FAMILY:
        raise InputError(
            f"{form} describes decoders of type {', '.join(FAMILY)} and this model is {config.model_type!r}: use"
            " --format plain or dense"
        )
    if config.hidden_act != "silu":
        raise InputError(f"{form} has MLPs with silu and this model's have {config.hidden_act!r}: use --format plain")
    window = sliding_window(config)
    if window is not None:
        raise InputError(
            f"{form} has no sliding windows and this model's attention sees {window} of"
            f" {config.max_position_embeddings} positions: use --format plain"
        )


def check_graph(config: Any) -> None:
    """Raise `InputError` where the graph of a model of this configuration would not be what the model does."""
    window = sliding_window(config)
    if window is not None:
        raise InputError(
            f"openvino is written without sliding windows and this model's attention sees {window} of"
            f" {config.max_position_embeddings} positions: use --format plain or dense"
        )


def sliding_window(config: Any) -> int | None:
    """Positions that attention sees where those are fewer than all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    short = window is not None and window < config.max_position_embeddings and "sliding_attention" in kinds
    return window if short else None


def has_attention(structure: Structure, place: int) -> bool:
    """Whether the block at ``place`` is written with attention: the first always, of zeros where it had none.

    Caches and sizes of heads are read from the first block (vLLM's ``nemotron_nas.py``, llama.cpp's ``deci``).
    """
    return place == 0 or structure.blocks[place].attention
