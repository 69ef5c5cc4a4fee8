"""What the tensor formats share: a level is one whole number, from which all ranks follow by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, matrix_of, measured
from rankfront.methods._method import (
    Factors,
    Grid,
    Option,
    Prepared,
    Site,
    nearest_levels,
    not_one_linear,
    whole_level,
)
from rankfront.methods._storage import Storage
from rankfront.methods._weighting import Unweighted, Weighting
from rankfront.methods.layers import layers
from rankfront.methods.layers_tensor import Network


class TensorFormat(Fitted):
    """A tensor format of one weight.

    Attributes:
        name: of the method.
        kind: its layer.
        level: the name of its whole number.
        stepped: whether that is a multiple of the grid's `rank_multiple`; otherwise every number will do.
    """

    name: str
    kind: str
    level = "rank"
    stepped = True

    def cost(self, m: int, n: int, level: int) -> Storage:
        """What W (m, n) stores at ``level``."""
        raise NotImplementedError

    def full(self, m: int, n: int) -> int:
        """The level from which on W (m, n) is reproduced, or beyond which more has no use."""
        raise NotImplementedError

    def kept(self, option: Option) -> int:
        return whole_level(option, self.level)

    def check(self, option: Option) -> None:
        self.kept(option)

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs)
        return reason if reason or self._below_dense(site, 1) else "no level stores less than the dense weight"

    def _below_dense(self, site: Site, level: int) -> bool:
        weight = site.weights[0]
        return self.cost(weight.out_features, weight.in_features, level).values < site.storage.values

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        """The level whose storage is nearest to each kept fraction, of those below dense."""
        if self.refuses(site):
            return {}
        m, n = site.weights[0].out_features, site.weights[0].in_features
        step = grid.rank_multiple if self.stepped else 1
        costs = {}
        for level in range(step, self.full(m, n) + 1, step):
            if not self._below_dense(site, level):
                break
            costs[level] = self.cost(m, n, level).values
        chosen = nearest_levels(costs, grid, site.storage.values)
        return {keep: Option.of(self.name, **{self.level: level}) for keep, level in chosen.items()}

    def storage(self, site: Site, option: Option) -> Storage:
        weight = site.weights[0]
        return self.cost(weight.out_features, weight.in_features, self.kept(option))

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        return {"weight": self.factors(prepared)}

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The layer's tensors among ``tensors``, with the sizes of their indices."""
        network = cast(type[Network], layers()[self.kind])
        own = {name: tensors[name] for name in network.indices}
        storage = Storage(sum(tensor.numel() for tensor in own.values()))
        return Factors(self.kind, own, network.settings(own), storage)

    def fitted(self, weight: Tensor, tensors: Mapping[str, Tensor], weighting: Weighting | None = None) -> Prepared:
        """The tensors in fp32 with the error of just these, ‖(W − Ŵ) S‖²_F, and the whole ‖W S‖²_F."""
        stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        matrix = matrix_of(self.factors(stored), *weight.shape)
        return stored | measured(weight, matrix, weighting or Unweighted())


class NestedFormat(TensorFormat):
    """A format whose first components are its fit at a lower level.

    Attributes:
        ranked: tensor -> the axis of the components, for the tensors that have one.
    """

    nested = True
    ranked: Mapping[str, int]

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        level = self.kept(option)
        available = len(prepared["errors"])
        if level > available:
            raise InputError(f"{self.level} {level} was asked of {available} prepared components: lower it")
        kept = {name: prepared[name].narrow(axis, 0, level) for name, axis in self.ranked.items()}
        return {"weight": self.factors({**prepared, **kept})}

    def error(self, prepared: Prepared, option: Option) -> float:
        return float(prepared["errors"][self.kept(option) - 1])

    def sized(self, m: int, n: int, levels: list[int]) -> int:
        """How many components to keep: those that cost less than dense, or as many as an option asks for."""
        full = self.full(m, n)
        below = max(level for level in range(1, full + 1) if level == 1 or self.cost(m, n, level).values < m * n)
        return min(full, max([below, *levels]))


def level_errors(weight: Tensor, energies: Tensor, component: Callable[[int], Tensor] | None) -> dict[str, Tensor]:
    """``errors`` (k,) of keeping the first 1, 2, …, k components, ‖W − Ŵ‖²_F, and the ``energy`` ‖W‖²_F (1,).

    Orthogonal components of norms √``energies`` (k,) fall out of the whole one by one. Not so where modes are padded,
    for what they put into the padding is cut: there ``component`` i gives its matrix (m, n), and what is left is
    measured.
    """
    left = weight.double()
    whole = left.square().sum()
    errors = whole - energies.cumsum(0)
    if component is not None:
        for i in range(len(energies)):
            left = left - component(i)
            errors[i] = left.square().sum()
    largest = torch.finfo(torch.float32).max
    return {"errors": errors.clamp(0, largest).float(), "energy": whole[None].clamp_max(largest).float()}


def with_tensorly(solver: str, tensor: Tensor, *arguments: object, **settings: object) -> Any:
    """What TensorLy's solver of that name makes of a tensor, by torch; the caller's own backend stays chosen."""
    import tensorly.decomposition  # loads slowly, and few studies ask for it

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return getattr(tensorly.decomposition, solver)(tensor, *arguments, **settings)
