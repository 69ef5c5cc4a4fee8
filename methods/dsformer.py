"""DSFormer: every block of inputs has a small dense basis, every row a few coefficients in it.

    minimise ‖(W − [Z_1 D_1, ..., Z_B D_B]) C^{1/2}‖_F, C = Σ_t x_t x_tᵀ

over D_b (k, n_b), dense, and Z_b (m, k), which has N nonzeros in each row's every M atoms: M = k is a fixed count a
row, M = 4 the N:4 patterns of hardware. Blocks are n_b adjacent inputs, B = ⌈n / n_b⌉.

Blocks are fitted in turn. With E the error of all others and R_b² = C_bb, what block b has to come near is
X_b = (W_b + (E C)_b C_bb⁻¹) R_b, in which the rest is plain: pursuit of X_b in the atoms D_b R_b for the support, then
least squares for D_b and for the values. The first sweep takes unvisited blocks for exact, so that each makes good
what those before it have lost.

Source: DSFormer (2312.13211), abstract: products of a small dense and a semi-structured sparse matrix by block. What
its text says beyond that is not verified [M]; blocks along the inputs, the fit and the defaults are ours. Its training
through the supports is `heal.arms.StraightThrough`. A fit is a local optimum. At
kept fractions of 0.2 to 0.8 it takes 0.2 to 3 s of one core for a weight of SmolLM2-135M at one level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rankfront.methods._algebra import eigh_descending, fix_signs, root_and_inverse
from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured
from rankfront.methods._group_pursuit import coded, pursued
from rankfront.methods._low_rank import balanced
from rankfront.methods._method import (
    Factors,
    Grid,
    Option,
    Prepared,
    Site,
    nearest_levels,
    not_one_linear,
    register,
    whole_level,
)
from rankfront.methods._metric import WHITENING
from rankfront.methods._scatter import dense_of, packed_columns
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, block_dictionary_storage
from rankfront.methods._weighting import Gram

SWEEPS = 1  # a second takes as long again and leaves a quarter less: 0.018 for 0.024 of a query's energy at keep 0.6
RIDGE = 1e-9  # of the mean squared norm of an atom's coefficients; one that no row uses stays what it was
LEVELS = ("atoms", "group", "nonzeros", "block")


@dataclass(frozen=True)
class DSFormer(Fitted):
    """Ŵ_b = Z_b D_b, a level its ``atoms`` k, ``group`` M, ``nonzeros`` N of each group and ``block`` n_b.

    Attributes:
        block: n_b that is offered, of narrower weights their own width.
        group: M that is offered; 0 for M = k.
        thinness: atoms for each nonzero, from and to, that are offered.
    """

    name: str
    block: int
    group: int
    thinness: tuple[float, float]
    paper = "2312.13211"
    family = "union of subspaces"
    geometry = "in every block of inputs a row picks few atoms of a small basis, weighed by the outputs on real inputs"
    metric = WHITENING.name
    formula = "Ŵ_b = Z_b D_b by block, Z_b semi-structured sparse, least ‖(W − Ŵ) C^{1/2}‖_F by sweeps over blocks"
    needs = WHITENING.needs

    def refuses(self, site: Site) -> str | None:
        reason, weight = not_one_linear(site, self.needs), site.anchor
        if reason or self._offered(weight.out_features, weight.in_features, self.group or 1, least=True):
            return reason
        return "the smallest basis and coefficients store no less than the dense weight"

    def check(self, option: Option) -> None:
        atoms, group, nonzeros, _ = (whole_level(option, name) for name in LEVELS)
        if atoms % group or nonzeros > group:
            raise InputError(f"option {option.label!r} needs groups that divide the atoms and hold the nonzeros")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        step = math.lcm(grid.rank_multiple, self.group or 1)
        offered = self._offered(site.anchor.out_features, site.anchor.in_features, step)
        return nearest_levels(offered, grid, site.storage.parameters)

    @cache  # noqa: B019 - there are as many methods as files, and most sites have shapes in common
    def _offered(self, m: int, n: int, step: int, least: bool = False) -> dict[Option, int]:
        """Every option below dense for a weight (m, n), atoms in multiples of ``step`` -> its parameters; only that of
        the ``least`` atoms and nonzeros if so asked."""
        found = {}
        block = min(self.block, n)
        for atoms in range(step, step + 1 if least else 2 * m, step):
            group = self.group or atoms
            sparsest, densest = (max(1, round(group / thinness)) for thinness in reversed(self.thinness))
            for nonzeros in range(sparsest, (sparsest if least else densest) + 1):
                cost = block_dictionary_storage(m, n, atoms, group, nonzeros, block).parameters
                if cost >= m * n:  # it rises with both
                    break
                found[Option.of(self.name, atoms=atoms, group=group, nonzeros=nonzeros, block=block)] = cost
        return found

    def storage(self, site: Site, option: Option) -> Storage:
        weight = site.weights[0]
        level = {name: whole_level(option, name) for name in LEVELS}
        return block_dictionary_storage(weight.out_features, weight.in_features, **level)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (option,), weight = options, weights["weight"].double()
        atoms, group, nonzeros, block = (whole_level(option, name) for name in LEVELS)
        gram = collected(statistics["weight"].gram, "gram")
        fits = swept(weight, gram, atoms, group, nonzeros, block)
        basis = torch.cat([fit.basis for fit in fits], 1).float()  # (k, n)
        values = torch.cat([fit.values for fit in fits], 1).float()  # (m, B s)
        columns = torch.stack([fit.columns for fit in fits], 1)  # (m, B, s)
        approximation = [
            dense_of(part.double(), fit.columns, atoms) @ rows.double()
            for fit, part, rows in zip(fits, values.split(columns.shape[2], 1), basis.split(block, 1), strict=True)
        ]
        support = packed_columns((columns % group).view(-1, nonzeros), group)
        found = {"basis": basis, "values": values, "support": support}
        return found | measured(weight, torch.cat(approximation, 1), gram)

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        settings = {name: whole_level(option, name) for name in LEVELS}
        tensors = {name: prepared[name] for name in ("basis", "values", "support")}
        storage = block_dictionary_storage(len(tensors["values"]), tensors["basis"].shape[1], **settings)
        return {"weight": Factors("block-dictionary", tensors, settings, storage)}


@dataclass
class _Fit:
    """One block: D_b (k, n_b), and the values (m, s) and columns (m, s) of Z_b."""

    basis: Tensor
    values: Tensor
    columns: Tensor

    def product(self) -> Tensor:
        """Z_b D_b, (m, n_b)."""
        return dense_of(self.values, self.columns, len(self.basis)) @ self.basis


def swept(
    weight: Tensor, gram: Gram, atoms: int, group: int, nonzeros: int, block: int, sweeps: int = SWEEPS
) -> list[_Fit]:
    """The blocks of W (m, n) in fp64, fitted in turn; ``sweeps`` times, each from what the one before has found."""
    inputs, lost = gram.matrix, torch.zeros_like(weight)  # C, and E C for E = W − Ŵ, which begins at zero
    parts = torch.arange(weight.shape[1], device=weight.device).split(block)
    spans = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    roots = [root_and_inverse(inputs[span, span]) for span in spans]
    approximation, fits = weight.clone(), [_Fit(weight, weight, weight)] * len(spans)
    for sweep in range(sweeps):
        for place, (span, (root, inverse)) in enumerate(zip(spans, roots, strict=True)):
            wanted = approximation[:, span] @ root + lost[:, span] @ inverse  # (m, n_b) X_b
            basis = fits[place].basis @ root if sweep else first_basis(wanted, atoms)
            fit = improved(wanted, basis, group, nonzeros)
            fit.basis = fit.basis @ inverse
            change = approximation[:, span] - fit.product()
            lost += change @ inputs[span]
            approximation[:, span] -= change
            fits[place] = fit
    return [_shared(fit) for fit in fits]


def first_basis(wanted: Tensor, atoms: int) -> Tensor:
    """(k, n_b): the principal directions of X (m, n_b), and where k is larger, rows of X spread over it."""
    directions = fix_signs(eigh_descending(wanted.T @ wanted)[1]).T
    if atoms <= len(directions):
        return directions[:atoms]
    missing = atoms - len(directions)
    rows = wanted[torch.linspace(0, len(wanted) - 1, missing, device=wanted.device).long()]
    norms = rows.norm(dim=1, keepdim=True)
    return torch.cat([directions, torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(norms.dtype).tiny), rows)])


def improved(wanted: Tensor, basis: Tensor, group: int, nonzeros: int) -> _Fit:
    """Support by pursuit of X (m, n_b) in ``basis`` (k, n_b), then least squares for the basis and for the values."""
    columns = pursued(wanted @ basis.T, basis @ basis.T, group, nonzeros)
    first = coded((wanted @ basis.T).float(), (basis @ basis.T).float(), columns).to(basis.dtype)  # for the basis alone
    codes = dense_of(first, columns, len(basis))  # (m, k)
    squares = codes.T @ codes
    ridge = RIDGE * squares.diagonal().mean() + torch.finfo(squares.dtype).tiny
    squares.diagonal().add_(ridge)
    basis = torch.linalg.solve(squares, codes.T @ wanted + ridge * basis)
    return _Fit(basis, coded(wanted @ basis.T, basis @ basis.T, columns), columns)


def _shared(fit: _Fit) -> _Fit:
    """The same product, the norm of each atom shared between its coefficients and itself."""
    codes, basis = balanced(dense_of(fit.values, fit.columns, len(fit.basis)), fit.basis)
    return _Fit(basis, codes.gather(1, fit.columns), fit.columns)


register(DSFormer(name="dsformer", block=32, group=0, thinness=(2.5, 3.5)))
register(DSFormer(name="dsformer-nm", block=32, group=4, thinness=(2.0, 4.0)))
