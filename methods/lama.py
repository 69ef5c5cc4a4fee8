"""``lama``: fewer dimensions in each head's queries and keys, a low-rank affinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankfront.methods._algebra import eigh_descending, fix_signs, root_and_inverse
from rankfront.methods._heads import by_query, heads_of, width_step
from rankfront.methods._method import (
    Factors,
    Grid,
    Heads,
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
from rankfront.methods._weighting import Gram
from rankfront.methods.layers_joint import CACHED

ROLES = ("key", "query")


class LowRankAffinity(Nested):
    """Keeps ρ of the d dimensions in which each head compares queries and keys.

    LAMA makes a head's bilinear form W_qᵀ W_k low rank (rank one in the paper, over GRU states); here its rank is the
    level. With C_q = Σ W_q C W_qᵀ over the query heads that share a key head, and C_k = W_k C W_kᵀ (d, d):

    * rotary positions turn pairs of dimensions by the distance between tokens, so only whole planes may go, and those
      stay whose CR score √(E‖q_p‖² E‖k_p‖²) is largest; biases of what goes, go;
    * without them, the minimiser of ‖C_q^{1/2} (I − P Qᵀ) C_k^{1/2}‖_F: U Σ Vᵀ = C_q^{1/2} C_k^{1/2},
      q' = U_ρᵀ C_q^{-1/2} q and k' = U_ρᵀ C_q^{1/2} k, a whitened joint SVD.

    Nested; grouped queries share their key head's choice. Both projections stay dense and the cache of keys needs ρ
    dimensions. Source: LAMA (1912.00835) equation 3 for the low-rank affinity; MoDeGPT (2408.09632) for the CR score.
    """

    name = "lama"
    paper = "LAMA, 1912.00835"
    family = "nested and selected coordinates"
    geometry = "the rotary planes of each head that attention uses most; without positions, its best directions"
    metric = "affinity"
    formula = "qᵀk ≈ q'ᵀk', ρ dimensions a head: rotary planes of largest √(E‖q_p‖² E‖k_p‖²), else whitened joint SVD"
    needs = ("gram",)
    level = "width"

    def refuses(self, site: Site) -> str | None:
        if site.roles != ROLES or site.heads is None:
            return "it treats an attention's query and key projections together"
        return site.heads.fixed

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        if self.refuses(site):
            return {}
        heads, step = heads_of(site), width_step(site, grid)
        even = 2 * -(-step // 2) if heads.planes is not None else step
        return {keep: Option.of(self.name, width=w) for keep, w in stepped(grid, heads.width, even).items()}

    def storage(self, site: Site, option: Option) -> Storage:
        """ρ rows of each head's queries and keys; rotary planes are told by one bit for each of a key head."""
        heads, kept = heads_of(site), self.kept(option)
        key, query = site.weights
        gone = heads.width - kept
        stored = kept * (heads.keys * key.in_features + heads.queries * query.in_features)
        stored -= gone * (key.bias * heads.keys + query.bias * heads.queries)
        return Storage(stored, 0 if heads.planes is None else heads.keys * len(heads.planes))

    def matrices(self, site: Site, option: Option) -> list[tuple[int, int]]:
        """Sizes of what may be held in fewer bits: keys and queries (heads · ρ, n)."""
        heads, kept = heads_of(site), self.kept(option)
        key, query = site.weights
        return [(heads.keys * kept, key.in_features), (heads.queries * kept, query.in_features)]

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        heads = heads_of(site)
        gram = collected(statistics["key"].gram, "gram")
        shared = heads.queries // heads.keys
        keys = weights["key"].double().unflatten(0, (heads.keys, heads.width))  # (keys, d, n)
        queries = weights["query"].double().unflatten(0, (heads.keys, shared, heads.width))  # (keys, q, d, n)
        bases = [self._basis(heads, gram, queries[head], keys[head]) for head in range(heads.keys)]
        towards = torch.stack([basis[0] for basis in bases])  # (keys, c, d): q' = towards q
        across = torch.stack([basis[1] for basis in bases])  # (keys, c, d): k' = across k
        prepared = {
            "query": (towards[:, None] @ queries).flatten(0, 1).transpose(0, 1).float().contiguous(),  # (c, queries, n)
            "key": (across @ keys).transpose(0, 1).float().contiguous(),  # (c, keys, n)
            "spread": across.transpose(0, 1).contiguous(),  # (c, keys, d): what a component of q' does to q alone
            "energy": torch.stack([basis[2] for basis in bases]).sum(0).float(),
        }
        if heads.planes is not None:
            prepared["place"] = across.argmax(2).T.to(torch.uint8).contiguous()  # (c, keys)
        if "query.bias" in weights:
            bias = weights["query.bias"].double().unflatten(0, (heads.keys, shared, heads.width))
            prepared["query.bias"] = torch.einsum("kcd,kqd->ckq", towards, bias).flatten(1)
            prepared["bias"] = weights["query.bias"].float()
        if "key.bias" in weights:
            bias = weights["key.bias"].double().unflatten(0, (heads.keys, heads.width))
            prepared["key.bias"] = torch.einsum("kcd,kd->ck", across, bias)
        return prepared

    @staticmethod
    def _basis(heads: Heads, gram: Gram, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one key head: maps of queries and of keys to components (d, d), and the components' energy (d,)."""
        identity = torch.eye(heads.width, dtype=torch.float64, device=keys.device)
        c_query = torch.stack([gram.sandwich(query) for query in queries]).sum(0)  # (d, d)
        c_key = gram.sandwich(keys)
        if heads.planes is not None:
            pairs = torch.tensor(heads.planes, device=keys.device)  # (d / 2, 2)
            product = c_query.diagonal()[pairs].sum(1) * c_key.diagonal()[pairs].sum(1)
            order = product.argsort(descending=True, stable=True)
            chosen = identity[pairs[order].flatten()]
            return chosen, chosen, (product[order] / 2).repeat_interleave(2)
        root, inverse = root_and_inverse(c_query)
        energy, left = eigh_descending(root @ c_key @ root)  # σ² and U of C_q^{1/2} C_k^{1/2}
        left = fix_signs(left)
        return left.T @ inverse, left.T @ root, energy

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        kept = self.kept(option)
        keys, width = prepared["spread"].shape[1:]
        found = {}
        for role in ROLES:
            rows = prepared[role][:kept]  # (ρ, heads, n)
            count = rows.shape[1]
            tensors = {"weight": rows.transpose(0, 1).flatten(0, 1)}
            if f"{role}.bias" in prepared:
                tensors["bias"] = prepared[f"{role}.bias"][:kept].T.flatten()
            if "place" in prepared:
                tensors["place"] = prepared["place"][:kept].T.repeat_interleave(count // keys, dim=0).contiguous()
            settings = {"heads": count, "kept": kept, "width": width, "placed": int("place" in prepared)}
            settings["cached"] = CACHED.get(role, 0)
            bits = keys * width // 2 if "place" in prepared and role == "key" else 0  # queries read their key head's
            found[role] = Factors("heads", tensors, settings, Storage(rows.numel(), bits))
        return found

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ()

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        heads, kept = heads_of(site), self.kept(option)
        spread = by_query(heads, prepared["spread"][:kept]).float()  # (ρ, queries, d)
        whole = torch.einsum("rqd,rqn->qdn", spread, prepared["query"][:kept].float()).flatten(0, 1)
        bias = None
        if "query.bias" in prepared:
            bias = torch.einsum("rqd,rq->qd", spread, prepared["query.bias"][:kept].float()).flatten()
        return plain_factors(whole, site.anchor.storage, bias)

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        heads, largest = heads_of(site), max(map(self.kept, options))
        query = prepared["query"][:largest].to(g.device)
        spread = by_query(heads, prepared["spread"][:largest].to(g.device)).float()
        left = torch.einsum("tqd,rqd->tqr", g.float().unflatten(1, (heads.queries, heads.width)), spread)
        right = torch.einsum("tn,rqn->tqr", x.to(query.dtype), query).float()
        if "query.bias" in prepared:
            right = right + prepared["query.bias"][:largest].to(g.device).float().T
        found = self.running((left * right).sum(1), options)
        if "bias" in prepared:
            dense = g.float() @ prepared["bias"].to(g.device)
            found = {label: product - dense for label, product in found.items()}
        return found


register(LowRankAffinity())
