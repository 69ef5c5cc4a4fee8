"""SVD-LLM with both factors in 8 or 4 bits: (rank, bits) is one level.

    minimise ‖(W − A B) C^{1/2}‖²_F over A (m, r) and B (r, n) of 8 or 4 bits, C = Σ_t x_t x_tᵀ

From W C^{1/2} = U Σ Vᵀ come the directions U_r, and `rounded_factors` of them.

Source: SVD-LLM (2403.07378) for the factors, GPTQ (2210.17323) for the rounding; fitting one factor to the other's
rounding in the manner of LQER (2402.02446), whose low rank corrects a rounded weight instead [M].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._dictionary import whitened
from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured
from rankfront.methods._integers import padded_away, rounded_factors
from rankfront.methods._method import (
    Factors,
    Grid,
    Option,
    Prepared,
    Site,
    not_one_linear,
    register,
    whole_level,
)
from rankfront.methods._metric import WHITENING
from rankfront.methods._packed_integers import Integers, named, restored
from rankfront.methods._registry import get_method
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, integer_low_rank_storage

SIDES = ("left", "right")


@dataclass(frozen=True)
class IntegerLowRank(Fitted):
    """Ŵ = left · right, both rounded; a level its ``rank`` and ``bits``. The kept fraction asked for sets the rank."""

    name: str
    bits: int
    paper = "2403.07378, 2210.17323"
    family = "weighted subspace"
    metric = WHITENING.name
    needs = WHITENING.needs

    @property
    def geometry(self) -> str:
        return f"as svd-llm, both factors on {self.bits} bits, one fitted to the other's rounding"

    @property
    def formula(self) -> str:
        return f"Ŵ = A B on {self.bits} bits, B ≈ U_rᵀ W, A ≈ W C Bᵀ (B C Bᵀ)⁻¹ near U_r, both by GPTQ"

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs) or get_method("svd-llm").refuses(site)
        if reason:
            return reason
        m, n = site.anchor.out_features, site.anchor.in_features
        return padded_away(self._stored(m, n, 1), site.storage)

    def check(self, option: Option) -> None:
        whole_level(option, "rank")
        if whole_level(option, "bits") != self.bits:
            raise InputError(f"option {option.label!r}: {self.name} has bits={self.bits}")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        offered = get_method("svd-llm").options(site, grid)
        found = {keep: Option.of(self.name, rank=option["rank"], bits=self.bits) for keep, option in offered.items()}
        dense = site.storage.bytes(2)
        return {keep: option for keep, option in found.items() if self.storage(site, option).bytes(2) < dense}

    def storage(self, site: Site, option: Option) -> Storage:
        return self._stored(site.anchor.out_features, site.anchor.in_features, whole_level(option, "rank"))

    def _stored(self, m: int, n: int, rank: int) -> Storage:
        return integer_low_rank_storage(m, n, rank, self.bits)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight, rank = weights["weight"], whole_level(options[0], "rank")
        gram = collected(statistics["weight"].gram, "gram")
        left, right = rounded_factors(weight.double(), whitened(weight, gram).basis[:, :rank], self.bits, gram)
        approximation = restored(left, self.bits, rank).double() @ restored(right, self.bits, weight.shape[1]).double()
        return (
            named(left=left, right=right)
            | measured(weight, approximation, gram)
            | {"columns": torch.tensor([weight.shape[1]])}
        )

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        tensors = {f"{side}.{name}": prepared[f"{side}.{name}"] for side in SIDES for name in Integers._fields}
        rank, columns = whole_level(option, "rank"), int(prepared["columns"])
        settings = {"rank": rank, "bits": self.bits}
        storage = self._stored(len(tensors["left.integers"]), columns, rank)
        return {"weight": Factors("integer-low-rank", tensors, settings, storage)}


for bits in (8, 4):
    register(IntegerLowRank(f"svd-llm-int{bits}", bits))
