"""What methods share that treat one weight and fit each level anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from rankfront.methods._method import Factors, Option, Prepared, Site
from rankfront.methods._weighting import Weighting
from rankfront.methods.layers import Factored, replacement

Found = TypeVar("Found")
W = TypeVar("W", bound=Weighting)


def matrix_of(factors: Factors, rows: int, columns: int) -> Tensor:
    """Ŵ (rows, columns) in fp32 that ``factors`` of a dense weight of that size multiply to."""
    with torch.device("meta"):
        dense = nn.Linear(columns, rows, bias=False)
    return cast(Factored, replacement(dense, factors.kind, factors.tensors, factors.settings)).matrix()


def shared_by_levels(make: Callable[[Tensor, W], Found]) -> Callable[[Tensor, W], Found]:
    """``make`` with its newest result kept while its Gram lives: a weight's levels are prepared in a row."""
    newest: weakref.WeakKeyDictionary[Weighting, tuple[weakref.ref[Tensor], int, Found]] = weakref.WeakKeyDictionary()

    @wraps(make)
    def shared(weight: Tensor, weighting: W) -> Found:
        held = newest.get(weighting)
        if held is not None and held[0]() is weight and held[1] == weight._version:
            return held[2]
        newest.clear()
        found = make(weight, weighting)
        newest[weighting] = (weakref.ref(weight), weight._version, found)
        return found

    return shared


class Fitted:
    """One preparation for each option, with its squared ``error`` and the ``energy`` of the whole beside the factors.

    Products with gradients and inputs go through the rebuilt matrix: two dense products an option.
    """

    nested = False
    version = 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        raise NotImplementedError

    def error(self, prepared: Prepared, option: Option) -> float:
        return float(prepared["error"])

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        raise NotImplementedError

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ("weight",) if self.needs == ("gram",) else ()

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        return self.truncate(prepared, option)["weight"]

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        found = {}
        for option in options:
            factors = self.truncate(prepared, option)["weight"]
            matrix = matrix_of(factors, site.anchor.out_features, site.anchor.in_features).to(x.device, x.dtype)
            found[option.label] = (g.float() * (x @ matrix.T).float()).sum(1)
        return found


def measured(weight: Tensor, approximation: Tensor, weighting: Weighting) -> dict[str, Tensor]:
    """``error`` ‖(W − Ŵ) S‖²_F and ``energy`` ‖W S‖²_F, (1,) each, for W and Ŵ (m, n)."""
    error, energy = (
        (weighting.times_gram(matrix) * matrix).sum().clamp_min(0)[None]  # no root: it costs an eigendecomposition
        for matrix in (weight.double() - approximation.double(), weight.double())
    )
    largest = torch.finfo(torch.float32).max
    return {"error": error.clamp_max(largest).float(), "energy": energy.clamp_max(largest).float()}
