"""Integers in the place of the dense weight: to the nearest value, or by GPTQ.

    minimise ‖(W − Ŵ) C^{1/2}‖²_F over Ŵ of 8 or 4 bits, C = Σ_t x_t x_tᵀ

Nothing is left out, so this is what factorisations have to beat where bytes count. `gptq-int8`, `gptq-int4` carry
rounding errors on to the inputs that follow; `rtn-int8`, `rtn-int4` round to the nearest, without any text. What is
stored and what runs is said in `_integers` and `layers_integer`.

Source: GPTQ (2210.17323), equation 3 and algorithm 1; the grid is not searched for, and columns keep their order. Four
bits are those of torch's kernel: asymmetric, in groups of 64 or 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured
from rankfront.methods._integers import padded_away, rounded
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, not_one_linear, register, whole_level
from rankfront.methods._packed_integers import named, restored
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, integer_storage
from rankfront.methods._weighting import Unweighted

FULL_BITS = 16  # of a value that is not rounded


@dataclass(frozen=True)
class Rounding(Fitted):
    """Ŵ of ``bits`` bits, a level of that name and nothing else to choose."""

    name: str
    bits: int
    calibrated: bool
    family = "integer grids"

    @property
    def paper(self) -> str:
        return "2210.17323" if self.calibrated else "round to nearest"

    @property
    def geometry(self) -> str:
        steps = "255 steps for a row" if self.bits == 8 else "16 steps for 64 inputs of a row"
        return f"{steps}, errors made good by the inputs that follow" if self.calibrated else steps

    @property
    def metric(self) -> str:
        return "whitening" if self.calibrated else "identity"

    @property
    def formula(self) -> str:
        return (
            f"ŵ on {self.bits} bits, {'least ‖(W − Ŵ) C^{1/2}‖_F column by column' if self.calibrated else 'nearest'}"
        )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.calibrated else ()

    def refuses(self, site: Site) -> str | None:
        if len(site.weights) != 1 or self.calibrated:
            reason = not_one_linear(site, self.needs, looked_up=True)
            if reason:
                return reason
        weight = site.anchor
        return padded_away(integer_storage(weight.out_features, weight.in_features, self.bits), weight.storage)

    def check(self, option: Option) -> None:
        if whole_level(option, "bits") != self.bits:
            raise InputError(f"option {option.label!r}: {self.name} has bits={self.bits} and no other level")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        """One, at the kept fraction nearest to its share of the bits."""
        if self.refuses(site):
            return {}
        return {
            min(grid.keep, key=lambda keep: abs(keep - self.bits / FULL_BITS)): Option.of(self.name, bits=self.bits)
        }

    def storage(self, site: Site, option: Option) -> Storage:
        return integer_storage(site.anchor.out_features, site.anchor.in_features, self.bits)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (weight,) = weights.values()
        weighting = collected(statistics["weight"].gram, "gram") if self.calibrated else None
        integers = rounded(weight, self.bits, weighting)
        approximation = restored(integers, self.bits, weight.shape[1])
        found = named(stored=integers) | measured(weight, approximation, weighting or Unweighted())
        return found | {"columns": torch.tensor([weight.shape[1]])}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        tensors = {name: prepared[name] for name in ("stored.integers", "stored.scales")}
        rows, columns = len(tensors["stored.integers"]), int(prepared["columns"])
        storage = integer_storage(rows, columns, self.bits)
        return {"weight": Factors("integer", tensors, {"bits": self.bits}, storage)}


for bits in (8, 4):
    register(Rounding(f"rtn-int{bits}", bits, calibrated=False))
    register(Rounding(f"gptq-int{bits}", bits, calibrated=True))
