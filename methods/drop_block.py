"""``drop-block``: an attention or an MLP left out entirely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, plain_factors, register
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage
from rankfront.methods.nystrom import ROLES as NEURONS

ROLES = (("query", "key", "value", "output"), *NEURONS)


class DropBlock:
    """ŷ = 0: the residual stream passes an attention or an MLP by, biases and all.

    One option, at the smallest kept fraction of the study. Its error is ‖W C^{1/2}‖² of the projection that writes to
    the stream, C the Gram of its inputs: all of what it adds. Source: layer dropping as the lowest level of depth
    pruning, e.g. ShortGPT (2403.03853) and EvoPress (2410.14649), here by attention and by MLP.
    """

    name = "drop-block"
    paper = "EvoPress, 2410.14649"
    family = "nested and selected coordinates"
    geometry = "no coordinates at all of one attention or MLP"
    metric = "whitening"
    formula = "ŷ = 0 for a whole attention or MLP"
    needs = ("gram",)
    nested = True
    version = 1

    def refuses(self, site: Site) -> str | None:
        return None if site.roles in ROLES else "it leaves out a whole attention or MLP"

    def check(self, option: Option) -> None:
        """It has no level."""

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        return {} if self.refuses(site) else {min(grid.keep): Option.of(self.name)}

    def storage(self, site: Site, option: Option) -> Storage:
        """Nothing; the biases, which dense storage does not count, are saved on top."""
        return Storage(-sum(weight.out_features for weight in site.weights if weight.bias))

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        anchor = site.anchor.role
        gram = collected(statistics[anchor].gram, "gram")
        whole = gram.sandwich(weights[anchor].double()).trace()
        rows = torch.tensor([len(weights[role]) for role in site.roles])
        bias = weights.get(f"{anchor}.bias", torch.zeros(1))
        return {"rows": rows, "energy": whole[None].float(), "bias": bias.float()}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        rows = prepared["rows"].tolist()
        roles = next(roles for roles in ROLES if len(roles) == len(rows))
        return {
            role: Factors("absent", {}, {"rows": count}, Storage(0)) for role, count in zip(roles, rows, strict=True)
        }

    def error(self, prepared: Prepared, option: Option) -> float:
        return float(prepared["energy"].double().sum())

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ()

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        zeros = torch.zeros(site.anchor.out_features, site.anchor.in_features)
        return plain_factors(zeros, site.anchor.storage, zeros[:, 0] if site.anchor.bias else None)

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        gone = -(g.float() * prepared["bias"].to(g.device)).sum(1)
        return {option.label: gone for option in options}


register(DropBlock())
