"""Plan: site -> option for the whole model. Frozen, JSON, versioned, hashable; its cost is exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rankfront.methods import DENSE, DENSE_OPTION, Cost, InputError, Option, Site, Storage, get_method
from rankfront.search.plain import without_folders

VERSION = 1
HALF = 2  # bytes of a value in 16 bits, by which options are compared with dense


@dataclass(frozen=True)
class Plan:
    """Which option each site takes. Sites that are not named stay dense.

    Attributes:
        choices: (site name, option), sorted by site, dense ones left out: equal plans are equal.
        origin: what the plan belongs to: model, fingerprint, calibration hash, dtype.
    """

    choices: tuple[tuple[str, Option], ...]
    origin: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, choices: Mapping[str, Option], origin: Mapping[str, str] | None = None) -> Plan:
        kept = sorted((site, option) for site, option in choices.items() if option.method != DENSE)
        return cls(tuple(kept), tuple(sorted((origin or {}).items())))

    @cached_property
    def by_site(self) -> dict[str, Option]:
        return dict(self.choices)

    def option(self, site: str) -> Option:
        """The option at ``site``; dense where the plan does not name it."""
        return self.by_site.get(site, DENSE_OPTION)

    @cached_property
    def key(self) -> str:
        """A hash of the choices: the same for equal plans."""
        return _hash(self._choices_json())

    def _choices_json(self) -> dict[str, dict[str, Any]]:
        return {site: {"method": option.method, **dict(option.level)} for site, option in self.choices}

    def to_json(self) -> str:
        """One line: version, origin, and each treated site's method and level."""
        return json.dumps({"version": VERSION, "origin": dict(self.origin), "sites": self._choices_json()})

    @property
    def portable(self) -> Plan:
        """The same without the name of its model where that is a path on this machine, to be handed on."""
        return replace(self, origin=tuple(pair for pair in self.origin if pair[1] == without_folders(pair[1])))

    @staticmethod
    def key_in(text: str) -> str:
        """The key of the plan that `to_json` wrote, without reading its options."""
        return _hash(json.loads(text)["sites"])

    @classmethod
    def from_json(cls, text: str, where: str = "plan", levels: bool = True) -> Plan:
        """Read what `to_json` wrote; `InputError` naming ``where`` if it is not that.

        With ``levels``, each is checked by its method, whose file imports torch.
        """
        try:
            data = json.loads(text)
            version = data["version"]
            for spec in data["sites"].values():
                if not isinstance(spec["method"], str) or not all(type(v) in (int, float, str) for v in spec.values()):
                    raise TypeError(f"{spec} is no option")
            choices = {
                site: Option.of(method=spec["method"], **{k: v for k, v in spec.items() if k != "method"})
                for site, spec in data["sites"].items()
            }
            for option in choices.values():
                if levels and option.method != DENSE:
                    get_method(option.method).check(option)
            origin = {str(key): str(value) for key, value in data.get("origin", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{where} is corrupt ({type(error).__name__}: {error}): export it again") from error
        if version != VERSION:
            raise InputError(f"{where} has version {version}, this rankfront reads {VERSION}: export it again")
        return cls.of(choices, origin)


def _hash(choices: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]


def check_disjoint(sites: Iterable[Site]) -> None:
    """Raise `InputError` where two of the treated ``sites`` claim the same weight."""
    claimed: dict[str, str] = {}
    for site in sites:
        for weight in site.weights:
            other = claimed.setdefault(weight.path, site.name)
            if other != site.name:
                raise InputError(
                    f"the plan treats {weight.path!r} twice, at {other!r} and {site.name!r}: leave one of them dense"
                )


def check_option(site: Site, option: Option) -> None:
    """Raise `InputError` where ``option`` is none for ``site``: its method cannot treat it, or its level stores no less
    than the dense weights. Shapes and costs are compared as numbers: nothing is allocated for a level out of a file."""
    method = get_method(option.method)
    reason = method.refuses(site)
    if reason is not None:
        raise InputError(f"the plan has {option.label!r} at {site.name!r}, where {option.method} cannot be: {reason}")
    own, dense = method.storage(site, option), site.storage
    largest = max((value for _, value in option.level if type(value) is int), default=0)
    if largest > dense.values:  # a level counts parts of the weights, and some, such as a block's width, cost nothing
        raise InputError(
            f"the plan has {option.label!r} at {site.name!r}, whose dense weights have {dense.values:,} values: choose"
            " a lower level"
        )
    if own.parameters >= dense.parameters and own.bytes(HALF) >= dense.bytes(HALF):
        raise InputError(
            f"the plan has {option.label!r} at {site.name!r}, which stores {own.parameters:,} values where the dense"
            f" weights have {dense.parameters:,}: choose a lower level, or leave it dense"
        )


def active(site: Site, option: Option) -> float:
    """Stored values of a site that one token reads, biases left out: of experts the share that it is given to."""
    dense = sum(weight.share * weight.storage.parameters for weight in site.weights)
    if option == DENSE_OPTION:
        return dense
    method = get_method(option.method)
    own = getattr(method, "active", None)
    if own is not None:
        return float(own(site, option))
    return method.storage(site, option).parameters * dense / site.storage.parameters


class Prices:
    """What plans of one model cost, exactly; what an option adds to a site is worked out once.

    Args:
        sites: every site of the model -> whether it lies inside a block.
        model_values: parameters of the dense model, each once.
        value_bytes: bytes of one value in the dtype of the export.
        block_values: what the dense model's blocks store; by default their sites alone, as runs of 0.1 had it.
    """

    def __init__(
        self, sites: Mapping[Site, bool], model_values: int, value_bytes: int, block_values: int | None = None
    ) -> None:
        self.sites = sites
        self.model_values = model_values
        self.value_bytes = value_bytes
        self._by_name = {site.name: site for site in sites}
        weights = {weight.path: (weight, inside) for site, inside in sites.items() for weight in site.weights}
        within = [weight for weight, inside in weights.values() if inside]
        own = sum((weight.storage + weight.biases for weight in within), Storage(0))
        self._block = own if block_values is None else Storage(block_values)
        self._active = model_values - sum((1 - w.share) * w.storage.parameters for w, _ in weights.values())
        self._changes: dict[tuple[str, Option], Storage] = {}

    def of(self, plan: Plan) -> Cost:
        """`InputError` where the plan names a site that the model does not have, treats a weight twice, or has an
        option that is none there."""
        unknown = [name for name in plan.by_site if name not in self._by_name]
        if unknown:
            raise InputError(
                f"the plan names {unknown[0]!r}, which this model does not have: it belongs to another model"
            )
        check_disjoint(self._by_name[name] for name in plan.by_site)
        changes = [(self._change(name, option), self.sites[self._by_name[name]]) for name, option in plan.choices]
        whole = sum((change for change, _ in changes), Storage(self.model_values))
        block = sum((change for change, inside in changes if inside), self._block)
        return Cost(
            values=whole.parameters,
            dense_values=self.model_values,
            block_values=block.parameters,
            dense_block_values=self._block.parameters,
            bytes=whole.bytes(self.value_bytes),
            active_parameters=1 + sum(self._read(name, option) for name, option in plan.choices) / self._active,
        )

    def _read(self, name: str, option: Option) -> float:
        """What an option adds to the values that one token reads."""
        site = self._by_name[name]
        return active(site, option) - active(site, DENSE_OPTION)

    def _change(self, name: str, option: Option) -> Storage:
        key = name, option
        if key not in self._changes:
            site = self._by_name[name]
            check_option(site, option)
            self._changes[key] = get_method(option.method).storage(site, option) - site.storage
        return self._changes[key]


def cost_of(
    plan: Plan, sites: Mapping[Site, bool], model_values: int, value_bytes: int, block_values: int | None = None
) -> Cost:
    """The exact cost of one plan; see `Prices`."""
    return Prices(sites, model_values, value_bytes, block_values).of(plan)
