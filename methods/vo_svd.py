"""``vo-svd``: fewer dimensions in each head's values, value and output projection factored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankfront.methods._algebra import eigh_descending, fix_signs
from rankfront.methods._heads import by_query, heads_of, width_step
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
from rankfront.methods.layers_joint import CACHED

ROLES = ("value", "output")


class ValueOutput(Nested):
    """Keeps ρ of the d dimensions of each head's values, in the basis in which fewer lose least.

    Of key-value head g with values W_v (d, n) and the stacked output columns W_o (q N, d) of the q query heads that
    share it, the product matters alone: W_o P_ρ P_ρ⁺ W_v, the rank-ρ minimiser of ‖(W_o W_v − Ŵ) C^{1/2}‖_F, C the Gram
    of the values' inputs. With W_o = Q R it is Q U_ρ U_ρᵀ R W_v, where U are eigenvectors of R W_v C W_vᵀ Rᵀ: both
    projections stay dense, thinner by d − ρ a head, and so does the cache of values.

    Nested. Biases of the values follow their basis. Source: MoDeGPT (2408.09632), Type III modules; its joint SVD of
    C^{1/2} W_v W_o per head, over groups of query heads as a stack.
    """

    name = "vo-svd"
    paper = "MoDeGPT, 2408.09632"
    family = "weighted subspace"
    geometry = "each head's values in the subspace that loses least of what the head writes"
    metric = "whitening"
    formula = "W_o W_v ≈ Q U_ρ · U_ρᵀ R W_v by head, W_o = Q R, U of R W_v C W_vᵀ Rᵀ"
    needs = ("gram",)
    level = "width"

    def refuses(self, site: Site) -> str | None:
        if site.roles != ROLES or site.heads is None:
            return "it treats an attention's value and output projections together"
        return None

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        widths = stepped(grid, heads_of(site).width, width_step(site, grid))
        return {keep: Option.of(self.name, width=width) for keep, width in widths.items()}

    def storage(self, site: Site, option: Option) -> Storage:
        """ρ rows of each value head, ρ columns of each query head; biases of dimensions that go are saved too."""
        heads, kept = heads_of(site), self.kept(option)
        value, output = site.weights
        stored = kept * (heads.keys * value.in_features + heads.queries * output.out_features)
        return Storage(stored - value.bias * heads.keys * (heads.width - kept))

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: value (keys · ρ, n) and output (N, queries · ρ)."""
        heads, kept = heads_of(site), self.kept(option)
        value, output = site.weights
        return [(heads.keys * kept, value.in_features), (output.out_features, heads.queries * kept)]

    def reads(self, site: Site, prepared: Prepared, option: Option, role: str, gram: Tensor) -> Tensor:
        """The Gram of what the projection of ``role`` reads: of heads, the dimensions that are left."""
        if role == "value":
            return gram
        basis = by_query(heads_of(site), prepared["basis"][: self.kept(option)]).double()  # (ρ, queries, d)
        thin = torch.block_diag(*basis.movedim(1, 0))  # (queries · ρ, queries · d)
        found: Tensor = thin @ gram.double() @ thin.T
        return found

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        heads = heads_of(site)
        gram = collected(statistics["value"].gram, "gram")
        shared = heads.queries // heads.keys
        values = weights["value"].double().unflatten(0, (heads.keys, heads.width))  # (keys, d, n)
        outputs = weights["output"].double().unflatten(1, (heads.keys, shared, heads.width))  # (N, keys, q, d)
        bias = weights.get("value.bias")
        value, output, basis, energy, biases = [], [], [], [], []
        for head in range(heads.keys):
            stack = outputs[:, head].permute(1, 0, 2).flatten(0, 1)  # (q N, d)
            orthonormal, upper = torch.linalg.qr(stack)
            squares, vectors = eigh_descending(gram.sandwich(upper @ values[head]))
            vectors = fix_signs(vectors)
            coordinates = vectors.T @ upper  # Uᵀ R (d, d), from value dimensions to components
            thin = coordinates @ values[head]  # (d, n)
            tiny = torch.finfo(torch.float32).tiny
            balance = thin.norm(dim=1).clamp_min(tiny).sqrt()  # shared between both sides, as in narrow formats it must
            value.append(thin / balance[:, None])
            basis.append(coordinates / balance[:, None])
            wide = (orthonormal @ vectors) * balance  # (q N, d)
            output.append(wide.unflatten(0, (shared, -1)).permute(2, 1, 0))  # (d, N, q)
            energy.append(squares)
            if bias is not None:
                biases.append(basis[-1] @ bias.double().unflatten(0, (heads.keys, heads.width))[head])
        prepared = {
            "value": torch.stack(value, dim=1).float(),  # (d, keys, n), component by component
            "output": torch.cat(output, dim=2).float(),  # (d, N, queries)
            "basis": torch.stack(basis, dim=1),  # (d, keys, d)
            "energy": torch.stack(energy).sum(0).float(),
        }
        if biases:
            prepared["value.bias"] = torch.stack(biases, dim=1)
        return prepared

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        kept = self.kept(option)
        value, output = prepared["value"][:kept], prepared["output"][:kept]
        width, keys, _ = prepared["value"].shape
        tensors = {"weight": value.transpose(0, 1).flatten(0, 1)}
        if "value.bias" in prepared:
            tensors["bias"] = prepared["value.bias"][:kept].T.flatten()
        sizes = {"heads": keys, "kept": kept, "width": width}
        cached = sizes | {"placed": 0, "cached": CACHED["value"]}
        wide = output.permute(1, 2, 0).flatten(1)  # (N, queries · ρ)
        return {
            "value": Factors("heads", tensors, cached, Storage(value.numel())),
            "output": Factors(
                "from-heads", {"weight": wide}, sizes | {"heads": output.shape[2]}, Storage(output.numel())
            ),
        }

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ("value",)

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        heads, kept = heads_of(site), self.kept(option)
        basis = by_query(heads, prepared["basis"][:kept])  # (ρ, queries, d)
        whole = torch.einsum("rmq,rqd->mqd", prepared["output"][:kept].float(), basis.float()).flatten(1)
        return plain_factors(whole, site.anchor.storage)

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        heads, largest = heads_of(site), max(map(self.kept, options))
        output = prepared["output"][:largest].to(g.device)
        basis = by_query(heads, prepared["basis"][:largest].to(g.device)).float()
        left = torch.einsum("tm,rmq->tqr", g.to(output.dtype), output).float()
        right = torch.einsum("tqd,rqd->tqr", x.float().unflatten(1, (heads.queries, heads.width)), basis)
        return self.running((left * right).sum(1), options)


register(ValueOutput())
