"""``nystrom``: a smaller MLP, its neurons selected, the down projection corrected by the Nyström approximation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankfront.methods._algebra import lower_root, regularise
from rankfront.methods._method import (
    Factors,
    Grid,
    Option,
    Prepared,
    Site,
    plain_factors,
    register,
    stepped,
)
from rankfront.methods._nested import Nested
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage

ROLES = (("gate", "up", "down"), ("up", "down"))
RIDGE = 1.0  # λ of the leverage scores, in mean eigenvalues of C [M]: the paper leaves it open
DAMPING = 1e-6  # of the mean diagonal, on C where it is inverted


class Nystrom(Nested):
    """Keeps k neurons J of an MLP and lets the down projection make up for the others.

    With C (n, n) the Gram of the down projection's inputs, J are the k largest ridge leverage scores, the diagonal of
    C (C + λ I)⁻¹, and Ŵ_down = W_down C_{:J} C_JJ⁻¹, the least squares prediction of the dense output from the kept
    neurons. Gate and up keep the rows J: what is left is a dense MLP, smaller, without any factors.

    Nested: with C_ordered = L Lᵀ in the order of the scores, Ŵ_down at k is A_{:,:k} R_{:k,:k} for A = W_down L and
    R = L⁻¹, and its squared error ‖(W_down − Ŵ) C^{1/2}‖² is what the other columns of A hold.

    Source: MoDeGPT (2408.09632), Algorithm 1 and Theorem 1, from its code and re-runs, not its tables [M].
    """

    name = "nystrom"
    paper = "MoDeGPT, 2408.09632"
    family = "nested and selected coordinates"
    geometry = "k of the MLP's neurons, the others predicted from them"
    metric = "whitening"
    formula = "W_down C_:J C_JJ⁻¹, gate_J, up_J; J of largest diag C(C + λI)⁻¹"
    needs = ("gram",)
    level = "neurons"

    def refuses(self, site: Site) -> str | None:
        if site.roles not in ROLES:
            return "it treats an MLP's gate, up and down projections together"
        return None

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        counts = stepped(grid, site.anchor.in_features, grid.rank_multiple)
        return {keep: Option.of(self.name, neurons=count) for keep, count in counts.items()}

    def storage(self, site: Site, option: Option) -> Storage:
        """k rows of gate and up, k columns of down; biases of neurons that go are saved too."""
        kept, down = self.kept(option), site.anchor
        biases = sum(weight.bias for weight in site.weights[:-1])
        others = sum(weight.in_features for weight in site.weights[:-1])
        return Storage(kept * (others + down.out_features) - biases * (down.in_features - kept))

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: gate and up (k, N), down (N, k)."""
        kept, down = self.kept(option), site.anchor
        return [*((kept, weight.in_features) for weight in site.weights[:-1]), (down.out_features, kept)]

    def reads(self, site: Site, prepared: Prepared, option: Option, role: str, gram: Tensor) -> Tensor:
        """The Gram of what the projection of ``role`` reads: of neurons, those that are left."""
        kept = prepared["order"][: self.kept(option)]
        return gram[kept][:, kept] if role == "down" else gram

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        gram = collected(statistics["down"].gram, "gram").raw.double()  # (n, n)
        scale = gram.diagonal().mean()
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        ridge = torch.where(scale > 0, RIDGE * scale, torch.ones_like(scale))
        # diag C(C + λI)⁻¹ = 1 − λ diag (C + λI)⁻¹
        inverse = torch.cholesky_inverse(lower_root(gram, ridge))
        order = (1 - ridge * inverse.diagonal()).argsort(descending=True, stable=True)
        ordered = regularise(gram)[order][:, order]
        lower = lower_root(ordered, DAMPING * ordered.diagonal().mean())
        ahead = weights["down"].double()[:, order] @ lower  # A (N, n)
        prepared = {
            "ahead": ahead,
            "back": torch.linalg.solve_triangular(lower, identity, upper=False),  # R (n, n)
            "order": order,
            "energy": ahead.square().sum(0).float(),
        }
        for role in site.roles[:-1]:
            prepared[role] = weights[role][order].float()
            if f"{role}.bias" in weights:
                prepared[f"{role}.bias"] = weights[f"{role}.bias"][order].float()
        return prepared

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        kept = self.kept(option)
        down = self._down(prepared, kept)
        found = {}
        for role in ("gate", "up"):
            if role in prepared:
                rows = prepared[role][:kept]
                bias = prepared[f"{role}.bias"][:kept] if f"{role}.bias" in prepared else None
                found[role] = plain_factors(rows, Storage(rows.numel()), bias)
        return found | {"down": plain_factors(down, Storage(down.numel()))}

    @staticmethod
    def _down(prepared: Prepared, kept: int) -> Tensor:
        """Ŵ_down (N, k)."""
        return prepared["ahead"][:, :kept] @ prepared["back"][:kept, :kept]

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ("down",)

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        kept = self.kept(option)
        down = self._down(prepared, kept)
        whole = down.new_zeros(len(down), site.anchor.in_features)
        whole[:, prepared["order"][:kept]] = down
        return plain_factors(whole, site.anchor.storage)

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        largest = max(map(self.kept, options))
        order, ahead, back = (prepared[name].to(g.device) for name in ("order", "ahead", "back"))
        components = (g.float() @ ahead[:, :largest]) * (x.float()[:, order[:largest]] @ back[:largest, :largest].T)
        return self.running(components, options)  # R is triangular, so k components read k neurons


register(Nystrom())
