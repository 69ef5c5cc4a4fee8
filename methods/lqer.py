"""LQER in QERA's closed form: what rounding to 4 bits loses, made good by a low rank in 8 bits.

    Ŵ = Q + A B, least ‖(W − Q − A B) C^{1/2}‖²_F over A (m, r) and B (r, n), C = Σ_t x_t x_tᵀ

Q is W on 4 bits. With E = W − Q and E C^{1/2} = U Σ Vᵀ the best correction is A = U_r, B = U_rᵀ E; both are rounded to
8 bits, one fitted to the other's rounding, which loses far less than they leave. GPTQ's errors are smaller but nearly
white under C, those of the nearest value larger and gathered in few directions: either may be the better start, so the
one is taken whose tail, the energy beyond r, is smaller. On six weights of SmolLM2-135M that was GPTQ at ranks 16 and
32, and either of them at 64; taking turns between rounding W − A B and fitting A B again was worse than one pass but
for the largest rank.

Source: QERA (2410.06040) for the closed form under C^{1/2}; LQER (2402.02446, section 3), where inputs are weighed by
their mean magnitudes, for a low rank that makes good what rounding lost; GPTQ (2210.17323) for Q.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured, shared_by_levels
from rankfront.methods._integers import padded_away, rounded, rounded_factors
from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, not_one_linear, register, whole_level
from rankfront.methods._packed_integers import Integers, named, restored
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, integer_low_rank_storage, integer_storage
from rankfront.methods._weighting import Gram
from rankfront.methods.layers_integer import CORRECTION_BITS

BITS = 4
PARTS = ("stored", "left", "right")


class Rounded(NamedTuple):
    """One rounding of W (m, n) with what it lost.

    Attributes:
        integers: Q.
        lost: E = W − Q (m, n).
        basis, energy: U (m, q) and σ² (q,) of E C^{1/2} = U Σ Vᵀ.
    """

    integers: Integers
    lost: Tensor
    basis: Tensor
    energy: Tensor


@shared_by_levels
def _roundings(weight: Tensor, weighting: Gram) -> list[Rounded]:
    """By GPTQ and to the nearest."""
    found = []
    for integers in (rounded(weight, BITS, weighting), rounded(weight, BITS)):
        lost = weight.double() - restored(integers, BITS, weight.shape[1]).double()
        found.append(Rounded(integers, lost, *weighted_subspace(lost, weighting)))
    return found


@dataclass(frozen=True)
class Corrected(Fitted):
    """Ŵ = Q + A B; levels ``rank`` and ``bits``. The kept fraction asked for is of the bytes of a 16-bit weight."""

    name: str
    bits = BITS
    paper = "2402.02446, 2410.06040"
    family = "integer grids"
    geometry = "16 steps for 64 inputs of a row, and a subspace for what they lose"
    metric = "whitening"
    formula = "Ŵ = Q + U_r U_rᵀ (W − Q), (W − Q) C^{1/2} = U Σ Vᵀ, Q on 4 bits, the two factors on 8"
    needs = ("gram",)

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs)
        return reason or padded_away(self._stored(site.anchor.out_features, site.anchor.in_features, 1), site.storage)

    def check(self, option: Option) -> None:
        whole_level(option, "rank")
        if whole_level(option, "bits") != BITS:
            raise InputError(f"option {option.label!r}: {self.name} has bits={BITS}")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        """Only kept fractions that leave room for a correction."""
        if self.refuses(site):
            return {}
        m, n = site.anchor.out_features, site.anchor.in_features
        found, step, dense = {}, grid.rank_multiple, site.storage.bytes(2)
        alone = integer_storage(m, n, BITS).bytes(2)
        for keep in grid.keep:
            rank = min(step * round((keep * dense - alone) / (m + n) / step), min(m, n))  # a byte for every value
            if rank >= 1 and self._stored(m, n, rank).bytes(2) < dense:
                found[keep] = Option.of(self.name, rank=rank, bits=BITS)
        return found

    def storage(self, site: Site, option: Option) -> Storage:
        return self._stored(site.anchor.out_features, site.anchor.in_features, whole_level(option, "rank"))

    def _stored(self, m: int, n: int, rank: int) -> Storage:
        return integer_storage(m, n, BITS) + integer_low_rank_storage(m, n, rank, CORRECTION_BITS)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight, rank = weights["weight"], whole_level(options[0], "rank")
        columns, gram = weight.shape[1], collected(statistics["weight"].gram, "gram")
        chosen = min(_roundings(weight, gram), key=lambda each: float(each.energy[rank:].sum()))
        basis = chosen.basis[:, :rank]
        left, right = rounded_factors(chosen.lost, basis, basis.T @ chosen.lost, CORRECTION_BITS, gram)
        correction = restored(left, CORRECTION_BITS, rank).double() @ restored(right, CORRECTION_BITS, columns).double()
        approximation = restored(chosen.integers, BITS, columns).double() + correction
        found = named(stored=chosen.integers, left=left, right=right)
        return found | measured(weight, approximation, gram) | {"columns": torch.tensor([columns])}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        tensors = {f"{part}.{name}": prepared[f"{part}.{name}"] for part in PARTS for name in Integers._fields}
        rank, columns = whole_level(option, "rank"), int(prepared["columns"])
        storage = self._stored(len(tensors["stored.integers"]), columns, rank)
        return {"weight": Factors("integer-corrected", tensors, {"rank": rank, "bits": BITS}, storage)}


register(Corrected("lqer-int4"))
