"""Calibration: model + tokens -> statistics, window of blocks by window of blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import Gram, Site, Statistics, Weight, narrow_outputs
from rankfront.methods.unfused_experts import routed_at, seeing
from rankfront.objectives import CAUSAL, Task
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.held import passes_of
from rankfront.search.factors.runs import Runs
from rankfront.search.factors.stretch import Stretches
from rankfront.search.inputs.reached import UNREACHED

VERSION = 2  # of the statistics: raised by whoever changes their numbers, so that no factors of others are used
MEMORY_LIMIT = 4 * 2**30  # bytes of statistics held at once
BATCH_TOKENS = 2048  # tokens a forward pass takes at once
LEAST_TOKENS = 256  # that each expert of a mixture sees in all, further ones of its layer among them: a guess
GRADIENTS = frozenset({"fisher", "gradient"})  # statistics that a backward pass brings
MIDDLE = (0.125, 0.875)  # quantiles of a batch's ‖g_t‖² between which tokens count for the Gram of gradients
Progress = Callable[[int, int], None]


@dataclass
class _Sums:
    """Running sums of one input (shared by every weight that reads it) or of one weight."""

    gram: Tensor | None = None
    absolute: Tensor | None = None
    fisher: Tensor | None = None
    gradient: Tensor | None = None
    tokens: int = 0
    felt: int = 0  # tokens that a gradient came back to


@dataclass
class _Recorder:
    """Hooks on the sites' modules that add up what is needed.

    What an expert of a mixture gives is multiplied by the router's weight w_t, and so is its error: its inputs count
    with w_t² in the Gram and |w_t| in the mean. Gradients at its outputs have w_t in them already.
    """

    needs: frozenset[str]
    groups: Mapping[str, str]  # module path -> path of the first module that reads the same input
    failures: Failures  # by module path
    sums: dict[str, _Sums] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    attended: Tensor | None = None  # which tokens of the rows that run are no padding, (B, L); None where all

    def attach(self, model: nn.Module, paths: Sequence[str]) -> list[Any]:
        handles = []
        for path in dict.fromkeys(paths):  # a weight may belong to several sites
            self.sums[path] = _Sums()
            handles.append(model.get_submodule(path).register_forward_hook(self._hook(model, path)))
        return handles

    def _hook(self, model: nn.Module, path: str) -> Callable[..., None]:
        sums, leads = self.sums[path], self.groups[path] == path

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            with self.failures.sparing(path):
                read(inputs, output)

        def read(inputs: tuple[Tensor, ...], output: Tensor) -> None:
            raw = self._tokens(inputs[0].detach())  # (tokens, n)
            sums.tokens += len(raw)
            self.reached.add(path)
            if leads and self.needs & {"gram", "absolute"}:
                x, routed = raw.float(), routed_at(model, path)
                if routed is not None and routed.weights is not None:
                    x = x * routed.weights.detach().float()[:, None]
                if "gram" in self.needs:
                    sums.gram = _add(sums.gram, x.T @ x)
                if "absolute" in self.needs:
                    sums.absolute = _add(sums.absolute, x.abs().sum(0))
            if self.needs & GRADIENTS and output.requires_grad:
                output.register_hook(lambda gradient: self._gradient(path, raw, gradient))

        return hook

    def _tokens(self, states: Tensor) -> Tensor:
        """(B, L, n) or (tokens, n) to (tokens, n), those of padding left out."""
        if self.attended is not None and states.shape[:-1] == self.attended.shape:
            return states[self.attended]
        return states.flatten(0, -2)

    def why_not(self, path: str) -> str | None:
        """Why the inputs of the module at ``path`` could not be measured; None where they were."""
        lead = self.groups[path]
        found = self.failures.get(path, self.failures.get(lead))
        return found or (None if path in self.reached else UNREACHED)

    def _gradient(self, path: str, x: Tensor, gradient: Tensor) -> None:
        with self.failures.sparing(path):
            self._sum_gradient(self.sums[path], x, gradient)

    def _sum_gradient(self, sums: _Sums, x: Tensor, gradient: Tensor) -> None:
        if not len(x):  # of an expert without tokens
            return
        sums.felt += len(x)
        g = self._tokens(gradient).float()  # (tokens, m)
        squares = g.square().sum(1)  # (tokens,) ‖g_t‖²
        if "fisher" in self.needs:
            sums.fisher = _add(sums.fisher, squares @ x.float().square())
        if "gradient" in self.needs and narrow_outputs(g.shape[1], x.shape[1]):
            low, high = squares.quantile(squares.new_tensor(MIDDLE))
            middle = g[(low <= squares) & (squares <= high)]
            sums.gradient = _add(sums.gradient, middle.T @ middle)


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def shared_inputs(model: nn.Module, paths: Sequence[str], ids: Tensor, task: Task = CAUSAL) -> dict[str, str]:
    """Module path -> path of the first of the modules that read the very same tensor (q/k/v, gate/up).

    Found by running ``ids`` (1, L) once and comparing the tensors themselves, so no names are assumed.
    """
    seen: dict[int, tuple[str, Tensor]] = {}
    groups: dict[str, str] = {}

    def hook(path: str) -> Callable[..., None]:
        def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs:  # else it was called by keyword, and shares with nobody as far as is known
                first, _ = seen.setdefault(id(inputs[0]), (path, inputs[0]))  # keeping the tensor keeps its id its own
                groups[path] = first

        return remember

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in dict.fromkeys(paths)]
    try:
        with torch.no_grad(), seeing(model, 0):
            task.logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return groups


def calibrate(
    model: Any,
    windows: Tensor,
    sites: Sequence[Site],
    needs: frozenset[str],
    progress: Progress,
    limit: int = MEMORY_LIMIT,
    failures: Failures | None = None,
    task: Task = CAUSAL,
) -> Iterator[tuple[Site, dict[str, Statistics]]]:
    """(site, statistics by role) for every site that has inputs to measure: in order, or where gradients are needed,
    groups of them from the last on.

    Of the others, ``failures`` has the reason by the site's name; where none are given, RuntimeError.

    Runs ``windows`` (W, L) through the blocks of the dense model that a group of sites lies in whose statistics fit
    under ``limit`` bytes, and drops a group's statistics before the next pass; see `Runs`. An expert of a mixture that
    is given fewer than `LEAST_TOKENS` sees other tokens of its layer too; its gradients, which these have none of, are
    pooled with equal ones. Gradients, where one of `GRADIENTS` is needed,
    are those of the summed cross-entropy of predicted tokens with respect to each weight's output; no weight gradient
    is ever formed. ``progress`` hears (windows done, windows in all).
    """
    device = next(model.parameters()).device
    sites = [site for site in sites if all(weight.kind == "linear" for weight in site.weights)]
    if not sites:
        return
    paths = [weight.path for site in sites for weight in site.measured]
    groups = shared_inputs(model, paths, windows[:1, :8].to(device), task)
    stretches = Stretches(model, task)
    passes = passes_of(sites, groups, needs, limit, lambda site: stretches.span([site]).start)
    size = max(1, BATCH_TOKENS // windows.shape[1])
    runs = Runs(stretches, windows, size, passes, bool(needs & GRADIENTS), progress)
    for chosen in runs.order:
        recorder = _Recorder(needs, _leaders_within(chosen, groups), Failures())
        handles = recorder.attach(model, [weight.path for site in chosen for weight in site.measured])
        try:
            with seeing(model, _least(windows)):
                runs.next(partial(setattr, recorder, "attended"))
        finally:
            for handle in handles:
                handle.remove()
        counts = _token_counts(windows.to(device), chosen) if "frequency" in needs else {}
        failed = Failures()
        for site in chosen:
            reasons = [reason for weight in site.measured if (reason := recorder.why_not(weight.path)) is not None]
            if reasons:
                failed[site.name] = reasons[0]
        if failures is None:
            failed.check()
        else:
            failures |= failed
        measured = [site for site in chosen if site.name not in failed]
        yield from _hand_over(model, measured, recorder, windows.numel(), counts)


def _leaders_within(sites: Sequence[Site], groups: Mapping[str, str]) -> dict[str, str]:
    """``groups`` cut to one pass: the first of a group in this pass leads it here."""
    leaders: dict[str, str] = {}
    return {
        weight.path: leaders.setdefault(groups.get(weight.path, weight.path), weight.path)
        for site in sites
        for weight in site.measured
    }


def _token_counts(windows: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Path of each weight that embedding table and head share -> how often each of its m tokens occurs, (m,)."""
    shared = [weight for site in sites for weight in site.weights if weight.tied]
    return {w.path: torch.bincount(windows.flatten(), minlength=w.out_features).float() for w in shared}


def _hand_over(
    model: nn.Module, sites: Sequence[Site], recorder: _Recorder, tokens: int, counts: Mapping[str, Tensor]
) -> Iterator[tuple[Site, dict[str, Statistics]]]:
    """The statistics of each site, a Gram's sums and roots let go of after the last site that reads them."""
    readers = Counter(recorder.groups[weight.path] for site in sites for weight in site.measured)
    grams: dict[str, Gram] = {}
    for site in sites:
        statistics = {}
        for weight in site.measured:
            lead = recorder.groups[weight.path]
            shared, own = recorder.sums[lead], recorder.sums[weight.path]
            if routed_at(model, weight.path) is not None:
                _pool_gradients(recorder.needs, own, weight)
            if shared.gram is not None and lead not in grams:
                grams[lead] = Gram(shared.gram)
            statistics[weight.role] = Statistics(
                own.tokens or tokens,
                grams.get(lead),
                shared.absolute,
                own.fisher,
                own.gradient,
                counts.get(weight.path),
            )
            readers[lead] -= 1
            if not readers[lead]:
                grams.pop(lead, None)
                shared.gram = None
        yield site, statistics


def _least(windows: Tensor) -> int:
    """How many tokens an expert sees in a batch of windows (W, L), for `LEAST_TOKENS` of all."""
    batch = max(1, BATCH_TOKENS // windows.shape[1]) * windows.shape[1]
    return math.ceil(LEAST_TOKENS * batch / max(windows.numel(), batch))


def _pool_gradients(needs: frozenset[str], sums: _Sums, weight: Weight) -> None:
    """Add what tokens with equal gradients would, as many as an expert lacks to `LEAST_TOKENS`, each of the size that
    its own ones have on average."""
    lacking = LEAST_TOKENS - sums.felt
    if lacking <= 0:
        return
    m, n, share = weight.out_features, weight.in_features, lacking / max(sums.felt, 1)
    if "fisher" in needs:
        own = torch.zeros(n) if sums.fisher is None else sums.fisher
        sums.fisher = own + (share * float(own.mean()) or 1.0)
    if "gradient" in needs and narrow_outputs(m, n):
        own = torch.zeros(m, m) if sums.gradient is None else sums.gradient
        sums.gradient = own + (share * float(own.diagonal().mean()) or 1.0) * torch.eye(m, device=own.device)
