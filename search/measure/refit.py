"""Sequential refit: each weight of a plan fitted again to the inputs that the compressed model before it really makes.

Preparing measures inputs x of the dense model. Where blocks before a weight are compressed it reads x' instead, and

    min_Ŵ Σ_t ‖W x_t − Ŵ x'_t‖² = min_Ŵ ‖(M − Ŵ) C'^{1/2}‖² + const,    M = W C_xx' C'⁻¹,

with C' = Σ x'x'ᵀ and C_xx' = Σ x x'ᵀ: what a method that fits W under C does is done again for M under C', at the same
level. M is a regression: where x' tells little of x it shrinks, and over many blocks so does what they write. So the
target goes part of the way, W + β (M − W).

Block by block, and within a block by what reads the same input, in the order of the calls; two streams of hidden
states, dense and compressed, go along. Treatments that have no such Gram stay as they are.

Source: AA-SVD (2604.02119), its anchored objective (β = 1), there for low rank; its block-wise training is not part of
this. A target part of the way is SAES-SVD's (ICLR 2026), which chooses β layer by layer [M].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import DENSE_OPTION, Gram, InputError, Option, Site, Statistics, get_method
from rankfront.methods._rounded import Rounded
from rankfront.methods.layers import set_module
from rankfront.methods.unfused_experts import Routed, routed_at
from rankfront.search.factors.calibration import shared_inputs
from rankfront.search.inputs.sites import blocks, weights_at
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.streams import Call, calls_of, even_batches, first_hidden, reached
from rankfront.search.plans.plan import Plan

BATCH_TOKENS = 2048  # tokens that a block reads at once
ANCHOR = 0.5  # β
RIDGE = 1e-4  # of the mean diagonal of C', as tokens that both streams share: where nothing is known, M is W
Progress = Callable[[int, int], None]  # blocks done, in all
Given = tuple[Tensor, Routed | None]  # what a linear reads, and of which tokens


@contextmanager
def refitted(compressed: CompressedModel, plan: Plan, progress: Progress = lambda done, total: None) -> Iterator[None]:
    """Within, the model runs ``plan`` refitted sequentially on the calibrate split; dense after.

    Beside the model it holds hidden states of all these tokens twice, and what the weights of one block read.
    """
    if compressed.setup.task.labelled:
        raise InputError("a refit reads windows of one length, and labelled texts have padding: use --refit none")
    compressed.apply(plan)
    try:
        with torch.no_grad():
            _refit(compressed, compressed.setup.tokens["calibrate"], progress)
        yield
    finally:
        compressed.apply(Plan(()))


def _refit(compressed: CompressedModel, windows: Tensor, progress: Progress) -> None:
    model, task = compressed.model, compressed.setup.task
    ids = even_batches(windows, BATCH_TOKENS // windows.shape[1], compressed.setup.device)
    with compressed.dense():
        prefix, found = blocks(model)
    by_block: dict[int, dict[Site, Option]] = {}
    for site, place in compressed.sites.items():
        option = compressed.current.get(site.name, DENSE_OPTION)
        if option != DENSE_OPTION and place.block is not None and get_method(option.method).refit_roles(site):
            by_block.setdefault(place.block, {})[site] = option
    reads = {site: _reads(site, option) for own in by_block.values() for site, option in own.items()}
    calls = calls_of(model, found, ids[0], task)
    shifted = [first_hidden(model, found[0], batch, task) for batch in ids]
    with compressed.dense():
        dense = [first_hidden(model, found[0], batch, task) for batch in ids]
        lead = shared_inputs(model, list(reads.values()), ids[0][:1], task)  # in the order of the calls
    for number, block in enumerate(found):
        path = f"{prefix}.{number}."
        own = {name: module for name, module in compressed.modules.items() if name.startswith(path)}
        plain = {name: compressed.dense_modules[name] for name in own}

        def run(hidden: Tensor, block: nn.Module = block, call: Call = calls[number]) -> Tensor:
            return call.run(block, hidden)

        stages = list(dict.fromkeys(first for read, first in lead.items() if read.startswith(path)))
        with _in_place(model, plain, own):
            seen = [_inputs(model, stages, run, hidden) for hidden in dense]  # of this block's weights, all tokens
        dense = [after for after, _ in seen]
        for stage in stages:
            sites = {site: option for site, option in by_block[number].items() if lead[reads[site]] == stage}
            treated = {weight.path: plain[weight.path] for site in sites for weight in site.weights}
            sums = _Sums()
            with _in_place(model, treated, own):
                for (_, inputs), hidden in zip(seen, shifted, strict=True):
                    met = reached(model.get_submodule(stage), partial(run, hidden))
                    if met is not None and stage in inputs:
                        sums.add(*_same_tokens(*inputs[stage], met, routed_at(model, stage)))
            for site, option in sites.items() if sums.tokens else ():
                with _in_place(model, treated, own):
                    beside = _beside(model, site, option, run, shifted)
                _fit(compressed, site, option, sums, beside)
                own |= {weight.path: compressed.modules[weight.path] for weight in site.weights}
        shifted = [run(hidden) for hidden in shifted]
        progress(number + 1, len(found))


def _reads(site: Site, option: Option) -> str:
    """The module whose inputs' Gram the fit reads; others of the site that are fitted again have the same inputs."""
    roles = get_method(option.method).refit_roles(site)
    return next(weight.path for weight in site.weights if weight.role in roles)


def _inputs(
    model: Any, paths: Sequence[str], run: Callable[[Tensor], Tensor], hidden: Tensor
) -> tuple[Tensor, dict[str, Given]]:
    """What a block makes of ``hidden``, and what the modules at ``paths`` in it read, as far as they are called."""
    found: dict[str, Given] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, given, path=path: found.__setitem__(path, (given[0], routed_at(model, path)))
        )
        for path in paths
    ]
    try:
        return run(hidden), found
    finally:
        for handle in handles:
            handle.remove()


def _same_tokens(x: Tensor, routed: Routed | None, other: Tensor, others: Routed | None) -> tuple[Tensor, Tensor]:
    """Inputs of the tokens that an expert is given in both streams, times the router's weights in the dense one, as the
    error is; all of them where it is no expert."""
    if routed is None or others is None:
        return x, other
    both, ours = torch.isin(routed.tokens, others.tokens), torch.isin(others.tokens, routed.tokens)
    scale = torch.ones_like(x[both][:, :1]) if routed.weights is None else routed.weights[both, None]
    return x[both] * scale, other[ours] * scale


def _beside(
    model: Any, site: Site, option: Option, run: Callable[[Tensor], Tensor], shifted: Sequence[Tensor]
) -> dict[str, Statistics]:
    """Statistics of what matrices of ``site`` read that are not fitted again but rounded, of the dense ones in their
    place: a joint treatment in fewer bits has them."""
    method = get_method(option.method)
    if not isinstance(method, Rounded):
        return {}
    roles = {w.path: w.role for w in site.weights if w.role not in method.refit_roles(site)}
    sums = {role: _Sums() for role in roles.values()}
    for hidden in shifted if roles else ():
        for path, (x, _) in _inputs(model, list(roles), run, hidden)[1].items():
            sums[roles[path]].add(x, x)
    return {role: own.statistics for role, own in sums.items() if own.tokens}


@contextmanager
def _in_place(model: nn.Module, modules: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, ``modules`` stand in the model; after, those of ``after`` at the same paths."""
    try:
        for path, module in modules.items():
            set_module(model, path, module)
        yield
    finally:
        for path in modules:
            set_module(model, path, after[path])


class _Sums:
    """C' and C_xx' (n, n), and the number of tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.own: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, compressed: Tensor) -> None:
        """x and x' (..., n) of the same tokens; sums are of fp64 where that is affordable, for (C' + ε I)⁻¹ magnifies
        what rounding leaves of directions that were not seen."""
        dtype = torch.float64 if x.device.type == "cpu" else torch.float32
        x, compressed = x.flatten(0, -2).to(dtype), compressed.flatten(0, -2).to(dtype)
        own, cross = compressed.T @ compressed, x.T @ compressed
        self.tokens += len(x)
        self.own = own if self.own is None else self.own.add_(own)
        self.cross = cross if self.cross is None else self.cross.add_(cross)

    @property
    def statistics(self) -> Statistics:
        """Of x'."""
        assert self.own is not None
        return Statistics(self.tokens, gram=Gram(self.own))

    def target(self, weight: Tensor) -> Tensor:
        """W + β (M − W), M = W (C_xx' + ε I)(C' + ε I)⁻¹, (m, n), for W (m, n)."""
        assert self.own is not None
        assert self.cross is not None
        own, cross = self.own.double(), self.cross.double()
        ridge = RIDGE * own.diagonal().mean() + torch.finfo(torch.float32).tiny
        identity = ridge * torch.eye(len(own), dtype=own.dtype, device=own.device)
        moved: Tensor = torch.linalg.solve(own + identity, (cross + identity).T)
        return torch.lerp(weight.double(), weight.double() @ moved.T, ANCHOR)


def _fit(
    compressed: CompressedModel, site: Site, option: Option, sums: _Sums, beside: Mapping[str, Statistics]
) -> None:
    """Fit ``option`` again at ``site`` and run it; ``beside`` are the statistics of roles that are not fitted."""
    method = get_method(option.method)
    dense = {weight.path: compressed.dense_modules[weight.path] for weight in site.weights}
    with _in_place(compressed.model, dense, compressed.modules):
        weights = weights_at(compressed.model, site)
    roles = method.refit_roles(site)
    weights |= {role: sums.target(weights[role]) for role in roles}
    prepared = method.prepare(site, weights, {**beside, **dict.fromkeys(roles, sums.statistics)}, [option])
    compressed.replace(site, method.truncate(prepared, option))
