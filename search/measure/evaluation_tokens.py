"""Which tokens of the search split are read: by trials, and by menu and slopes beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankfront.search.inputs.text import GOLDEN

# Of a window, at most, that menu and slopes read at once: at keep 0.8 the best step by 12,288 tokens takes 15% of the
# excess on windows of 512 where they come in pieces of 128, and 25% in whole windows (studies/results/steps.md).
PIECE_TOKENS = 512


class EvaluationTokens:
    """Windows of the search split (W, L): the first so many for trials.

    Args:
        search: the split.
        count: how many windows trials read.
        seed: of the order in which menu and slopes take what is left.
        whole: whether they take whole windows, such as labelled texts.
    """

    def __init__(self, search: Tensor, count: int, seed: int, whole: bool = False) -> None:
        self.search, self.count, self.seed, self.whole = search, count, seed, whole

    @property
    def windows(self) -> Tensor:
        """What trials read of the search split."""
        return self.search[: self.count]

    def spare(self, number: int, tokens: int) -> Tensor:
        """Pieces of windows that no trial reads, about ``tokens`` tokens; where trials read the whole search split, or
        leave less, some of it. Those of neighbouring ``number`` are others, as far as there are.

        They are drawn from all over the text, and no longer than `PIECE_TOKENS`, for what tokens of one window say is
        much alike.
        """
        whole = self.search
        pool = whole[self.count :]
        if pool.numel() < tokens:
            pool = whole
        length = whole.shape[1] if self.whole else whole.shape[1] // math.ceil(whole.shape[1] / PIECE_TOKENS)
        pieces = pool[:, : whole.shape[1] // length * length].reshape(-1, length)
        count = min(max(1, tokens // length), len(pieces))
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(self.seed))
        first = int(number * GOLDEN % 1 * len(pieces))
        return pieces[order[(torch.arange(count) + first) % len(pieces)]]
