"""The dictionary family under whitening: each output picks a few of k atoms, W ≈ A B.

    minimise ‖(W − A B) C^{1/2}‖_F over A (m, k) with m·s nonzeros and B (k, n) dense

The papers write the transpose, Wᵀ ≈ L⁻¹ D S with LᵀL = C, and whiten and un-whiten explicitly. Here nothing is
inverted. Solvers see Y = U Σ (m, q) of W C^{1/2} = U Σ Vᵀ, which has the inner products that they need, and return A
alone. Given A, whatever the metric, the best atoms are

    B = (AᵀA)⁻¹ Aᵀ W

with a small ridge: the whitened dictionary D = B C^{1/2} minimises ‖Y Vᵀ − A D‖_F, so D = A⁺ W C^{1/2}. That is every
solver's last step, and it holds for a singular C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured, shared_by_levels
from rankfront.methods._low_rank import weighted_subspace
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
from rankfront.methods._metric import WHITENING
from rankfront.methods._sparse import gather_rows, pack_mask
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, dictionary_storage
from rankfront.methods._weighting import Weighting

ATOMS_PER_NONZERO = 2  # ρ = k/s, CoSpaDi (2509.22075) and COMPOT's ablation
REFIT_RIDGE = 1e-6  # of the squared norm of a column of A; near-parallel columns would need huge, cancelling atoms


class Whitened(NamedTuple):
    """W C^{1/2} = U Σ Vᵀ as solvers see it, q = min(m, n).

    Attributes:
        basis: U (m, q) in fp64.
        coordinates: U Σ / ‖Σ‖ (m, q) in fp32, in which supports are searched for.
        lengths: ‖C^{-1/2} v_i‖ = ‖u_iᵀ W‖ / σ_i (q,) in fp32, up to a common factor; 0 where σ_i is.
    """

    basis: Tensor
    coordinates: Tensor
    lengths: Tensor


@shared_by_levels
def whitened(weight: Tensor, weighting: Weighting) -> Whitened:
    """The same for W (m, n). Raises ValueError where weight or Gram is not finite."""
    basis, energy = weighted_subspace(weight, weighting)
    roots = energy.sqrt()  # (q,)
    norm = roots.norm()
    scaled = roots / torch.where(norm > 0, norm, 1)
    lengths = (basis.T @ weight.double()).norm(dim=1)
    lengths = lengths / torch.where(lengths.max() > 0, lengths.max(), 1)
    lengths = torch.where(scaled > 0, lengths / torch.where(scaled > 0, scaled, 1), 0)
    return Whitened(basis, (basis * scaled).float(), lengths.float())


def largest_in_rows(scores: Tensor, count: int) -> Tensor:
    """A mask (m, k) of the ``count`` largest of each row of ``scores`` (m, k)."""
    chosen = scores.topk(count, dim=1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, chosen, True)


def best_atoms(coefficients: Tensor, target: Tensor, ridge: float = REFIT_RIDGE) -> Tensor:
    """(AᵀA + ε diag AᵀA)⁻¹ Aᵀ T (k, n) for A (m, k), T (m, n), in their dtype; an atom that nothing picks is zero."""
    norms = coefficients.norm(dim=0)
    unit = coefficients / torch.where(norms > 0, norms, 1)
    normal = unit.T @ unit
    normal.diagonal().add_(ridge).add_((norms == 0).to(normal.dtype))
    atoms = torch.cholesky_solve(unit.T @ target, torch.linalg.cholesky(normal))
    return atoms / torch.where(norms > 0, norms, 1)[:, None]


@dataclass(frozen=True)
class Dictionary(Fitted):
    """Ŵ = A B, A (m, k) with m·s nonzeros, B (k, n), levels ``atoms`` k and ``nonzeros`` s with k/s = 2.

    k is at most min(m, n); where that does not use up what may be kept, s grows. Stored are the atoms, the nonzeros and
    the mask of their places, bit by bit, so the true storage of the paper in 16-bit words, kn + ms + mk/16. CoSpaDi
    quotes kn + ms: it would cut two bits from the mantissa of every coefficient, which pays for the mask exactly when
    k/s = 2. Our values keep all their bits.

    Where s = k nothing is left to choose, and the optimum is that of `svd-llm` at rank k.
    """

    name: str
    paper: str
    formula: str = field(init=False)
    family = "union of subspaces"
    geometry = f"each output picks a few of k atoms, {WHITENING.geometry}"
    metric = WHITENING.name
    needs = WHITENING.needs

    def solve(self, target: Whitened, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Coefficients (m, k) and the mask (m, k) of their m·s places, for s < k."""
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs)
        return reason if reason or self._ladder(site, 1) else "no dictionary stores less than the dense weight"

    def _ladder(self, site: Site, step: int) -> dict[tuple[int, int], int]:
        """(atoms, nonzeros) -> stored parameters of every level cheaper than dense, rising."""
        weight = site.weights[0]
        m, n = weight.out_features, weight.in_features
        counts = range(step, min(m, n) + 1, step)
        levels = [(k, max(1, round(k / ATOMS_PER_NONZERO))) for k in counts]
        if levels:
            k, s = levels[-1]
            levels += [(k, more) for more in range(s, k + 1, max(1, step // ATOMS_PER_NONZERO))][1:]
        costs = sorted((dictionary_storage(m, n, *level).parameters, level) for level in levels)
        return {level: cost for cost, level in costs if cost < m * n}

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        chosen = nearest_levels(self._ladder(site, grid.rank_multiple), grid, site.storage.parameters)
        return {
            keep: Option.of(self.name, atoms=atoms, nonzeros=nonzeros) for keep, (atoms, nonzeros) in chosen.items()
        }

    def level(self, option: Option) -> tuple[int, int]:
        """(atoms, nonzeros); raises `InputError` where they are not whole numbers with nonzeros ≤ atoms."""
        atoms, nonzeros = whole_level(option, "atoms"), whole_level(option, "nonzeros")
        if nonzeros > atoms:
            raise InputError(
                f"option {option.label!r} has {nonzeros=} of {atoms=}: no row can have more than there are"
            )
        return atoms, nonzeros

    def check(self, option: Option) -> None:
        self.level(option)

    def storage(self, site: Site, option: Option) -> Storage:
        return dictionary_storage(site.weights[0].out_features, site.weights[0].in_features, *self.level(option))

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: the atoms (k, n)."""
        return [(self.level(option)[0], site.weights[0].in_features)]

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        """``right`` (k, n), ``values`` (m, s) in fp32, ``support``, the level, and the error of just these.

        Supports and coefficients are found in fp32, where all the time goes, the atoms in fp64.
        """
        (weight,), (option,) = weights.values(), options
        atoms, nonzeros = self.level(option)
        if atoms > min(weight.shape):
            raise InputError(
                f"option {option.label!r} on a weight {tuple(weight.shape)}: atoms are at most its least size"
            )
        weighting = WHITENING.weigh(statistics["weight"])
        target = whitened(weight, weighting)
        if nonzeros == atoms:
            coefficients = target.basis[:, :atoms]
            mask = torch.ones_like(coefficients, dtype=torch.bool)
        else:
            coefficients, mask = self.solve(target, atoms, nonzeros)
        coefficients = (coefficients * mask).double()
        right = best_atoms(coefficients, weight.double())  # (k, n)
        sizes = [coefficients.norm(dim=0), right.norm(dim=1)]
        tiny = torch.finfo(torch.float32).tiny
        balance = (sizes[1].clamp_min(tiny) / sizes[0].clamp_min(tiny)).sqrt()  # a component's norm, half to each side
        values, right = gather_rows(coefficients * balance, mask).float(), (right / balance[:, None]).float()
        sparse = torch.zeros_like(coefficients).masked_scatter(mask, values.double())
        return {
            "right": right,
            "values": values,
            "support": pack_mask(mask),
            "level": torch.tensor([atoms, nonzeros]),
            **measured(weight, sparse @ right.double(), weighting),
        }

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        atoms, nonzeros = self.level(option)
        if prepared["level"].tolist() != [atoms, nonzeros]:
            raise InputError(
                f"{option.label!r} was asked of level {prepared['level'].tolist()}: rebuild the factor store"
            )
        tensors = {name: prepared[name] for name in ("right", "values", "support")}
        storage = dictionary_storage(len(tensors["values"]), tensors["right"].shape[1], atoms, nonzeros)
        return {"weight": Factors("dictionary", tensors, {"atoms": atoms, "nonzeros": nonzeros}, storage)}
