"""Joint sites looked at by numbers: names and shapes propose them, a few tokens say whether they are what they seem.

What a joint treatment leaves out, it leaves out of every weight of its site; its stand-in leaves it out of the anchor
alone. Both are the same model if the block reads these weights as the site says: values in any basis of a head, queries
and keys by the planes that positions turn, neurons each for itself. A norm between them, positions of another form, or
keys and values that a later block reads again, make them differ. Here half of each site is left out, in a basis that
means nothing, of all sites at once, and of those of a kind where that differs; then token by token, with a cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import Factors, Heads, Site, Storage
from rankfront.methods._method import plain_factors
from rankfront.methods.layers import replacement, set_module
from rankfront.methods.layers_joint import CACHED
from rankfront.objectives import CAUSAL, Task
from rankfront.objectives._caches import cache_of
from rankfront.search.inputs.reached import ROUNDING, UNFELT, UNREACHED
from rankfront.search.inputs.sites import weights_at

TOKENS = 24  # that are run: far enough for most positions to turn by a radian
TOGETHER = 2**29  # values of weights that are halved at once, of which a copy is held
AHEAD = 22  # of them before the cache is used
Weights = Mapping[str, Tensor]
Halved = tuple[dict[str, Factors], Factors]  # by role; and of the anchor alone


def refused(model: Any, sites: Iterable[Site], windows: Tensor, task: Task = CAUSAL) -> dict[str, str]:
    """Name of each joint site that is not what it seems -> why, by the first tokens of ``windows`` (W, L)."""
    joint = [site for site in sites if site.roles in HALVES and not _fixed(site)]
    look = _Look(model, windows[:1, :TOKENS].to(next(model.parameters()).device), task)
    whole = [site for site in joint if HALVES[site.roles] is _nothing]  # which others of a block are parts of
    reasons: dict[str, str] = {}
    for apart in (*_runs(whole), *_runs([site for site in joint if site not in whole])):
        if look.at(apart) is not None:
            kinds: dict[tuple[tuple[str, ...], str], list[Site]] = {}
            for site in apart:
                kinds.setdefault((site.roles, _kind(site.name)), []).append(site)
            for alike in kinds.values():
                reasons |= _wrong(look, alike)
    return reasons


def _runs(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """``sites`` in runs of `TOGETHER` values at most, or of one site."""
    run, held = list[Site](), 0
    for site in sites:
        held += site.storage.values
        if run and held > TOGETHER:
            yield run
            run, held = [], site.storage.values
        run.append(site)
    if run:
        yield run


def _wrong(look: _Look, alike: Sequence[Site]) -> dict[str, str]:
    """Those of one kind that are not what they seem, and why: all from the first of a half on in which it is one."""
    why = look.at(alike)
    if why is None:
        return {}
    if len(alike) == 1 or look.at(alike[:1]) is not None:
        return {site.name: why for site in alike}
    middle = len(alike) // 2
    return _wrong(look, alike[:middle]) | _wrong(look, alike[middle:])


def _kind(name: str) -> str:
    """What a site is in its block."""
    return re.sub(r"^.*\.\d+\.", "", name)


def refusals(reasons: Mapping[str, str]) -> Iterator[str]:
    """What a launch says of joint sites: a line for each kind and reason. Of weights that no text reaches, coverage
    says it."""
    found = Counter((_kind(name), why) for name, why in reasons.items() if why not in (UNREACHED, UNFELT))
    for (name, why), count in found.items():
        yield f"{name} is not treated jointly in {count} blocks: {why}"


class _Look:
    """The dense model's logits on some ``ids`` (1, L), and how treatments compare."""

    def __init__(self, model: Any, ids: Tensor, task: Task) -> None:
        self.model, self.ids, self.task = model, ids, task
        self.rounding = ROUNDING.get(next(model.parameters()).dtype, ROUNDING[torch.bfloat16])
        self.dense = self._logits()

    @cached_property
    def caches(self) -> bool:
        """Whether the dense model gives the same step by step. Encoders have no cache, some decoders one of their own
        kind."""
        return self._same(self._stepwise(), self.dense)

    def at(self, sites: Sequence[Site]) -> str | None:
        """Why ``sites`` cannot be treated together, or None where they can."""
        halves = {site: HALVES[site.roles](site, weights_at(self.model, site)) for site in sites}
        treated = {
            path: found[weight.role]
            for site, (found, _) in halves.items()
            for weight in site.weights
            for path in weight.paths
        }
        try:
            with self._run(treated):
                ours = self._logits()
                cached = self.task.generates and any(HALVES[site.roles] is not _nothing for site in sites)
                stepwise = self._stepwise() if cached else ours
        except Exception as error:  # noqa: BLE001 - a block's own code fails in ways of its own
            return f"the block does not run without a half of it ({type(error).__name__})"
        with self._run({path: alone for site, (_, alone) in halves.items() for path in site.anchor.paths}):
            alone = self._logits()
        if not self._same(ours, alone):
            return "to leave a part of it out does more than that: something else reads it, or normalises it"
        return None if self._same(stepwise, ours) or not self.caches else "with a cache it gives something else"

    def _same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two treatments are one; ``other`` may be none at all."""
        changed = (other - self.dense).norm()
        return bool((one - other).norm() <= self.rounding * (changed if changed > 0 else self.dense.norm()))

    @contextmanager
    def _run(self, factors: Mapping[str, Factors]) -> Iterator[None]:
        dense = {path: self.model.get_submodule(path) for path in factors}
        try:
            for path, each in factors.items():
                like = dense[path].weight
                tensors = {
                    name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
                    for name, tensor in each.tensors.items()
                }
                set_module(self.model, path, replacement(dense[path], each.kind, tensors, each.settings))
            yield
        finally:
            for path, module in dense.items():
                set_module(self.model, path, module)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        return self.task.logits(self.model, self.ids).float()

    @torch.no_grad()
    def _stepwise(self) -> Tensor:
        out = self.model(input_ids=self.ids[:, :AHEAD], use_cache=True)
        found = [out.logits.float()]
        for i in range(AHEAD, self.ids.shape[1]):
            out = self.model(input_ids=self.ids[:, i : i + 1], use_cache=True, **cache_of(out))
            found.append(out.logits.float())
        return torch.cat(found, dim=1)


def _basis(width: int) -> tuple[Tensor, Tensor]:
    """A (d, d) and A⁻¹, which round nothing in any format: the last dimension first, every other one times -2."""
    scale = torch.ones(width)
    scale[1::2] = -2
    basis = torch.diag(scale).flip(1)
    return basis, torch.diag(1 / scale).flip(0)


def _fixed(site: Site) -> bool:
    """Whether no method changes it anyway."""
    return "query" in site.roles and len(site.weights) == 2 and site.heads is not None and site.heads.fixed is not None


def _heads(site: Site) -> tuple[Heads, int]:
    assert site.heads is not None  # of attentions, which are found with them
    return site.heads, max(1, site.heads.width // 2)


def _by_head(weights: Weights, role: str, heads: int) -> tuple[Tensor, Tensor | None]:
    """W (heads, d, n) and b (heads, d), in fp32."""
    bias = weights.get(f"{role}.bias")
    by_head = weights[role].float().unflatten(0, (heads, -1))
    return by_head, None if bias is None else bias.float().unflatten(0, (heads, -1))


def _neurons(site: Site, weights: Weights) -> Halved:
    kept = torch.arange(0, site.anchor.in_features, 2)
    treated = {}
    for role in site.roles[:-1]:
        bias = weights.get(f"{role}.bias")
        treated[role] = plain_factors(weights[role][kept], Storage(0), None if bias is None else bias[kept])
    down = weights[site.anchor.role]
    alone = torch.zeros_like(down)
    alone[:, kept] = down[:, kept]
    return treated | {site.anchor.role: plain_factors(down[:, kept], Storage(0))}, plain_factors(alone, Storage(0))


def _values(site: Site, weights: Weights) -> Halved:
    heads, kept = _heads(site)
    basis, inverse = (each.to(weights["value"].device) for each in _basis(heads.width))
    value, bias = _by_head(weights, "value", heads.keys)
    tensors = {"weight": (basis @ value)[:, :kept].flatten(0, 1)}
    if bias is not None:
        tensors["bias"] = (bias @ basis.T)[:, :kept].flatten()
    wide = (weights["output"].float().unflatten(1, (heads.queries, -1)) @ inverse)[..., :kept]  # (m, queries, kept)
    sizes = {"kept": kept, "width": heads.width}
    cached = {"placed": 0, "cached": CACHED["value"]}
    treated = {
        "value": Factors("heads", tensors, sizes | cached | {"heads": heads.keys}, Storage(0)),
        "output": Factors("from-heads", {"weight": wide.flatten(1)}, sizes | {"heads": heads.queries}, Storage(0)),
    }
    return treated, plain_factors((wide @ basis[:kept]).flatten(1), Storage(0))


def _queries(site: Site, weights: Weights) -> Halved:
    heads, kept = _heads(site)
    width = heads.width
    device = weights["query"].device
    if heads.planes is None:
        basis, inverse = (each.to(device) for each in _basis(width))
        across, towards, place = basis[:kept], inverse.T[:kept], None  # k' = A k, q' = A⁻ᵀ q
        spread = across
    else:
        place = torch.tensor(heads.planes[::2], device=device).flatten()
        kept = len(place)
        across = towards = spread = torch.eye(width, device=device)[place]
    treated = {}
    for role, count, change in (("key", heads.keys, across), ("query", heads.queries, towards)):
        weight, bias = _by_head(weights, role, count)
        tensors = {"weight": (change @ weight).flatten(0, 1)}
        if bias is not None:
            tensors["bias"] = (bias @ change.T).flatten()
        if place is not None:
            tensors["place"] = place.to(torch.uint8).expand(count, -1).contiguous()
        settings = {"heads": count, "kept": kept, "width": width, "placed": int(place is not None)}
        treated[role] = Factors("heads", tensors, settings | {"cached": CACHED.get(role, 0)}, Storage(0))
    query, bias = _by_head(weights, "query", heads.queries)
    through = spread.T @ towards  # (d, d)
    alone = plain_factors(
        (through @ query).flatten(0, 1), Storage(0), None if bias is None else (bias @ through.T).flatten()
    )
    return treated, alone


def _nothing(site: Site, weights: Weights) -> Halved:
    absent = {weight.role: Factors("absent", {}, {"rows": weight.out_features}, Storage(0)) for weight in site.weights}
    zeros = torch.zeros_like(weights[site.anchor.role])
    return absent, plain_factors(zeros, Storage(0), zeros[:, 0] if site.anchor.bias else None)


HALVES: Mapping[tuple[str, ...], Callable[[Site, Weights], Halved]] = {
    ("gate", "up", "down"): _neurons,
    ("up", "down"): _neurons,
    ("value", "output"): _values,
    ("key", "query"): _queries,
    ("query", "key", "value", "output"): _nothing,
}
