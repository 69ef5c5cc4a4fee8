"""What a model can read: positions that it has learned, token ids that it has rows for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankfront.methods import InputError
from rankfront.search.inputs.sites import towers


@dataclass(frozen=True)
class Capacity:
    """How long and which sequences a model can read.

    Attributes:
        rows: of its embedding table.
        positions: that it has learned embeddings for (GPT-2, OPT, BERT); None where it has rotary ones.
    """

    rows: int
    positions: int | None

    def check_length(self, length: int, what: str) -> None:
        """Raise `InputError` where ``length`` tokens are more than the model has learned positions for."""
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"{what} is {length} tokens and the model has {self.positions} learned positions: make it shorter"
            )

    def check_tokens(self, tokens: Mapping[str, Tensor]) -> None:
        """Raise `InputError` where a split's token ids lie beyond the model's embedding table."""
        for name, ids in tokens.items():
            if int(ids.max()) >= self.rows:
                raise InputError(
                    f"the {name} text has token id {int(ids.max())} and the model's embedding table {self.rows} rows:"
                    " the tokenizer belongs to another model; restore its files beside the checkpoint"
                )


def capacity_of(model: Any) -> Capacity:
    """Read from the module tree: of a model with its weights or without."""
    table, beside = model.get_input_embeddings(), towers(model)
    positions = [
        module.num_embeddings - getattr(module, "offset", 0) - _before(module)
        for path, module in model.named_modules()
        if (isinstance(module, nn.Embedding) and "pos" in path.rpartition(".")[2]) or path.endswith(".wpe")
        if module.embedding_dim == table.embedding_dim and not path.startswith(beside)
    ]
    return Capacity(table.num_embeddings, min(positions, default=None))


def _before(table: Any) -> int:
    """Rows of a table of positions that come before the first one: RoBERTa counts from its padding token on."""
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1
