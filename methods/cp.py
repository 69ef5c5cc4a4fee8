"""CP of paired modes: sums of Kronecker chains, orthogonal terms refined by alternating least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._method import Option, Prepared, Site, register
from rankfront.methods._modes import Modes, even_terms, leading_basis, paired_modes
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, kronecker_storage
from rankfront.methods._tensor import TensorFormat, with_tensorly

MODES = 3
# On the normal equations of a tensor of norm 1: keeps terms that cancel each other from growing.
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-9}
PUBLISHED_SWEEPS = 100  # TensorLy's default [M]
SETTLED = 1e-8  # fall of the relative error in a sweep, below which sweeps end; TensorLy's default [M]
SEED = 0
STAYS = 1  # the mode whose factor the quick setting leaves as it starts
ORTHOGONAL, RANDOM = "orthogonal terms", "random factors"


def orthogonal_terms(tensor: Tensor, terms: int) -> list[Tensor]:
    """Factors (I_k, R) of the R largest of the orthogonal rank-one terms that nested SVDs split a tensor into.

    T = Σ_i u_i ⊗ M_i by an SVD of the first unfolding, M_i = Σ_j σ_ij v_ij ⊗ w_ij by one of each M_i, as in TTr1SVD
    (Batselier, Liu & Wong 2015 [M]). Terms are orthogonal, so keeping the largest is the best choice among them, and
    all of them are T. Zeros fill up to R.
    """
    first, second, third = tensor.shape
    left = leading_basis(tensor.reshape(first, -1), first)
    slices = (left.T @ tensor.reshape(first, -1)).reshape(first, second, third)
    flipped = second > third
    slices = slices.transpose(1, 2) if flipped else slices
    vectors = torch.linalg.eigh(slices @ slices.transpose(1, 2)).eigenvectors  # (I_1, I_2, I_2), the smaller side
    rows = vectors.transpose(1, 2) @ slices  # (I_1, I_2, I_3), orthogonal rows
    norms = rows.norm(dim=2).flatten()
    best = norms.argsort(descending=True, stable=True)[:terms]
    i, j = best // slices.shape[1], best % slices.shape[1]
    pair = [vectors[i, :, j].T, rows[i, j].T]
    found = [left[:, i], *(pair[::-1] if flipped else pair)]
    return [torch.nn.functional.pad(factor, (0, terms - len(best))) for factor in found]


def rebuilt(factors: Sequence[Tensor]) -> Tensor:
    """Σ_r ⊗_k of the columns r of factors (I_k, R)."""
    first, second, third = factors
    pairs = torch.einsum("jr,kr->rjk", second, third).flatten(1)
    return (first @ pairs).reshape(len(first), len(second), len(third))


@dataclass(frozen=True)
class CP(TensorFormat):
    """Ŵ = Σ_{r ≤ R} A_r ⊗ B_r ⊗ C_r with A_r (m_1, n_1), B_r (m_2, n_2), C_r (m_3, n_3): R Σ m_k n_k values.

    CP of W as a tensor of three paired modes I_k = m_k n_k; of two it would be `kronecker`. R exceeds every I_k by far
    where it stores a fair share of W, so `orthogonal_terms` are the start: closed form, falling with R, all of W at
    the end. From there ``sweeps`` of ALS in fp32 by TensorLy's `parafac` (MTTKRP against an explicit Khatri-Rao
    product: one large product, which is as fast as it gets) over the first and the last mode, with a ridge against
    terms that grow while they cancel each other; kept only where they fit better. The second mode would take as long as
    each of the others and gain little: on a query projection of SmolLM2-135M at keep 0.6 the start left 0.41 of the
    energy, the sweep 0.31, with the second mode 0.29. Each term's norm is shared equally between its factors.

    `cp-published` is the same solver as it is usually run: random start, fp64, many sweeps until nothing moves
    (Kolda & Bader 2009, Section 3.4): at 0.6 of a 576x576 weight 19 s of one core against 0.3 s, at 0.6 of a 1536x576
    one 124 s against 1.3 s, some 14 core hours for four levels of each weight of a 135M model. It leaves a third of the
    default's error at 0.6. The metric of both is the identity, for S⁻¹ cannot be folded into the factors. A local
    optimum: more terms may fit worse.
    """

    name: str
    sweeps: int
    start: str
    paper: str = "Kolda & Bader 2009"
    family: str = "tensor-product subspaces"
    geometry: str = "a sum of chains of small matrices, one direction of every mode each"
    metric: str = "identity"
    needs: tuple[str, ...] = ()
    kind = "cp"

    @property
    def formula(self) -> str:
        return f"Ŵ = Σ_r A_r ⊗ B_r ⊗ C_r, {self.sweeps} sweeps of ALS from {self.start}"

    def cost(self, m: int, n: int, level: int) -> Storage:
        modes = paired_modes(m, n, MODES)
        return kronecker_storage(modes.rows, modes.columns, level)

    def full(self, m: int, n: int) -> int:
        first, second, third = paired_modes(m, n, MODES).pairs
        return first * min(second, third)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        weight, terms = weights["weight"], self.kept(options[0])
        modes = paired_modes(*weight.shape, MODES)
        tensor = modes.tensor(weight)
        closed = even_terms(orthogonal_terms(tensor, terms))
        scale = tensor.norm()
        if scale == 0:
            return self.fitted(weight, stored_terms(closed, modes))
        unit = scale ** (1 / MODES)
        found = self.refined(tensor / scale, [factor / unit for factor in closed])
        prepared = self.fitted(weight, stored_terms([factor * unit for factor in found], modes))
        tail = scale**2 - torch.stack([factor.norm(dim=0) for factor in closed]).prod(0).square().sum()
        if self.start == ORTHOGONAL and prepared["error"] > tail:
            return self.fitted(weight, stored_terms(closed, modes))
        return prepared

    def refined(self, tensor: Tensor, closed: Sequence[Tensor]) -> list[Tensor]:
        """Factors (I_k, R) of a tensor of norm 1 after ``sweeps`` of ALS from ``start``."""
        terms = closed[0].shape[1]
        if self.start == RANDOM:
            settings = {"init": "random", "random_state": SEED, "tol": SETTLED, "l2_reg": RIDGE[torch.float64]}
        else:
            factors = [factor.float() for factor in closed]
            settings = {"init": (torch.ones(terms), factors), "tol": 0, "l2_reg": RIDGE[torch.float32]}
            settings["fixed_modes"] = [STAYS]
            tensor = tensor.float()
        _, found = with_tensorly("parafac", tensor, terms, n_iter_max=self.sweeps, **settings)
        return [factor.double() for factor in found]


def stored_terms(factors: Sequence[Tensor], modes: Modes) -> dict[str, Tensor]:
    """The layer's tensors (R, m_k, n_k) of factors (I_k, R)."""
    sizes = zip(("first", "second", "third"), even_terms(factors), modes.rows, modes.columns, strict=True)
    return {name: factor.T.unflatten(1, (m, n)) for name, factor, m, n in sizes}


register(CP("cp", 1, ORTHOGONAL))
register(CP("cp-published", PUBLISHED_SWEEPS, RANDOM))
