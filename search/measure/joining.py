"""Which right factors run as one product (see `joined`): those that are faster so here, by measurement.

Both ways are timed in turns at the ranks that the plan has, for one token of decoding and for the tokens of a prompt:
one product wherever decoding is faster, for long inputs too where those are. Figures are kept with the latency table's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods.joined import Joined
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.objectives.latency import Timed
from rankfront.search.measure.timing import Stopwatches

FEW = 16  # vectors at once of what counts as decoding
GAIN = 0.02  # of the time of separate products; less is within the noise


class Together(nn.Module):
    """Low-rank linears of these shapes on one input, joined or not: what is timed."""

    def __init__(self, shapes: list[tuple[int, int, int]], like: Tensor, joined: bool) -> None:
        super().__init__()
        self.shapes, self.like, self.together = shapes, like, joined

        def of(*size: int) -> Tensor:
            return torch.full(size, 0.01, dtype=like.dtype, device=like.device)

        members = [LowRankLinear(of(m, r), of(r, n)) for m, r, n in shapes]
        self.members = nn.ModuleList(members)
        if joined:
            Joined(members)

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        return Together(self.shapes, self.like, self.together)

    def forward(self, x: Tensor) -> None:
        for member in self.members:
            member(x)


def join_faster(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, str], lengths: Timed, watches: Stopwatches
) -> list[dict[str, Any]]:
    """Join the low-rank linears among ``modules`` (by path) that are faster so; what is joined, as an export names it.

    ``inputs``: path -> first of the paths that read the same, as `shared_inputs` found them. Groups that stay as they
    were are left alone, others part ways.
    """
    groups: dict[str, list[str]] = {}
    for path, first in inputs.items():
        module = modules.get(path)
        if isinstance(module, LowRankLinear) and module.in_full:
            groups.setdefault(first, []).append(path)
    wanted = [paths for paths in groups.values() if len(paths) > 1]
    members = [[cast(LowRankLinear, modules[path]) for path in paths] for paths in wanted]
    intact = [own[0].joined for own in members if own[0].joined is not None and own[0].joined.members == own]
    separate(module for module in modules.values() if getattr(module, "joined", None) not in intact)
    done = []
    for paths, own in zip(wanted, members, strict=True):
        joined = own[0].joined or _joined(own, lengths, watches)
        if joined is not None:
            done.append({"modules": paths, "most": joined.most})
    watches.save()
    return done


def separate(modules: Iterable[nn.Module]) -> None:
    """Give the factors of every joined one, and of those it is joined with, places of their own again."""
    for module in modules:
        joined = getattr(module, "joined", None)
        if joined is not None:
            joined.part_ways()


def _joined(members: Sequence[LowRankLinear], lengths: Timed, watches: Stopwatches) -> Joined | None:
    """These, joined if that is faster."""
    if not faster(members, lengths.batch, 1, watches):
        return None
    return Joined(members, None if faster(members, lengths.batch, lengths.prompt, watches) else max(FEW, lengths.batch))


def faster(members: Sequence[LowRankLinear], batch: int, tokens: int, watches: Stopwatches) -> bool:
    """Whether one product takes less time on (batch, tokens, n)."""
    like = members[0].right
    shapes = [(m.out_features, m.rank, m.in_features) for m in members]
    key = "one product for " + " + ".join(f"{m}x{r}x{n}" for m, r, n in shapes)
    x = torch.ones(batch, tokens, members[0].in_features, dtype=like.dtype, device=like.device)
    apart, together = (partial(Together, shapes, like, joined) for joined in (False, True))
    return watches.ratio(key, apart, x, together) < 1 - GAIN
