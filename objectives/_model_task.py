"""What a model is for: how it is run on rows of token ids, which distributions it predicts there, and what is right.

Rows (W, L) are what splits hold: token ids, of labelled texts after the number of the class. Of each, a model predicts
P distributions over V outcomes; losses, divergences and gradients are of these alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

MASKED = 0.15  # share of a row's tokens that are masked: that of BERT's training (Devlin et al. 1810.04805)


class Task(Protocol):
    """One kind of model.

    Attributes:
        name: as ``model.task`` has it.
        auto: the class of transformers that loads it.
        pipeline: what the hub calls it.
        generates: whether it goes on with a text, token by token, and has a cache for that.
        labelled: whether rows are labelled texts, each with padding of its own.
        scheme: what perplexity is of, in a sentence, where that is not the next token.
    """

    @property
    def name(self) -> str: ...
    @property
    def auto(self) -> str: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def generates(self) -> bool: ...
    @property
    def labelled(self) -> bool: ...
    @property
    def scheme(self) -> str: ...

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """What the model is called with for ``rows`` (B, L)."""

    def attended(self, rows: Tensor) -> Tensor | None:
        """Which of the model's input tokens are no padding, (B, L'); None where none is."""

    def logits(self, model: Any, rows: Tensor) -> Tensor:
        """The distributions that a forward pass gives, (B, Q, V), Q at least P: the P predicted ones come first."""

    def predicted(self, length: int) -> int:
        """P, of rows of ``length``."""

    def targets(self, rows: Tensor) -> Tensor:
        """The outcomes that are right, (B, P)."""

    def outcomes(self, model: Any) -> int:
        """V."""

    def frozen(self, rows: Tensor) -> dict[str, Tensor]:
        """All that another process needs to score a model on ``rows``: its `inputs`, the ``targets`` (B, P), and their
        ``positions`` (B, P) in its output."""


@dataclass(frozen=True)
class CausalLM:
    """Every token but the first of a row is predicted from those before it."""

    name = "causal-lm"
    auto = "AutoModelForCausalLM"
    pipeline = "text-generation"
    generates = True
    labelled = False
    scheme = ""

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        return {"input_ids": rows}

    def attended(self, rows: Tensor) -> None:
        return None

    def logits(self, model: Any, rows: Tensor) -> Tensor:
        found: Tensor = model(input_ids=rows, use_cache=False).logits  # (B, L, V)
        return found

    def predicted(self, length: int) -> int:
        return length - 1

    def targets(self, rows: Tensor) -> Tensor:
        return rows[:, 1:]

    def outcomes(self, model: Any) -> int:
        return int(model.config.get_text_config().vocab_size)

    def frozen(self, rows: Tensor) -> dict[str, Tensor]:
        import torch

        positions = torch.arange(rows.shape[1] - 1).expand(len(rows), -1)
        return self.inputs(rows) | {"targets": self.targets(rows), "positions": positions}


CAUSAL = CausalLM()


@dataclass(frozen=True)
class MaskedLM:
    """`MASKED` of the tokens of a row, one at least, are replaced by the mask token, and predicted from all others.

    Which ones is drawn by a generator that the row's own ids seed, special tokens left out while there are others: the
    same row has the same mask everywhere. Perplexity is then pseudo-perplexity at these positions, in the manner of
    Salazar et al. (1910.14659), all masked at once instead of one by one.

    Attributes:
        mask: id of the mask token.
        special: ids that are not masked.
    """

    mask: int
    special: tuple[int, ...]

    name = "masked-lm"
    auto = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    generates = False
    labelled = False
    scheme = (
        f"Perplexity is that of masked tokens: {MASKED:.0%} of every window, the same ones always, all replaced by the"
        " mask token."
    )

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        return self._masked(rows, self.positions(rows))

    def _masked(self, rows: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"input_ids": rows.scatter(1, positions, self.mask)}

    def attended(self, rows: Tensor) -> None:
        return None

    def positions(self, rows: Tensor) -> Tensor:
        """Which tokens of ``rows`` (B, L) are masked, (B, P), in order."""
        import torch

        ids = rows.cpu()
        drawn = [
            torch.rand(len(row), generator=torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes())))
            for row in ids
        ]
        order = (torch.stack(drawn) + torch.isin(ids, torch.tensor(self.special))).argsort(dim=1)
        return order[:, : self.predicted(rows.shape[1])].sort(dim=1).values.to(rows.device)

    def logits(self, model: Any, rows: Tensor) -> Tensor:
        positions = self.positions(rows)
        found: Tensor = model(**self._masked(rows, positions)).logits  # (B, L, V)
        return found.gather(1, positions[:, :, None].expand(-1, -1, found.shape[-1]))

    def predicted(self, length: int) -> int:
        return max(1, round(MASKED * length))

    def targets(self, rows: Tensor) -> Tensor:
        return rows.gather(1, self.positions(rows))

    def outcomes(self, model: Any) -> int:
        return int(model.config.get_text_config().vocab_size)

    def frozen(self, rows: Tensor) -> dict[str, Tensor]:
        positions = self.positions(rows)
        return self._masked(rows, positions) | {"targets": rows.gather(1, positions), "positions": positions}


@dataclass(frozen=True)
class SequenceClassification:
    """The class of a text is predicted, one of V, from all of it.

    Attributes:
        padding: id of the token that fills rows up.
    """

    padding: int

    name = "sequence-classification"
    auto = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    generates = False
    labelled = True
    scheme = "Perplexity is the exponential of the mean cross-entropy of the classes."

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        ids, there = rows[:, 1:], rows[:, 1:] != self.padding
        longest = int(there.sum(1).max())  # where padding is on the right, what is more is padding for all
        if not bool(there[:, longest:].any()):
            ids, there = ids[:, :longest], there[:, :longest]
        return {"input_ids": ids, "attention_mask": there.long()}

    def attended(self, rows: Tensor) -> Tensor | None:
        return self.inputs(rows)["attention_mask"].bool()

    def logits(self, model: Any, rows: Tensor) -> Tensor:
        found: Tensor = model(**self.inputs(rows)).logits  # (B, V)
        return found[:, None]

    def predicted(self, length: int) -> int:
        return 1

    def targets(self, rows: Tensor) -> Tensor:
        return rows[:, :1]

    def outcomes(self, model: Any) -> int:
        return int(model.config.num_labels)

    def frozen(self, rows: Tensor) -> dict[str, Tensor]:
        import torch

        return self.inputs(rows) | {"targets": self.targets(rows), "positions": torch.zeros(len(rows), 1).long()}
