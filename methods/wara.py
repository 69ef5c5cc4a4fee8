"""``wara``, ``wara-db2``, ``wara-ordered``: low rank in every band of the weight's wavelet transform.

    minimise Σ_t ‖(W − Ŵ) x_t‖² = ‖(W − Ŵ) C^{1/2}‖²_F over Ŵ = T_mᵀ [D̂_ab] T_n,  rank D̂_ab = r_ab,  Σ_ab r_ab = k

T is one level of an orthonormal wavelet transform, periodised, and [D_ab] = T_m W T_nᵀ its bands, (⌈m/2⌉, ⌈n/2⌉) each;
odd sizes are padded by a zero. Bands of the outputs do not meet in this metric, those of the inputs do, through the
blocks of T_n C T_nᵀ: given the error E_c of the other input band, the best D̂_b is the whitened SVD of
D_b + E_c C_cb C_bb⁻¹, and the two take turns. The ranks come from one sort of all bands' whitened singular values, in
eights where k is a multiple of eight. One rank for the whole transform instead of one a band is `svd-llm` exactly.

Measured on 15 weights of SmolLM2-135M at 30% and 60% of dense storage, against `svd-llm`: 4 to 30% less error where a
weight is wide (v and down projections), 4 to 25% more elsewhere (q, o, up). Shuffled rows and columns gave nearly the
same on wide weights, so the gain there is that of ranks in four blocks, not of neighbours that are alike.

``wara-ordered`` puts inputs with like columns side by side first, by greedy matching, and stores their order in whole
bits. Where columns come in scrambled pairs that halves the cost; on the weights above it changed the error by -7% to
+8%, in the middle by -1%, which is about what its bits are worth. Outputs keep their order: heads lie together there,
and matched across heads the error of a q projection rose by up to 12%.

Source: WaRA (2506.24092), which trains adapters of this form; fitting it to the weight itself, after training, and the
turns are ours. Haar (one vanishing moment) by default, db2 has two; filters from PyWavelets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfront.methods._algebra import GRAM_RIDGE, regularise
from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, measured
from rankfront.methods._low_rank import balanced, weighted_subspace
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, not_one_linear, register, whole_level
from rankfront.methods._sizes import index_width
from rankfront.methods._statistics import Statistics, collected
from rankfront.methods._storage import Storage, wavelet_storage
from rankfront.methods._support import pack
from rankfront.methods.layers_wavelet import BANDS, WaveletLinear, analyse, even, filters, pad

PAPER = "2506.24092"
TURNS = 4  # of both input bands; the second gains most, later ones under a hundredth each
CHUNK = 8  # ranks of bands are multiples of it where k is one
Quarters = list[list[Tensor]]  # [outputs' band][inputs' band]


def bands_of(matrix: Tensor, moments: int) -> Quarters:
    """The bands (M/2, N/2) of a matrix (M, N) of even sizes."""
    pair = filters(moments)
    return [list(analyse(half.T, pair)) for half in analyse(matrix.T, pair)]


class _Rooted:
    """S = L of C = L Lᵀ, as a `Weighting`."""

    def __init__(self, gram: Tensor) -> None:
        self.root = _cholesky(gram)

    def times_root(self, weight: Tensor) -> Tensor:
        return weight @ self.root

    def times_gram(self, weight: Tensor) -> Tensor:
        return weight @ self.root @ self.root.T

    def sandwich(self, weight: Tensor) -> Tensor:
        scaled = weight @ self.root
        return scaled @ scaled.T


def _cholesky(gram: Tensor) -> Tensor:
    """L of C = L Lᵀ (n, n); sums in fp32 may leave eigenvalues below the ridge, then a larger one."""
    for scale in (0.0, 1e2, 1e4):
        ridge = scale * GRAM_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(gram + ridge)
        if not failed:
            return root
    raise ValueError(f"a Gram of shape {tuple(gram.shape)} is not finite or not positive definite")


def share_ranks(spectra: Sequence[Tensor], k: int) -> list[int]:
    """Ranks of bands, k in all, by one sort of their falling spectra (q,): what is kept sums to the most."""
    chunk, length = math.gcd(k, CHUNK), len(spectra[0])
    while len(spectra) * (length // chunk) * chunk < k:
        chunk //= 2
    whole = length // chunk * chunk
    sums = torch.stack([spectrum[:whole].unflatten(0, (-1, chunk)).sum(1) for spectrum in spectra])
    chosen = sums.flatten().argsort(descending=True, stable=True)[: k // chunk]
    counts: list[int] = (torch.bincount(chosen // sums.shape[1], minlength=len(spectra)) * chunk).tolist()
    return counts


def fit_bands(bands: Quarters, grams: Quarters, k: int) -> tuple[dict[str, tuple[Tensor, Tensor]], list[int]]:
    """Band -> left (M/2, r) and right (r, N/2), and the ranks in the order of `BANDS`, for D_ab and C_bc in fp64.

    Each turn's answer is the best for its band while the other stays, so from the first on the error never rises. The
    first turn of a band takes the other's error as zero, not as its whole, which ends far lower on real weights.
    """
    rooted = [_Rooted(grams[b][b]) for b in range(2)]
    carried = [torch.cholesky_solve(grams[b][1 - b], rooted[b].root).T for b in range(2)]  # C_cb C_bb⁻¹
    places = [(a, b) for b in range(2) for a in range(2)]
    ranks = share_ranks([weighted_subspace(bands[a][b], rooted[b])[1] for a, b in places], k)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for a in range(2):
        errors = [torch.zeros_like(bands[a][b]) for b in range(2)]
        for _ in range(TURNS):
            for b in range(2):
                at = places.index((a, b))
                target = bands[a][b] + errors[1 - b] @ carried[b]
                left = weighted_subspace(target, rooted[b])[0][:, : ranks[at]]
                right = left.T @ target
                found[BANDS[at]] = (left, right)
                errors[b] = bands[a][b] - left @ right
    return found, ranks


def pairing(likeness: Tensor) -> Tensor:
    """An order (n,), on the CPU, in which those most alike stand in pairs, the likest pairs first, by greedy matching.

    ``likeness`` (n, n) is symmetric; its diagonal is not read. Two that are each other's likest are the greedy choice.
    """
    alike = likeness.cpu().clone().fill_diagonal_(-math.inf)
    free = torch.ones(len(alike), dtype=torch.bool)
    pairs: list[tuple[float, int, int]] = []
    while free.sum() > 1:
        best, partner = alike.max(1)
        for i in free.nonzero().flatten().tolist():
            j = int(partner[i])
            if i < j and int(partner[j]) == i:
                pairs.append((-float(best[i]), i, j))
                free[i] = free[j] = False
        alike[~free] = -math.inf
        alike[:, ~free] = -math.inf
    ordered = [index for _, i, j in sorted(pairs) for index in (i, j)]
    return torch.tensor([*ordered, *free.nonzero().flatten().tolist()])


def cosines(gram: Tensor) -> Tensor:
    """|cos| between rows of a matrix whose products ``gram`` (n, n) holds."""
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return (gram / norms / norms[:, None]).abs()


@dataclass(frozen=True)
class Wara(Fitted):
    """Low rank of each wavelet band, in the whitening metric; ``components`` are the ranks of all bands together."""

    name: str
    moments: int
    ordered: bool = False
    paper: str = PAPER
    family = "multi-resolution"
    metric = "whitening"
    needs = ("gram",)

    @property
    def geometry(self) -> str:
        like = ", like features side by side" if self.ordered else ""
        return f"a subspace for sums and one for differences of neighbours, of inputs and of outputs{like}"

    @property
    def formula(self) -> str:
        order = " P" if self.ordered else ""
        return f"Ŵ = T_mᵀ [D̂_ab] T_n{order}, rank D̂_ab = r_ab, T of db{self.moments}"

    def refuses(self, site: Site) -> str | None:
        reason = not_one_linear(site, self.needs)
        return reason if reason or self._most(site) else "no components of bands store less than the dense weight"

    def _storage(self, site: Site, k: int) -> Storage:
        return wavelet_storage(site.anchor.out_features, site.anchor.in_features, k, self.ordered)

    def _most(self, site: Site) -> int:
        """The largest k that stores less than the dense weight."""
        each = (even(site.anchor.out_features) + even(site.anchor.in_features)) // 2
        return max(0, (site.storage.parameters - 1 - self._storage(site, 0).parameters) // each)

    def check(self, option: Option) -> None:
        whole_level(option, "components")

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        step = grid.rank_multiple
        largest = 0 if self.refuses(site) else self._most(site) // step * step
        if not largest:
            return {}
        each = self._storage(site, 1).values
        wanted = {keep: keep * site.storage.parameters - self._storage(site, 0).parameters for keep in grid.keep}
        counts = {keep: min(max(step * round(room / each / step), step), largest) for keep, room in wanted.items()}
        return {keep: Option.of(self.name, components=count) for keep, count in counts.items()}

    def storage(self, site: Site, option: Option) -> Storage:
        return self._storage(site, whole_level(option, "components"))

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (weight,), (option,) = weights.values(), options
        (m, n), k = weight.shape, whole_level(option, "components")
        if k > 2 * min(even(m), even(n)):
            raise InputError(f"option {option.label!r} has more components than the four bands of {site.name} hold")
        gram = collected(statistics["weight"].gram, "gram")
        work, metric = weight.double(), regularise(gram.raw)
        stored = {}
        if self.ordered:
            order = pairing(cosines(work.T @ work)).to(work.device)
            stored = {"order": pack(order, index_width(n))}
            work, metric = work[:, order], metric[order][:, order]
        floor = metric.diagonal().mean() * GRAM_RIDGE  # of an input that is always zero
        metric = torch.block_diag(metric, floor[None, None]) if n % 2 else metric
        bands = bands_of(pad(pad(work).T).T, self.moments)
        found, ranks = fit_bands(bands, bands_of(metric, self.moments), k)
        left = torch.cat([found[band][0] for band in BANDS], 1)  # (M/2, k)
        right = torch.cat([found[band][1] for band in BANDS])  # (k, N/2)
        left, right = balanced(left, right)
        prepared = {
            "left": left.float(),
            "right": right.float(),
            "ranks": torch.tensor(ranks),
            "size": torch.tensor([m, n]),
            **stored,
        }
        factors = self.truncate(prepared, option)["weight"]
        layer = WaveletLinear(**factors.tensors, bias=None, settings=factors.settings, size=(m, n))
        return prepared | measured(weight, layer.matrix(), gram)

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        tensors: Prepared = {name: prepared[name] for name in ("left", "right", "order") if name in prepared}
        m, n = prepared["size"].tolist()
        settings = {"outputs": m, "inputs": n, "moments": self.moments, "ordered": int(self.ordered)}
        settings |= dict(zip(BANDS, prepared["ranks"].tolist(), strict=True))
        storage = wavelet_storage(m, n, tensors["right"].shape[0], self.ordered)
        return {"weight": Factors("wavelet", tensors, settings, storage)}


register(Wara("wara", moments=1))
register(Wara("wara-db2", moments=2))
register(Wara("wara-ordered", moments=1, ordered=True))
