"""Slopes: what every switch of an option would change around a compressed plan, by a forward and a backward pass.

    loss(plan with o at site i) ≈ loss(plan) + a_i(o) + b_i(o)
    a_i(o) = (1/N) Σ_t g_tᵀ (Ŵ_o − Ŵ_i) x_t,    b_i(o) = ½ (1/N) Σ_t (h_tᵀ (Ŵ_o − Ŵ_i) x_t)²,

with Ŵ_i what the plan has at site i, x_t its input within the compressed model, g_t the gradient of the searched loss
(next-token negative log-likelihood, or KL from the dense model) with respect to its output, and h_t that of −log p(y)
for labels y drawn from the compressed model, whose second moment is its Fisher information. The likelihood's own g
serves as h, times √`Tuning.own_labels`: the empirical Fisher ranks switches alike, and saves a backward pass. Around
the dense model the KL is flat and a vanishes, which leaves the menu's quadratic; around a compressed plan a says where
the loss falls, effects of all the other sites included.

Source: sequential quadratic approximation with the Gauss-Newton (Fisher) Hessian, Martens (1412.1193); gradient scores
in the manner of ZS-SVD; ours is the application to switches of options around a measured plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import DENSE_OPTION, Option, Site
from rankfront.methods.layers import weight_of
from rankfront.objectives import CAUSAL, Task, Teacher, divergence_from
from rankfront.search.factors.calibration import Progress
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.gradient import (
    BATCH_TOKENS,
    Arrivals,
    arriving,
    drawn_loss,
    products,
    tokens_at,
)
from rankfront.search.factors.joint_rounding import add_rounding
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs.reached import differentiated
from rankfront.search.inputs.recomputed import recomputed
from rankfront.search.tuning import TUNING


def measure_slopes(
    model: Any,
    windows: Tensor,
    wanted: Mapping[Site, Sequence[Option]],
    current: Mapping[str, Option],
    dense: Mapping[str, nn.Module],
    store: FactorStore,
    teacher: Teacher | None,
    seed: int,
    progress: Progress = lambda done, total: None,
    task: Task = CAUSAL,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Site name -> label of every option, dense included -> (a, b) in nats a token.

    ``model`` runs the plan ``current`` (site name -> option) on ``windows`` (W, L); ``dense`` are its dense modules by
    path. With a ``teacher`` on these windows the loss is KL from the dense model, else the negative log-likelihood.
    ``progress`` hears (windows done, windows in all).
    """
    progress(0, len(windows))
    generator = torch.Generator().manual_seed(seed)
    failures = Failures()  # those sites are left out: the menu has said why, or will
    probes = [_Probe(model, site, options, current, dense, store, failures) for site, options in wanted.items()]
    step, each = max(1, BATCH_TOKENS // windows.shape[1]), task.predicted(windows.shape[1])
    hooks = [hook for probe in probes for hook in probe.hooks()]
    with recomputed(model, step * windows.shape[1]), differentiated(model, hooks):
        for start in range(0, len(windows), step):
            ids = windows[start : start + step].to(next(model.parameters()).device)
            logits = task.logits(model, ids)[:, :each].float()  # (b, P, V)
            loss = _searched_loss(logits, task.targets(ids), teacher, start)
            if teacher is None:
                loss.backward()
                for probe in probes:
                    probe.settle(slopes=True, curvature=TUNING.own_labels)
            else:
                loss.backward(retain_graph=True)
                for probe in probes:
                    probe.settle(slopes=True)
                drawn_loss(logits.flatten(0, 1), generator).backward()
                for probe in probes:
                    probe.settle(curvature=1.0)
            progress(min(start + step, len(windows)), len(windows))
    predicted = len(windows) * each
    found: dict[str, dict[str, tuple[float, ...]]] = {
        probe.site.name: {label: (a / predicted, probe.second[label] / predicted) for label, a in probe.first.items()}
        for probe in probes
        if probe.measured()
    }
    add_rounding(found, wanted)
    return {site: {label: (a, b) for label, (a, b) in own.items()} for site, own in found.items()}


def _searched_loss(logits: Tensor, targets: Tensor, teacher: Teacher | None, start: int) -> Tensor:
    """The sum over predicted tokens of what the study minimises, in nats."""
    if teacher is None:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return divergence_from(torch.log_softmax(logits, dim=-1).flatten(0, 1), teacher, start * logits.shape[1])


class _Probe:
    """One site under the passes: gradients of the loss arrive, and where labels are drawn theirs after them."""

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        options: Sequence[Option],
        current: Mapping[str, Option],
        dense: Mapping[str, nn.Module],
        store: FactorStore,
        failures: Failures,
    ) -> None:
        self.model = model
        self.site = site
        self.arrivals = Arrivals(model, site, failures)
        self.dense = dense
        self.now = current.get(site.name, DENSE_OPTION)
        self.store = store
        self.options = options
        labels = [DENSE_OPTION.label, *(option.label for option in options)]
        self.first, self.second = dict.fromkeys(labels, 0.0), dict.fromkeys(labels, 0.0)  # sums over tokens of a, b

    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(module path, forward hook) at every anchor."""
        return [(part.anchor.path, self.arrivals.spared(self._hook(part))) for part in self.site.parts]

    def measured(self) -> bool:
        """Whether the site's gradients came."""
        return self.arrivals.came()

    def _hook(self, part: Site) -> Callable[..., None]:
        dense = self.dense[part.anchor.path]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # HRM runs its blocks without a gradient first
                return
            tokens = tokens_at(self.model, part.anchor.path)

            def arrived(gradient: Tensor) -> None:  # when what it needs is complete
                g = gradient.flatten(0, -2)  # (tokens, m)
                x = arriving(inputs)
                moved = {DENSE_OPTION.label: _along_dense(dense, g, x)}
                moved |= products(self.options, self.site, part, self.store, dense, g, x)
                base = moved[self.now.label]
                self.arrivals.add(tokens, {label: value - base for label, value in moved.items()})

            output.register_hook(self.arrivals.spared(arrived))

        return hook

    def settle(self, slopes: bool = False, curvature: float = 0.0) -> None:
        """After a backward pass, add its gradients up: as ``slopes``, and their squares by the factor ``curvature``."""
        for label, change in self.arrivals.take().items():  # (tokens,), of all parts together
            if slopes:
                self.first[label] += float(change.sum())
            if curvature:
                self.second[label] += 0.5 * curvature * float(change.square().sum())


def _along_dense(dense: nn.Module, g: Tensor, x: Tensor) -> Tensor:
    """gᵀ W x (tokens,), without bias, or gᵀ e; the module may carry our hook, which calling it would set off."""
    y = nn.functional.linear(x, weight_of(dense)) if x.is_floating_point() else dense.forward(x)
    along: Tensor = (g.float() * y.float()).sum(1)
    return along
