"""What a model can read: positions that it has learned, token ids that it has rows for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankfront.methods import InputError


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learned embeddings for (GPT-2, OPT); None where it has rotary ones."""
    width = model.get_input_embeddings().embedding_dim
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if (isinstance(module, nn.Embedding) and "pos" in path.rpartition(".")[2]) or path.endswith(".wpe")
        if module.embedding_dim == width
    ]
    return min(tables, default=None)


def check_length(model: Any, length: int, what: str) -> None:
    """Raise `InputError` where ``length`` tokens are more than the model has learned positions for."""
    positions = learned_positions(model)
    if positions is not None and length > positions:
        raise InputError(f"{what} is {length} tokens and the model has {positions} learned positions: make it shorter")


def check_tokens(model: Any, tokens: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where a split's token ids lie beyond the model's embedding table."""
    rows = model.get_input_embeddings().num_embeddings
    for name, ids in tokens.items():
        if int(ids.max()) >= rows:
            raise InputError(
                f"the {name} text has token id {int(ids.max())} and the model's embedding table {rows} rows: the"
                " tokenizer belongs to another model; restore its files beside the checkpoint"
            )
