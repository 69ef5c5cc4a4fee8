"""``shared-basis``, ``hola``, ``hola-experts``: several weights in one subspace, with coefficients of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, Weight, register, whole_level
from rankfront.methods._metric import WHITENING
from rankfront.methods._nested import Nested
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage
from rankfront.methods._weighting import Gram


@dataclass(frozen=True)
class SharedBasis(Nested):
    """Ŵ_i = L_i B for G weights W_i (m_i, n): one basis B (r, n), coefficients L_i (m_i, r).

    The stack W = [W_1; ...; W_G] is approximated as one matrix, the rank-r minimiser of ‖(W − Ŵ) C^{1/2}‖_F with C the
    sum of the Grams of the inputs: r(Σ m_i + n) values, where factoring them one by one stores r(Σ m_i + G n). Nested.

    As ``shared-basis`` the weights are the same projection of G adjacent blocks, those that read the residual stream.
    Source: Basis Sharing (2410.03765), which takes them for query, key, value, gate and up, with G = 2 [M]; its
    refit of the coefficients on compressed activations is not part of this.

    As ``hola`` they are the projections of one block that read the same input, every row a class: F ≈ W_t B with
    class-shared basis B and adaptable weights W_t per class. Source: HOLa (2507.15542), a vision method; its
    decomposition is an uncentred one here with the scale kept (the released initialisation normalises the basis and
    drops it), its training losses are not part of this.

    As ``hola-experts`` they are one projection of all experts of a layer, gates or ups, which read the residual stream:
    their rows are the classes. Each expert's inputs count as often as the router gives it tokens, by its weights.
    """

    name: str
    paper: str
    wanted: str
    geometry: str
    claims: Callable[[Site], bool]
    family: str = "shared subspace"
    metric: str = "whitening"
    level = "rank"
    needs = ("gram",)

    @property
    def formula(self) -> str:
        return "Ŵ_i = L_i B: [W_1; ...; W_G] ≈ U_r U_rᵀ [W_1; ...; W_G], S Sᵀ = Σ_i C_i"

    @property
    def _core(self) -> LowRank:
        return LowRank(self.name, self.paper, WHITENING)

    def refuses(self, site: Site) -> str | None:
        if not site.separate or not self.claims(site):
            return f"it treats {self.wanted} together"
        return self._core.refuses(_stacked(site))

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        return {} if self.refuses(site) else self._core.options(_stacked(site), grid)

    def storage(self, site: Site, option: Option) -> Storage:
        """r(Σ m_i + n) values."""
        return self._core.storage(_stacked(site), option)

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        stack = torch.cat([weights[role] for role in site.roles])
        grams = {id(gram): gram for role in site.roles for gram in [collected(statistics[role].gram, "gram")]}
        distinct = list(grams.values())
        gram = distinct[0] if len(distinct) == 1 else Gram(torch.stack([one.raw for one in distinct]).sum(0))
        tokens = statistics[site.roles[0]].tokens
        prepared = self._core.prepare(
            _stacked(site), {"weight": stack}, {"weight": Statistics(tokens, gram=gram)}, options
        )
        return prepared | {f"rows.{weight.role}": _span(site, weight.role) for weight in site.weights}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        whole = self._core.truncate(prepared, option)["weight"]
        left, basis = whole.tensors["left"], whole.tensors["right"]
        found = {}
        for role in (name.removeprefix("rows.") for name in prepared if name.startswith("rows.")):
            first, last = prepared[f"rows.{role}"].tolist()
            values = left[first:last].numel() + (basis.numel() if first == 0 else 0)
            found[role] = Factors(
                "low-rank", {"left": left[first:last], "right": basis}, whole.settings, Storage(values)
            )
        return found

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        """Siblings read one input; blocks that share a basis read several, of which one comes after the other, and
        experts each their own."""
        return () if site.roles[0].isdigit() or site.roles[0].startswith(EXPERT) else site.roles

    def active(self, site: Site, option: Option) -> float:
        """Stored values that one token reads: the basis, and the coefficients of the experts that it is given to."""
        basis = whole_level(option, self.level) * site.anchor.in_features
        return basis + site.anchor.share * (self.storage(site, option).parameters - basis)

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        return self.truncate(prepared, option)[site.anchor.role]

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        first, last = prepared[f"rows.{site.anchor.role}"].tolist()
        own = prepared | {"left": prepared["left"][:, first:last]}
        return self._core.gradient_dot_outputs(site, own, options, g, x)


def _stacked(site: Site) -> Site:
    """The weights of ``site`` as one, one above the other."""
    rows = sum(weight.out_features for weight in site.weights)
    return Site(site.name, (Weight("weight", site.name, rows, site.anchor.in_features),))


def _span(site: Site, role: str) -> Tensor:
    """Where the rows of ``role`` begin and end in the stack, (2,)."""
    before = 0
    for weight in site.weights:
        if weight.role == role:
            break
        before += weight.out_features
    return torch.tensor([before, before + weight.out_features])


def _adjacent(count: int) -> Callable[[Site], bool]:
    return lambda site: site.roles == tuple(map(str, range(count)))


EXPERT = "expert"  # roles of a layer's experts are this and their number
SIBLINGS = (("query", "key", "value"), ("gate", "up"))

for _count in (2, 3, 4):
    register(
        SharedBasis(
            "shared-basis" if _count == 2 else f"shared-basis-{_count}",
            "Basis Sharing, 2410.03765",
            f"the same projection of {_count} adjacent blocks",
            f"inputs of the same projection of {_count} blocks read through one basis",
            _adjacent(_count),
        )
    )
register(
    SharedBasis(
        "hola",
        "HOLa, 2507.15542",
        "the projections of a block that read the same input",
        "rows of sibling projections as classes with one basis in common",
        lambda site: site.roles in SIBLINGS,
    )
)
register(
    SharedBasis(
        "hola-experts",
        "HOLa, 2507.15542",
        "one projection of all experts of a layer",
        "rows of one projection of all experts as classes with one basis in common",
        lambda site: site.roles[0] == f"{EXPERT}0",
    )
)
