"""Ordered dropout: low-rank factors trained so that their first b components are a good factor of rank b, for every b.

    min_{L, R} E_{(i, b)} KL(dense ‖ model with L_i[:, :b] R_i[:b] at site i) + λ Σ_i Σ_b (‖L_i[:, b:]‖_F + ‖R_i[b:]‖_F)

At one linear layer with squared loss the optimum is the SVD of W C^{1/2}, C the Gram of its inputs: what a block-wise
stage would learn, `svd-llm` has in closed form. So it trains by the loss of the whole model alone.

Sources: FjORD (2102.13451) for ordered dropout, one width for all layers at a step; Maestro (2308.14929) for one layer
at a step, the hierarchical group lasso and the shrinking. Strata are ours, and that widths are those of slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear
from rankfront.search.heal.arm import Arm
from rankfront.search.heal.trainable import NothingToHeal
from rankfront.search.heal.worth import widths_at

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly over [0, 1) however many there are
ROOT = 1e-12  # under the root of a norm, whose gradient at zero is no number; Maestro's code warns of it
SHARES = (1.0, 0.75, 0.5)  # of rank, at which a healing is judged; guess
LEAST = 0.3  # share of the size that training of all sites at once goes down to; guess
BUDGETS = 24  # shares of the size between that and all of it; guess
SHRINKS = 8  # times that components are dropped, in a training with a lasso; Maestro does after every epoch
DROPPED = 1e-3  # of a site's importance, below which components go. Maestro's 1e-5 is no share, after 300 epochs; guess


class Ranked:
    """Low-rank modules of one rank that are narrowed together: one, or all that share a factor."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = list(modules)
        self.rank: int = self.modules[0].rank
        pairs = [(module.left, module.right) for module in self.modules]
        self.lefts = list({id(left): left for left, _ in pairs}.values())
        self.rights = list({id(right): right for _, right in pairs}.values())

    def narrow(self, width: int) -> None:
        """Let them run on their first ``width`` components; gradients reach these alone."""
        for module in self.modules:
            left, right = module._parameters["left"], module._parameters["right"]
            vars(module).update(left=left[:, :width], right=right[:width])

    def widen(self) -> None:
        """Let them run on all components again."""
        for module in self.modules:
            for name in ("left", "right"):
                vars(module).pop(name, None)

    def tails(self) -> list[Tensor]:
        """Of L and of R: √(‖components b …‖² + `ROOT`) for b = 0 … r − 1, (r,) each; over all modules together."""
        energies = (
            torch.stack([left.square().sum(0) for left in self.lefts]).sum(0),
            torch.stack([right.square().sum(1) for right in self.rights]).sum(0),
        )
        return [(energy.flip(0).cumsum(0).flip(0) + ROOT).sqrt() for energy in energies]

    @torch.no_grad()
    def importance(self) -> Tensor:
        """‖L[:, b:]‖ ‖R[b:]‖ for b = 0 … r − 1, (r,): non-increasing."""
        left, right = self.tails()
        return left * right

    @torch.no_grad()
    def used(self) -> int:
        """How many components there are up to the last that is not zero, at least 1."""
        filled = torch.stack([left.any(0) for left in self.lefts]).any(0).nonzero()
        return int(filled.max()) + 1 if len(filled) else 1

    @torch.no_grad()
    def drop(self, width: int) -> None:
        """Zero all components but the first ``width``."""
        for left in self.lefts:
            left[:, width:] = 0
        for right in self.rights:
            right[width:] = 0


def ranked(model: nn.Module) -> list[Ranked]:
    """The low-rank modules of ``model`` in the order of the module tree, those that share a factor together.

    Raises `NothingToHeal` where there is none.
    """
    groups: list[list[Any]] = []
    owner: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, LowRankLinear | LowRankEmbedding) and module.in_full:
            group = owner.get(id(module.left)) or owner.get(id(module.right))
            if group is None:
                group = []
                groups.append(group)
            group.append(module)
            owner[id(module.left)] = owner[id(module.right)] = group
    if not groups:
        raise NothingToHeal(
            "ordered dropout trains low-rank factors, and the plan has none: heal it by another method, or choose a"
            " plan of svd-llm"
        )
    return [Ranked(group) for group in groups]


@contextmanager
def narrowed(groups: Sequence[Ranked], share: float) -> Iterator[None]:
    """Within, every group runs on this ``share`` of its components."""
    for group in groups:
        group.narrow(share_of(group.rank, share))
    try:
        yield
    finally:
        for group in groups:
            group.widen()


def share_of(rank: int, share: float) -> int:
    """The whole number nearest to that ``share`` of ``rank``, at least 1."""
    return max(1, round(share * rank))


def spread(count: int, generator: torch.Generator) -> list[int]:
    """1 … count, each once, in an order of which every stretch is spread over all of them: the ranks of the fractional
    parts of u + k `GOLDEN`, u drawn."""
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    fractions = (start + torch.arange(count, dtype=torch.float64) * GOLDEN) % 1
    return [int(place) + 1 for place in fractions.argsort().argsort()]


def pairs(ranks: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Every (site i, width b), b = 1 … ranks[i], once: in rounds, each of which visits every site that has a width left
    once, in an order of its own; the widths of a site as `spread` has them."""
    generator = torch.Generator().manual_seed(seed)
    widths = [spread(rank, generator) for rank in ranks]
    return [
        (site, widths[site][turn])
        for turn in range(max(ranks))
        for site in torch.randperm(len(ranks), generator=generator).tolist()
        if turn < ranks[site]
    ]


class Ordered(Arm):
    """Maestro's: one pair (site, width) a step, every pair once a cycle, all other sites at full rank.

    With a lasso λ, components are dropped as well: `SHRINKS` times, those whose importance ‖L[:, b:]‖ ‖R[b:]‖ is below
    `DROPPED` of their site's. What is left is a prefix. Dropped ones stay, as zeros: what is stored keeps its shape.
    """

    name: ClassVar[str] = "lod"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.groups = ranked(self.model)
        self.kept = [group.rank for group in self.groups]  # components that are not dropped
        self.cycle: tuple[int, list[tuple[int, int]]] = (-1, [])  # the step that it began at, and its pairs

    @classmethod
    def check(cls, model: nn.Module) -> None:
        ranked(model)

    @classmethod
    def views(cls, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        groups = ranked(model)
        return [narrowed(groups, share) for share in SHARES]

    def widths(self, step: int, since: int) -> dict[int, int]:
        """Site -> the width that it has at ``step``; those that are not named are at full rank. Components were dropped
        last before the step ``since``."""
        start = step - (step - since) % sum(self.kept)
        if self.cycle[0] != start:
            self.cycle = start, pairs(self.kept, self.seed * 1_000_003 + start)
        site, width = self.cycle[1][step - start]
        return {site: width}

    def before(self, step: int, steps: int) -> None:
        period, since = max(1, steps // SHRINKS), 0
        if self.lasso:  # what is dropped is zero, so that a checkpoint has it
            since = step // period * period
            self.kept = [group.used() for group in self.groups]
        for site, width in self.widths(step, since).items():
            self.groups[site].narrow(width)

    def penalty(self) -> Tensor | None:
        if not self.lasso:
            return None
        return self.lasso * torch.stack([tail.sum() for group in self.groups for tail in group.tails()]).sum()

    @torch.no_grad()
    def cost(self) -> float:
        penalty = self.penalty()
        return 0.0 if penalty is None else float(penalty)

    def after(self, step: int, steps: int) -> None:
        self.finish()
        super().after(step, steps)
        if self.lasso:
            shrinks = (step + 1) % max(1, steps // SHRINKS) == 0
            for group, used in zip(self.groups, self.kept, strict=True):
                importance = group.importance()
                group.drop(int((importance >= DROPPED * importance[0]).sum()) if shrinks else used)

    def finish(self) -> None:
        for group in self.groups:
            group.widen()


class OrderedTogether(Ordered):
    """FjORD's: all sites narrow at once, to another share of their size at every step, spread over `LEAST` to 1.

    FjORD gives every layer one share of its width. Here a share is that of the sites' size together, and which widths
    come to it is what `worth` says, as when a model is sliced.
    """

    name: ClassVar[str] = "fjord"
    path: Sequence[Sequence[int]] = ()  # for shares from `LEAST` to 1, widths of all sites; equal shares without

    def prepare(self, windows: Tensor) -> None:
        shares = [LEAST + (1 - LEAST) * place / (BUDGETS - 1) for place in range(BUDGETS)]
        self.path = widths_at(self.model, [group.modules for group in self.groups], windows, shares, self.seed)

    def widths(self, step: int, since: int) -> dict[int, int]:
        start = torch.rand(1, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        place = float((start + step * GOLDEN) % 1)
        if not self.path:
            return {site: share_of(rank, LEAST + (1 - LEAST) * place) for site, rank in enumerate(self.kept)}
        chosen = self.path[int(place * len(self.path))]
        return {site: min(width, kept) for site, (width, kept) in enumerate(zip(chosen, self.kept, strict=True))}
