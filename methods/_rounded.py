"""Bits as a second axis: any treatment whose factors are dense matrices, with these held in 8 or 4 bits.

Each matrix T of the treatment is rounded by GPTQ under the Gram of what it reads itself,

    least ‖(T − T̂) G^{1/2}‖²_F, G = Σ_t z_t z_tᵀ:

of A (B x) the first factor reads x, the second what the rounded first one gives, and is fitted anew before it is
rounded itself (see `rounded_factors`); of a smaller MLP the down projection reads the neurons that are left. A method
that reads no text is rounded to the nearest value, and so is a matrix whose inputs were not measured. Supports, orders
and values of sparse factors stay as they are.

Source: GPTQ (2210.17323) for the rounding; factors fitted to each other's rounding in the manner of LQER (2402.02446)
[M].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rankfront.methods._errors import InputError
from rankfront.methods._fitted import Fitted, matrix_of
from rankfront.methods._integers import PADDED, rounded, rounded_factors
from rankfront.methods._method import Factors, Grid, Option, Prepared, Site, whole_level
from rankfront.methods._packed_integers import Integers, named, restored
from rankfront.methods._registry import narrow_name
from rankfront.methods._statistics import Statistics
from rankfront.methods._storage import Storage, integer_storage
from rankfront.methods._weighting import Gram
from rankfront.methods.layers import layers

PAIR = ["left", "right"]
PART = "|"  # between the role, the kind and the name of a tensor, as prepared ones are called
SETTING, STORAGE = "setting.", "storage"  # names of what is kept beside the tensors
FINEST = Grid((*(step / 20 for step in range(1, 20)), 0.999), 1)
VERSION, VERSIONS = 1, 1000  # of what is done here, and how many there may be


@dataclass(frozen=True)
class Rounded(Fitted):
    """``base`` with its matrices in ``bits`` bits: its levels, and `bits`."""

    base: Any
    bits: int

    @property
    def name(self) -> str:
        return narrow_name(self.base.name, self.bits)

    @property
    def paper(self) -> str:
        return f"{self.base.paper}, GPTQ 2210.17323"

    @property
    def family(self) -> str:
        return cast(str, self.base.family)

    @property
    def geometry(self) -> str:
        return f"{self.base.geometry}, on {self.bits} bits"

    @property
    def metric(self) -> str:
        return cast(str, self.base.metric)

    @property
    def formula(self) -> str:
        return f"{self.base.formula}; matrices on {self.bits} bits"

    @property
    def version(self) -> int:  # type: ignore[override]
        return VERSION + VERSIONS * cast(int, self.base.version)

    @property
    def needs(self) -> tuple[str, ...]:
        """The Gram beside what the base reads, if it reads anything."""
        return tuple(dict.fromkeys([*self.base.needs, "gram"])) if self.base.needs else ()

    def plain(self, option: Option) -> Option:
        """The option of the base that is rounded here."""
        return Option.of(self.base.name, **{name: value for name, value in option.level if name != "bits"})

    def refuses(self, site: Site) -> str | None:
        reason = cast("str | None", self.base.refuses(site))
        return reason or (None if _offered(self, site) else PADDED)

    def check(self, option: Option) -> None:
        if whole_level(option, "bits") != self.bits:
            raise InputError(f"option {option.label!r}: {self.name} has bits={self.bits}")
        self.base.check(self.plain(option))

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        """Those of the base that are smaller for it: padding and scales may take more than the bits save."""
        offered = self.base.options(site, grid).items()
        narrow = {keep: option for keep, plain in offered if (option := self.narrower(site, plain)) is not None}
        return {} if self.refuses(site) else narrow

    def narrower(self, site: Site, plain: Option) -> Option | None:
        """The ``plain`` option of the base in fewer bits; None where these take no fewer bytes."""
        option = Option.of(self.name, **dict(plain.level), bits=self.bits)
        smaller = self.storage(site, option).bytes(2) < self.base.storage(site, plain).bytes(2)
        return option if smaller else None

    def storage(self, site: Site, option: Option) -> Storage:
        plain = self.plain(option)
        storage = cast(Storage, self.base.storage(site, plain))
        for rows, columns in self.base.matrices(site, plain):
            storage += integer_storage(rows, columns, self.bits) - Storage(rows * columns)
        return storage

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        (option,) = options
        whole = self.base.prepare(site, weights, statistics, [self.plain(option)])
        return self.rounded(site, weights, statistics, whole, option)

    def rounded(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        whole: Prepared,
        option: Option,
    ) -> Prepared:
        """What `prepare` gives, of what the base has prepared.

        Its error is exact where it is that of the outputs, or of the weight; else what rounding adds to the base's.
        """
        plain = self.plain(option)
        found: Prepared = {}
        error, energy = self.base.error(whole, plain), float(whole["energy"].double().sum())
        exactly = len(site.weights) == 1 and self.metric in ("whitening", "identity")
        for role, factors in self.base.truncate(whole, plain).items():
            gram = statistics[role].gram if self.needs and role in statistics else None
            if gram is not None and hasattr(self.base, "reads"):
                gram = Gram(self.base.reads(site, whole, plain, role, gram.raw))
            matrices = _rounded(factors, weights[role], self.bits, gram)
            found |= _packed(role, factors, matrices, self.bits)
            if len(site.weights) > 1:
                error += sum(
                    _squared(factors.tensors[n] - each.restored(self.bits), gram) for n, each in matrices.items()
                )
                continue
            shape = weights[role].shape
            before = weights[role] if exactly else matrix_of(factors, *shape)
            lost = before - matrix_of(self.truncate(found, option)[role], *shape)
            error = _squared(lost, gram) + (0.0 if exactly else error)
        largest = torch.finfo(torch.float32).max
        return found | {"error": torch.tensor([min(error, largest)]), "energy": torch.tensor([min(energy, largest)])}

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in prepared.items():
            if PART in key:
                role, kind, name = key.split(PART)
                parts.setdefault((role, kind), {})[name] = tensor
        found = {}
        for (role, kind), tensors in parts.items():
            storage = Storage(*tensors.pop(STORAGE).tolist())
            settings = {name: int(tensors.pop(name)) for name in list(tensors) if name.startswith(SETTING)}
            settings = {name.removeprefix(SETTING): value for name, value in settings.items()}
            found[role] = Factors(kind, tensors, settings, storage)
        return found

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        """Those of the base. What other matrices of a joint treatment read is measured for their rounding alone."""
        return cast(tuple[str, ...], self.base.refit_roles(site))

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        return self.truncate(prepared, option)[site.anchor.role]


@cache
def _offered(method: Rounded, site: Site) -> bool:
    """Whether ``method`` has any level at ``site``."""
    return any(method.narrower(site, plain) for plain in method.base.options(site, FINEST).values())


class Matrix(NamedTuple):
    """One that was rounded: the integers, and how many columns they stand for."""

    integers: Integers
    columns: int

    def restored(self, bits: int) -> Tensor:
        return restored(self.integers, bits, self.columns)


def _squared(lost: Tensor, gram: Gram | None) -> float:
    """‖lost S‖²_F, S Sᵀ the Gram; without one ‖lost‖²_F."""
    lost = lost.double()
    return float(((lost if gram is None else gram.times_gram(lost)) * lost).sum())


def _rounded(factors: Factors, weight: Tensor, bits: int, gram: Gram | None) -> dict[str, Matrix]:
    """The matrices of ``factors``, rounded; ``weight`` (m, n) is the dense one, ``gram`` of what the first reads."""
    names = [name for name in getattr(layers()[factors.kind], "matrices", ()) if name in factors.tensors]
    matrices = {name: factors.tensors[name].double() for name in names}
    if names != PAIR:
        return {name: Matrix(rounded(matrix, bits, gram), matrix.shape[1]) for name, matrix in matrices.items()}
    left, right = matrices.values()
    rest = matrix_of(factors, *weight.shape).double() - left @ right  # of what else the layer adds
    norms = left.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    sides = rounded_factors(weight.double() - rest, left / norms, right * norms[:, None], bits, gram)
    widths = left.shape[1], right.shape[1]
    return {name: Matrix(side, width) for name, side, width in zip(PAIR, sides, widths, strict=True)}


def _packed(role: str, factors: Factors, matrices: Mapping[str, Matrix], bits: int) -> Prepared:
    """Tensors that `Rounded.truncate` makes ``factors`` of again, their ``matrices`` in ``bits``."""
    storage = factors.storage
    for name, (_, columns) in matrices.items():
        rows = len(factors.tensors[name])
        storage += integer_storage(rows, columns, bits) - Storage(rows * columns)
    tensors = {name: tensor for name, tensor in factors.tensors.items() if name not in matrices}
    tensors |= named(**{name: each.integers for name, each in matrices.items()})
    tensors |= {SETTING + name: torch.tensor([value]) for name, value in {**factors.settings, "bits": bits}.items()}
    counts = [storage.values, storage.index_bits, storage.integers, storage.integer_bits]
    tensors[STORAGE] = torch.tensor(counts)
    return {PART.join((role, factors.kind, name)): tensor for name, tensor in tensors.items()}
