"""What a method is: sites, levels, options, the Method protocol and how a file registers one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

from rankfront.methods._errors import InputError
from rankfront.methods._storage import Storage, dense_storage

if TYPE_CHECKING:  # whoever names sites, options or levels need not wait for torch
    from torch import Tensor

    from rankfront.methods._statistics import Statistics

Value = int | float | str
DENSE = "dense"


@dataclass(frozen=True)
class Weight:
    """One matrix W (out_features, in_features) of the model, y = W x + b.

    Attributes:
        role: what a method calls it; "weight" where the site has just one.
        path: the module it belongs to.
        out_features: m. For an embedding table, the size of the vocabulary: its rows are tokens.
        in_features: n. For an embedding table, the width of the model.
        kind: "linear", or "embedding" for an untied table, whose inputs are token ids.
        tied: other modules that read the same matrix and follow whatever happens to it.
        bias: whether the module adds one, (m,).
        shared: other modules that multiply by the same matrix, in other blocks, and follow it too.
        share: of the tokens, those that it is given: k / E of an expert of a mixture where k of E run for each, else 1.
    """

    role: str
    path: str
    out_features: int
    in_features: int
    kind: Literal["linear", "embedding"] = "linear"
    tied: tuple[str, ...] = ()
    bias: bool = False
    shared: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module that what replaces it stands in for."""
        return (self.path, *self.tied, *self.shared)

    @property
    def storage(self) -> Storage:
        """mn values, the bias left out."""
        return dense_storage(self.out_features, self.in_features)

    @property
    def biases(self) -> Storage:
        """The m values that its module adds; nothing where it adds none."""
        return Storage(self.out_features if self.bias else 0)


@dataclass(frozen=True)
class Heads:
    """How an attention's projections split into heads.

    Attributes:
        queries, keys: numbers of query heads and of key-value heads; queries // keys of the former share one of these.
        width: d, the dimension of a head.
        planes: the pairs of dimensions that rotary positions turn together, (d // 2); None without rotary positions.
        fixed: why queries and keys have to stay as they are; None where they need not.
    """

    queries: int
    keys: int
    width: int
    planes: tuple[tuple[int, int], ...] | None = None
    fixed: str | None = None


@dataclass(frozen=True)
class Site:
    """The smallest unit that gets a treatment of its own: one weight, or a few treated jointly.

    Attributes:
        name: the module path, with what is treated of it where a module holds several.
        weights: what the site claims. The last one is the `anchor`.
        heads: of the attention that the weights belong to; None elsewhere.
        separate: whether the weights are at different places of the model's function, as those of several blocks are:
            then each is an anchor, and the `parts` are looked at one by one.
        places: roles of the weights whose inputs are measured, and that are anchors; empty where all of them are.
    """

    name: str
    weights: tuple[Weight, ...]
    heads: Heads | None = None
    separate: bool = False
    places: tuple[str, ...] = ()

    @property
    def anchor(self) -> Weight:
        """The weight whose replacement alone, by `Method.equivalent`, has the effect of the joint treatment."""
        return self.weights[-1]

    @property
    def parts(self) -> tuple[Site, ...]:
        """One site for each anchor: the site itself, or each of its weights where they are `separate`."""
        return tuple(Site(self.name, (weight,)) for weight in self.measured) if self.separate else (self,)

    @property
    def measured(self) -> tuple[Weight, ...]:
        """The weights whose inputs are."""
        return tuple(weight for weight in self.weights if not self.places or weight.role in self.places)

    @property
    def roles(self) -> tuple[str, ...]:
        """What its weights are to each other: ("weight",) where there is one."""
        return tuple(weight.role for weight in self.weights)

    @property
    def storage(self) -> Storage:
        """What the site stores while dense, biases left out: methods count those that they drop as saved."""
        return sum((weight.storage for weight in self.weights), Storage(0))

    @property
    def biases(self) -> Storage:
        """What its modules add while dense."""
        return sum((weight.biases for weight in self.weights), Storage(0))


@dataclass(frozen=True)
class Option:
    """(method, level): one choice for one site. ``level`` is sorted by name, so equal options are equal."""

    method: str
    level: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, method: str, **level: Value) -> Option:
        return cls(method, tuple(sorted(level.items())))

    def __getitem__(self, name: str) -> Value:
        return dict(self.level)[name]

    @property
    def label(self) -> str:
        """``svd-llm rank=64``, or ``dense``."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.level)])


DENSE_OPTION = Option(DENSE)


@dataclass(frozen=True)
class Grid:
    """Which levels a study asks for.

    Attributes:
        keep: kept fractions of a site, each in (0, 1).
        rank_multiple: ranks are multiples of this.
    """

    keep: tuple[float, ...]
    rank_multiple: int = 8

    def __post_init__(self) -> None:
        if not self.keep:
            raise InputError("space.keep is empty: name at least one kept fraction between 0 and 1")
        bad = [keep for keep in self.keep if not 0 < keep < 1]
        if bad:
            raise InputError(f"space.keep holds {bad}: kept fractions lie strictly between 0 and 1 (1 is `dense`)")
        if self.rank_multiple < 1:
            raise InputError(f"space.rank_multiple is {self.rank_multiple}: it must be at least 1")


@dataclass(frozen=True)
class Factors:
    """A compressed weight as it is stored and run.

    Attributes:
        kind: the key of the module in `layers.layers`.
        tensors: its parameters by name.
        settings: what the module's shapes follow from beside (m, n), e.g. ``{"rank": 64}``.
        storage: what exactly it stores.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, int]
    storage: Storage


def plain_factors(weight: Tensor, storage: Storage, bias: Tensor | None = None) -> Factors:
    """A dense matrix (rows, columns) of any size, with a bias (rows,) where it replaces the module's own."""
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Factors("plain", tensors, {"rows": weight.shape[0], "columns": weight.shape[1]}, storage)


Prepared: TypeAlias = "dict[str, Tensor]"
Level = TypeVar("Level")


class Method(Protocol):
    """A family with its metric, under a name users know. Pure functions of tensors.

    ``family`` is one of `_taxonomy.FAMILIES` and ``geometry`` its own line there. ``nested`` says whether one
    preparation serves every level (low rank) or each level needs its own. ``version`` is part of the name under which
    factors are kept: whoever changes what `prepare` or `truncate` computes raises it, of every method that it changes.
    """

    @property
    def name(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def geometry(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def formula(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def nested(self) -> bool: ...
    @property
    def version(self) -> int: ...

    def refuses(self, site: Site) -> str | None:
        """Why this method cannot treat ``site``, or None where it can."""

    def check(self, option: Option) -> None:
        """Raise `InputError` where ``option`` has no level of this method: plans are files that people may edit."""

    def options(self, site: Site, grid: Grid) -> dict[float, Option]:
        """Kept fraction asked for -> option; only options cheaper than dense."""

    def storage(self, site: Site, option: Option) -> Storage:
        """What ``option`` stores at ``site``, exactly."""

    def prepare(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        options: Sequence[Option],
    ) -> Prepared:
        """The expensive step, once per site: role -> W (m, n) and its statistics to named tensors.

        ``energy`` among them sums to the squared error, in the method's own metric, of leaving everything out.
        Where a module has a bias, ``weights`` hold it under ``ROLE.bias``. Matrices in fp64 stay exact in the store
        (fp32); others are kept in the dtype that they run in.
        """

    def truncate(self, prepared: Prepared, option: Option) -> dict[str, Factors]:
        """The cheap step: prepared tensors to each role's factors at one level.

        Roles that are given the very same tensor share it: it is stored once, and the first of them counts it.
        """

    def error(self, prepared: Prepared, option: Option) -> float:
        """‖(W − Ŵ) S‖²_F at ``option``, the predicted squared error in the method's own metric."""

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        """The roles that a sequential refit fits again, to the Gram of the one input that they all read.

        Empty where the fit reads anything else.
        """

    def equivalent(self, site: Site, prepared: Prepared, option: Option) -> Factors:
        """The equivalent weight: factors at the anchor with which the model, dense elsewhere, computes the same.

        ``site``, here and in `gradient_dot_outputs`, is one of the `Site.parts` of the site that was prepared.
        """

    def gradient_dot_outputs(
        self, site: Site, prepared: Prepared, options: Sequence[Option], g: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        """Dot products gᵀ (ŷ − b), (tokens,), by label of every option: slopes of the loss are their sums.

        ŷ are outputs of the `equivalent` weight, b the anchor's dense bias, ``g`` (tokens, m) gradients at the anchor's
        output and ``x`` (tokens, n) its inputs in the dense model.
        """


def whole_level(option: Option, name: str) -> int:
    """The level ``name`` of an option; `InputError` where it is not a whole number of at least 1."""
    value = dict(option.level).get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"option {option.label!r} has {name}={value!r}: it needs a whole number of at least 1")
    return value


def not_one_linear(site: Site, needs: Sequence[str], looked_up: bool = False) -> str | None:
    """Why a method of single linears that reads ``needs`` cannot treat ``site`` at all; None where it is one.

    ``looked_up`` says that what it makes can be looked up too, where an output head is the embedding table as well.
    """
    if len(site.weights) != 1:
        return "it treats one weight at a time"
    if site.weights[0].tied and not looked_up:
        return "the weight is an embedding table too, which is looked up, not multiplied"
    if site.weights[0].kind != "embedding":
        return None
    if needs:
        return f"an embedding table's inputs are token ids, which have no {', '.join(needs)} statistics"
    return "an embedding table is looked up, not multiplied"


def nearest_levels(costs: Mapping[Level, int], grid: Grid, dense: int) -> dict[float, Level]:
    """Kept fraction -> the level whose cost is nearest to that share of ``dense``, the first of equals; {} of none."""
    return {keep: min(costs, key=lambda level: abs(costs[level] - keep * dense)) for keep in grid.keep if costs}


def stepped(grid: Grid, full: int, step: int) -> dict[float, int]:
    """Kept fraction -> the multiple of ``step`` nearest to that share of ``full``, at least one step and below it."""
    largest = (full - 1) // step * step
    return {keep: min(max(step * round(keep * full / step), step), largest) for keep in grid.keep if largest}


METHODS: dict[str, Method] = {}  # of the files that were imported; `_registry` imports what it is asked for


def register(method: Method) -> Method:
    """Add a method under its name; raises ValueError where the name is taken."""
    if method.name in METHODS:
        raise ValueError(f"a method named {method.name!r} is already registered: choose another name")
    METHODS[method.name] = method
    return method


APART = ("_method", "_registry", "_errors", "_storage", "_taxonomy")  # shared files that no layer runs


@cache
def source_behind(*modules: str) -> str:
    """The source text of ``modules`` and of what they import of this package, `APART` left out."""
    waiting, seen = list(modules), set()
    while waiting:
        name = waiting.pop()
        short = name.rpartition(".")[2]
        if name in seen or short in APART or not name.startswith(__package__ or "") or name not in sys.modules:
            continue
        seen.add(name)
        waiting += [str(getattr(value, "__module__", "")) for value in vars(sys.modules[name]).values()]
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted(seen))
