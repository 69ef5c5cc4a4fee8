"""One row per method: what is special about it, in closed form and from raw tokens. A new method adds a row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import linear_site, rank_option
from torch import Tensor

from rankfront.methods import Gram, Grid, Option, Site, Statistics, get_method


@dataclass(frozen=True)
class Sample:
    """Calibration as it happened: inputs x (T, n) and output gradients g (T, m) of one weight, in fp64."""

    x: Tensor
    g: Tensor

    def statistics(self) -> Statistics:
        """The sums that calibration keeps of it, in fp32."""
        return Statistics(
            tokens=len(self.x),
            gram=Gram((self.x.T @ self.x).float()),
            absolute=self.x.abs().sum(0).float(),
            fisher=(self.g.square().sum(1) @ self.x.square()).float(),
            gradient=(self.middle.T @ self.middle).float(),
            frequency=self.frequency.float(),
        )

    @property
    def frequency(self) -> Tensor:
        """Token counts (m,): a target's gradient is the lowest that an output has."""
        return (self.g < -0.8).double().sum(0)

    @property
    def middle(self) -> Tensor:
        """The gradients whose norm is neither among the lowest nor the highest eighth."""
        norms = self.g.norm(dim=1)
        low, high = norms.quantile(0.125), norms.quantile(0.875)
        return torch.stack([g for g, norm in zip(self.g, norms, strict=True) if low <= norm <= high])


_PREPARED: dict[tuple[Any, ...], dict[str, Tensor]] = {}


def prepared_once(
    name: str, site: Site, weight: Tensor, sample: Sample, options: Sequence[Option]
) -> dict[str, Tensor]:
    """What the method prepares of ``weight``, worked out once by process: laws ask for the same few again and again."""
    raw = [each.contiguous().view(torch.uint8).numpy().tobytes() for each in (weight, sample.x, sample.g)]
    key = (name, site, tuple(options), weight.dtype, *raw)
    if key not in _PREPARED:
        _PREPARED[key] = get_method(name).prepare(site, {"weight": weight}, {"weight": sample.statistics()}, options)
    return {part: tensor.clone() for part, tensor in _PREPARED[key].items()}


@dataclass(frozen=True)
class MethodRow:
    """What a method claims.

    Attributes:
        loss: (Δ (m, n), sample) -> ‖Δ S‖²_F, token by token, with Δ = W − Ŵ.
        root: sample -> S (n, ·), for which the SVD of R W S gives the optimum.
        left: sample -> R (m, m); None where R = I.
        needs: the statistics it reads.
        embedding: whether it treats an embedding table, whose inputs are token ids.
        site: (m, n) -> a site that it treats.
        ladder: (m, n) -> options from the cheapest to the one that reproduces W.
        gridded: whether its ranks follow the space's grid; `lrt` has a published rule instead, tested in test_lrt.
    """

    loss: Callable[[Tensor, Sample], float]
    root: Callable[[Sample], Tensor]
    needs: tuple[str, ...]
    left: Callable[[Sample], Tensor] | None = None
    embedding: bool = False
    site: Callable[[int, int], Site] = linear_site
    ladder: Callable[[str, int, int], list[Option]] = lambda name, m, n: [
        rank_option(name, rank) for rank in range(1, min(m, n) + 1)
    ]
    gridded: bool = True


def plain_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_ij Δ_ij²."""
    return float(sum(row @ row for row in delta))


def activation_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_j mean_t|x_tj| ‖Δ_j‖², which is α = 0.5."""
    return float(sum(sample.x[:, j].abs().mean() * delta[:, j].square().sum() for j in range(delta.shape[1])))


def fisher_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_t ‖g_t‖² Σ_j x_tj² ‖Δ_j‖²."""
    columns = delta.square().sum(0)
    return float(sum((g @ g) * (x.square() @ columns) for x, g in zip(sample.x, sample.g, strict=True)))


def output_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_t ‖Δ x_t‖²."""
    return float(sum((delta @ x).square().sum() for x in sample.x))


def shrink(gram: Tensor, share: float) -> Tensor:
    """Towards its mean eigenvalue; the identity where there is nothing."""
    mean, identity = gram.diagonal().mean(), torch.eye(len(gram), dtype=gram.dtype)
    return (1 - share) * gram + share * mean * identity if mean > 0 else identity


def kronecker_loss(delta: Tensor, sample: Sample) -> float:
    """tr(Γ Δ C Δᵀ), both shrunk, Γ over the middle three quarters of the tokens."""
    inputs, gradients = shrink(sample.x.T @ sample.x, 0.1), shrink(sample.middle.T @ sample.middle, 0.3)
    return float(torch.einsum("ij,jk,kl,il->", gradients, delta, inputs, delta))


def token_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_i (c_i + 1) Σ_t (Δ_i x_t)², c_i how often token i occurs."""
    counts = sample.frequency.tolist()
    return float(sum((count + 1) * (sample.x @ row).square().sum() for count, row in zip(counts, delta, strict=True)))


METHOD_ROWS = {
    "svd": MethodRow(
        loss=plain_loss,
        root=lambda sample: torch.eye(sample.x.shape[1], dtype=torch.float64),
        needs=(),
        embedding=True,
    ),
    "asvd": MethodRow(
        loss=activation_loss,
        root=lambda sample: sample.x.abs().mean(0).sqrt().diag(),
        needs=("absolute",),
    ),
    "fwsvd": MethodRow(
        loss=fisher_loss,
        root=lambda sample: (sample.g.square().sum(1) @ sample.x.square()).sqrt().diag(),
        needs=("fisher",),
    ),
    "svd-llm": MethodRow(
        loss=output_loss,
        root=lambda sample: sample.x.T,  # S Sᵀ = Xᵀ X, whichever root of it
        needs=("gram",),
    ),
    "kfac-svd": MethodRow(
        loss=kronecker_loss,
        root=lambda sample: torch.linalg.cholesky(shrink(sample.x.T @ sample.x, 0.1)),
        left=lambda sample: torch.linalg.cholesky(shrink(sample.middle.T @ sample.middle, 0.3)).T,
        needs=("gram", "gradient"),
    ),
    "hola-embedding": MethodRow(
        loss=token_loss,
        root=lambda sample: sample.x.T,
        left=lambda sample: (sample.frequency + 1).sqrt().diag(),
        needs=("gram", "frequency"),
        site=lambda m, n: linear_site(m, n, tied=("table",)),
    ),
    "lrt": MethodRow(
        loss=plain_loss,
        root=lambda sample: torch.eye(sample.x.shape[1], dtype=torch.float64),
        needs=(),
        gridded=False,
    ),
}


@dataclass(frozen=True)
class FittedRow:
    """What a method claims that fits each of its levels anew; its laws are in test_fitted_laws.

    Attributes:
        loss: as in `MethodRow`.
        needs: the statistics it reads.
        exact: (name, m, n) -> an option that reproduces W, or None where the family cannot.
        own: (name, m, n) -> the options that laws walk, from the cheapest; by default those offered on a fine grid.
        falls: whether its error never rises with its level; False where the fit is a local optimum, and says so.
        slow: whether it is the code of another row at a published setting that takes long: one shape is walked.
        gridded: whether its levels follow the kept fractions asked for in stored values; those in fewer bits do not.
        tables: whether it treats embedding tables.
        noise: of the whole loss, what rounding leaves at any level.
    """

    loss: Callable[[Tensor, Sample], float]
    needs: tuple[str, ...]
    exact: Callable[[str, int, int], Option | None] = lambda name, m, n: None
    own: Callable[[str, int, int], list[Option]] | None = None
    falls: bool = True
    slow: bool = False
    gridded: bool = True
    tables: bool = False
    noise: float = 0.0


def every_band(name: str, m: int, n: int) -> Option:
    """All components of four bands."""
    return Option.of(name, components=4 * min(-(-m // 2), -(-n // 2)))


def full_level(name: str, m: int, n: int) -> Option:
    """The level of a tensor format at which nothing is left out."""
    method = get_method(name)
    return Option.of(name, **{method.level: method.full(m, n)})


def two_levels(name: str, m: int, n: int) -> list[Option]:
    """The cheapest and the dearest, of a method that is slow."""
    offered = get_method(name).options(linear_site(m, n), Grid((0.05, 0.95), 1))
    return list(dict.fromkeys(offered.values()))


def full_dictionary(name: str, m: int, n: int) -> Option:
    """As many atoms as the weight has dimensions, and every output uses all of them."""
    return Option.of(name, atoms=min(m, n), nonzeros=min(m, n))


def dictionary(**more: Any) -> FittedRow:
    return FittedRow(loss=output_loss, needs=("gram",), exact=full_dictionary, **more)


def second_moment_loss(delta: Tensor, sample: Sample) -> float:
    """Σ_t Σ_j x_tj² ‖Δ_j‖²."""
    return float(sum(x.square() @ delta.square().sum(0) for x in sample.x))


def whole_support(name: str, m: int, n: int) -> Option:
    """A sparse part with room for every entry."""
    return Option.of(name, rank=1, nonzeros=n)


OATS = FittedRow(loss=second_moment_loss, needs=("gram",), exact=whole_support)


def full_basis(name: str, m: int, n: int) -> Option:
    """One block, with a basis of all its inputs and every coefficient."""
    return Option.of(name, atoms=n, group=n, nonzeros=n, block=n)


def its_bits(name: str, m: int, n: int) -> list[Option]:
    """The one level of a rounding, also where its padding leaves nothing to gain."""
    return [Option.of(name, bits=get_method(name).bits)]


def some_ranks(name: str, m: int, n: int) -> list[Option]:
    """A few ranks of rounded factors, likewise."""
    ranks = sorted({1, max(1, min(m, n) // 2), min(m, n)})
    return [Option.of(name, rank=rank, bits=get_method(name).bits) for rank in ranks]


DSFORMER = FittedRow(loss=output_loss, needs=("gram",), exact=full_basis, falls=False)

FITTED_ROWS: dict[str, FittedRow] = {
    "lrt-snmf": FittedRow(loss=plain_loss, needs=()),
    "wara": FittedRow(loss=output_loss, needs=("gram",), exact=every_band, falls=False),
    "wara-db2": FittedRow(loss=output_loss, needs=("gram",), exact=every_band, falls=False),
    "wara-ordered": FittedRow(loss=output_loss, needs=("gram",), exact=every_band, falls=False),
    "tensor-train": FittedRow(loss=output_loss, needs=("gram",), exact=full_level),
    "tucker": FittedRow(loss=output_loss, needs=("gram",), exact=full_level, falls=False),
    "kronecker": FittedRow(loss=plain_loss, needs=(), exact=full_level),
    "tensor-train-matrix": FittedRow(loss=plain_loss, needs=(), exact=full_level),
    "tensor-ring": FittedRow(loss=plain_loss, needs=(), exact=full_level),
    "cp": FittedRow(loss=plain_loss, needs=(), exact=full_level, falls=False),
    "cp-published": FittedRow(loss=plain_loss, needs=(), own=two_levels, falls=False, slow=True),
    "block-term": FittedRow(loss=plain_loss, needs=(), exact=full_level, falls=False),
    "block-term-published": FittedRow(
        loss=plain_loss, needs=(), own=two_levels, exact=full_level, falls=False, slow=True
    ),
    "cospadi": dictionary(falls=False),
    "cospadi-published": dictionary(falls=False, slow=True),
    "rocket": dictionary(falls=False),
    "compot": dictionary(falls=False),
    "compot-published": dictionary(falls=False, slow=True),
    "dsformer": DSFORMER,
    "dsformer-nm": DSFORMER,
    "sltrain": FittedRow(loss=output_loss, needs=("gram",), exact=whole_support),
    "oats": OATS,
    "oats-published": replace(OATS, slow=True),
    "rtn-int8": FittedRow(loss=plain_loss, needs=(), own=its_bits, gridded=False, tables=True),
    "rtn-int4": FittedRow(loss=plain_loss, needs=(), own=its_bits, gridded=False, tables=True),
    "gptq-int8": FittedRow(loss=output_loss, needs=("gram",), own=its_bits, gridded=False),
    "gptq-int4": FittedRow(loss=output_loss, needs=("gram",), own=its_bits, gridded=False),
    "lqer-int4": FittedRow(loss=output_loss, needs=("gram",), own=some_ranks, gridded=False),
    "svd-llm-int8": FittedRow(
        loss=output_loss, needs=("gram",), own=some_ranks, falls=False, gridded=False, noise=1e-4
    ),
    "svd-llm-int4": FittedRow(
        loss=output_loss, needs=("gram",), own=some_ranks, falls=False, gridded=False, noise=5e-3
    ),
}

EXPERT_METHODS = ("expert-prune",)  # of a layer's experts; their laws are in test_experts
JOINT_METHODS = ("lama", "vo-svd", "nystrom", "drop-block")  # several weights at once; their laws are in test_joint
SHARED_METHODS = (
    "shared-basis",
    "shared-basis-3",
    "shared-basis-4",
    "hola",
    "hola-experts",
)  # and in test_shared_basis
