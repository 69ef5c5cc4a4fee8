"""``expert-prune``: experts of a mixture left out, tokens routed among those that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
from rankfront.methods._scatter import packed_columns
from rankfront.methods._sizes import row_support_bits
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage

ROUTER = "router"  # role of the first weight of its sites; the others are called by expert and projection, `3.down`


class ExpertPrune(Nested):
    """Keeps K of the E experts of a layer, those of largest

        s_j = √( (1/n_j) Σ_t w_tj² ‖f_j(x_t)‖² ),

    over the n_j tokens that expert j is given, w_tj the router's weight and f_j without its last bias. The router keeps
    the rows of these, and so routes every token among them; at most K experts are chosen for a token.

    Its error is what the others add, Σ_j Σ_t w_tj² ‖f_j(x_t)‖², as if nothing were routed anew. Nothing is trained.
    Source: REAP (2510.13999), equation of its saliency, there the mean of w_tj ‖f_j(x_t)‖ rather than the root of the
    mean of its square, which follows from the Gram of the down projection's inputs.
    """

    name = "expert-prune"
    paper = "REAP, 2510.13999"
    family = "nested and selected coordinates"
    geometry = "k of a layer's experts, tokens routed among them"
    metric = "whitening"
    formula = "the K experts of largest √(mean_t w_t² ‖f(x_t)‖²)"
    needs = ("gram",)
    level = "experts"

    def refuses(self, site: Site) -> str | None:
        return None if site.roles[0] == ROUTER else "it leaves out some of a layer's experts"

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        count, chosen = site.weights[0].out_features, round(site.anchor.share * site.weights[0].out_features)
        kept = {keep: max(each, chosen) for keep, each in stepped(grid, count, 1).items()}
        return {keep: Option.of(self.name, experts=each) for keep, each in kept.items() if each < count}

    def storage(self, site: Site, option: Option) -> Storage:
        """K rows of the router, K experts, and which they are; the biases of the others are saved too."""
        kept, router = self.kept(option), site.weights[0]
        gone = router.out_features - kept
        expert = [weight for weight in site.weights if weight.role.startswith("0.")]
        biases = gone * (int(router.bias) + sum(weight.biases.values for weight in expert))
        values = kept * (router.in_features + sum(weight.storage.values for weight in expert)) - biases
        return Storage(values, index_bits=row_support_bits(1, router.out_features, kept))

    def active(self, site: Site, option: Option) -> float:
        """Stored values that one token reads: the router's rows, and as many experts as before."""
        experts = sum(weight.share * weight.storage.parameters for weight in site.weights[1:])
        return self.kept(option) * site.weights[0].in_features + experts

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        added, found = [], {}
        for number in range(site.weights[0].out_features):
            role = f"{number}.down"
            whole = collected(statistics[role].gram, "gram").sandwich(weights[role].double()).trace()
            added.append((whole, whole / max(statistics[role].tokens, 1)))
            found[role] = weights[role].float()
            if f"{role}.bias" in weights:
                found[f"{role}.bias"] = weights[f"{role}.bias"].float()
        whole, each = (torch.stack(column) for column in zip(*added, strict=True))
        order = each.argsort(descending=True, stable=True)
        rows = [weight.out_features for weight in site.weights if weight.role.startswith("0.")]
        router = {name: weights[name].double() for name in (ROUTER, f"{ROUTER}.bias") if name in weights}
        return {**found, **router, "order": order, "energy": whole[order], "rows": torch.tensor(rows)}

    def _dropped(self, prepared: Prepared, option: Option) -> set[int]:
        return set(prepared["order"][self.kept(option) :].tolist())

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        kept = prepared["order"][: self.kept(option)].sort().values
        rows, weight = prepared["rows"].tolist(), prepared[ROUTER]
        tensors = {"weight": weight[kept], "support": packed_columns(kept[None], len(weight))}
        if f"{ROUTER}.bias" in prepared:
            tensors["bias"] = prepared[f"{ROUTER}.bias"][kept]
        bits = row_support_bits(1, len(weight), len(kept))
        storage = Storage(tensors["weight"].numel(), index_bits=bits)
        found = {ROUTER: Factors("router", tensors, {"experts": len(kept)}, storage)}
        names = ("gate", "up", "down")[-len(rows) :]
        for number in sorted(self._dropped(prepared, option)):
            for name, count in zip(names, rows, strict=True):
                found[f"{number}.{name}"] = Factors("absent", {}, {"rows": count}, Storage(0))
        return found

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        role = site.anchor.role
        gone = int(role.partition(".")[0]) in self._dropped(prepared, option)
        weight, bias = prepared[role], prepared.get(f"{role}.bias")
        if gone:
            weight, bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        return plain_factors(weight, site.anchor.storage, bias)

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        role = site.anchor.role
        dense = ((g.float() @ prepared[role].to(g.device).float()) * x.float()).sum(1)
        bias = prepared.get(f"{role}.bias")
        gone = torch.zeros_like(dense) if bias is None else -(g.float() @ bias.to(g.device).float())
        number = int(role.partition(".")[0])
        return {option.label: gone if number in self._dropped(prepared, option) else dense for option in options}


register(ExpertPrune())
