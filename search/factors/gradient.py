"""Predicted divergence of every option alone, from one forward and one backward pass: the Fisher quadratic.

    d_i(o) = ½ (1/N) Σ_t δ_ti(o)²,    δ_ti(o) = g_tiᵀ (W_i − Ŵ_i) x_ti,

with x_ti the input of site i's weight at token t and g_ti the gradient of Σ −log p(y) with respect to its output, the
labels y of the N predicted tokens drawn from the model itself. E[g gᵀ] over such labels is the Fisher information,
which is the Hessian of KL(dense ‖ compressed) at zero, so d is the second-order divergence, tokens taken as
independent. For nested factors gᵀ Ŵ_r x is a running sum over components: all levels in one pass. What a joint
treatment does is, to first order or exactly, what a change of one of its weights would do: its site's anchor.

Sources: the Fisher as Hessian of KL, Martens (1412.1193) section 9.2; gradient scores of singular values in the manner
of ZS-SVD; the quadratic form over whole options is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankfront.methods import Factors, Option, Prepared, Site, get_method, measured_as
from rankfront.methods.layers import replacement
from rankfront.methods.unfused_experts import is_expert, routed_at
from rankfront.objectives import CAUSAL, Task
from rankfront.search.factors.calibration import Progress
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.joint_rounding import add_rounding
from rankfront.search.inputs.reached import UNREACHED, differentiated
from rankfront.search.inputs.recomputed import recomputed

BATCH_TOKENS = 1024  # tokens of one backward pass
PASS_TOKENS = 3  # a backward pass costs about two forward passes: tokens count threefold


class Prepares(Protocol):
    """Prepared tensors by site and option, and factors of them: a `FactorStore` or what stands for one."""

    def load(self, site: Site, option: Option) -> Prepared: ...

    def factors(self, site: Site, option: Option) -> Mapping[str, Factors]: ...


def quadratic_divergence(
    model: Any,
    windows: Tensor,
    wanted: Mapping[Site, Sequence[Option]],
    store: Prepares,
    seed: int,
    progress: Progress = lambda done, total: None,
    failures: Failures | None = None,
    task: Task = CAUSAL,
) -> dict[str, dict[str, float]]:
    """Site name -> option label -> nats a token, for every option wanted, from ``windows`` (W, L) through the dense
    ``model``. ``progress`` hears (windows done, windows in all).

    Sites that cannot be measured are left out and named in ``failures``; where there are none given, RuntimeError.
    """
    failed = Failures() if failures is None else failures
    generator = torch.Generator().manual_seed(seed)
    progress(0, len(windows))
    predicted = 0
    scored = [_Scored(model, site, options, store, failed) for site, options in wanted.items()]
    step = max(1, BATCH_TOKENS // windows.shape[1])
    hooks = [hook for s in scored for hook in s.hooks()]
    with recomputed(model, step * windows.shape[1]), differentiated(model, hooks):
        for start in range(0, len(windows), step):
            ids = windows[start : start + step].to(next(model.parameters()).device)
            logits = task.logits(model, ids).flatten(0, 1).float()  # (predicted, V); of causal models all tokens
            predicted += len(logits)
            drawn_loss(logits, generator).backward()
            for s in scored:
                s.settle()
            progress(min(start + step, len(windows)), len(windows))
    found: dict[str, dict[str, tuple[float, ...]]] = {
        s.site.name: {label: (total / predicted,) for label, total in s.totals.items()} for s in scored if s.measured()
    }
    if failures is None:
        failed.check()
    add_rounding(found, wanted)
    return {site: {label: value for label, (value,) in own.items()} for site, own in found.items()}


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(y) over tokens, for labels y drawn from ``logits`` (tokens, V) themselves."""
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")


def arriving(inputs: tuple[Tensor, ...]) -> Tensor:
    """What a linear or a table was given, token by token: x (tokens, n), or ids (tokens,)."""
    x = inputs[0].detach()
    return x.flatten(0, -2) if x.is_floating_point() else x.flatten()


Arrived = tuple[Tensor | None, dict[str, Tensor]]  # which tokens, where not all; label -> a number for each


class Arrivals:
    """What arrived at the anchors of one site in a backward pass: by option, a value for every token.

    Whatever goes wrong there is kept among ``failures``, and costs this site alone.
    """

    def __init__(self, model: nn.Module, site: Site, failures: Failures) -> None:
        self.site, self.failures = site, failures
        self.reached = all(is_expert(model, weight.path) for weight in site.weights)  # which may well get no token
        self._arrived: list[Arrived] = []  # of every part

    def spared(self, hook: Callable[..., None]) -> Callable[..., None]:
        """``hook``, of which an exception ends nothing but the measurement of the site."""

        def careful(*arguments: Any) -> None:
            if self.site.name not in self.failures:
                with self.failures.sparing(self.site.name):
                    hook(*arguments)

        return careful

    def add(self, tokens: Tensor | None, values: dict[str, Tensor]) -> None:
        """Of one part: which tokens, where not all; label -> a number for each."""
        self._arrived.append((tokens, values))

    def take(self) -> dict[str, Tensor]:
        """Label -> (tokens,), the parts added up; nothing where no token came. They are forgotten here."""
        arrived, self._arrived = self._arrived, []
        if arrived and self.site.name not in self.failures:
            self.reached = True
            with self.failures.sparing(self.site.name):
                return {label: together(arrived, label) for label in arrived[0][1]}
        return {}

    def came(self) -> bool:
        """Whether the site could be measured; where no token came, that is its failure."""
        if not self.reached:
            self.failures.setdefault(self.site.name, UNREACHED)
        return self.site.name not in self.failures


def tokens_at(model: nn.Module, path: str) -> Tensor | None:
    """Which tokens the linear at ``path`` was just given; None where all of them."""
    routed = routed_at(model, path)
    return None if routed is None else routed.tokens


def together(arrived: Sequence[Arrived], label: str) -> Tensor:
    """Sums of what arrived of all parts, token by token, (tokens,): experts of a mixture have a few of them each."""
    if all(tokens is None for tokens, _ in arrived):
        return torch.stack([part[label] for _, part in arrived]).sum(0)
    found = [(own, part[label]) for own, part in arrived if own is not None]
    total = found[0][1].new_zeros(1 + max((int(own.max()) for own, _ in found if len(own)), default=0))
    for own, values in found:
        total.index_add_(0, own, values)
    return total


class _Scored:
    """One site under the pass: sums over tokens for every option."""

    def __init__(
        self, model: nn.Module, site: Site, options: Sequence[Option], store: Prepares, failures: Failures
    ) -> None:
        self.model = model
        self.site = site
        self.options = options
        self.store = store
        self.arrivals = Arrivals(model, site, failures)
        self.totals = {option.label: 0.0 for option in options}

    def measured(self) -> bool:
        """Whether the site's gradients came; why not is kept."""
        return self.arrivals.came()

    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(module path, forward hook) at every anchor."""
        return [(part.anchor.path, self.arrivals.spared(self._hook(part))) for part in self.site.parts]

    def _hook(self, part: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # HRM runs its blocks without a gradient first
                return
            tokens = tokens_at(self.model, part.anchor.path)
            bias = getattr(module, "bias", None)
            x = arriving(inputs)
            outputs = output.detach()  # a hook that held ``output`` itself would keep the whole graph for good

            def arrived(gradient: Tensor) -> None:  # when what it needs is complete
                g = gradient.flatten(0, -2)  # (tokens, m)
                y = outputs.flatten(0, -2).float()  # (tokens, m)
                dense = (g.float() * (y if bias is None else y - bias.float())).sum(1)  # (tokens,) gᵀ W x
                along = products(self.options, self.site, part, self.store, module, g, x)
                self.arrivals.add(tokens, {label: dense - compressed for label, compressed in along.items()})

            output.register_hook(self.arrivals.spared(arrived))

        return hook

    def settle(self) -> None:
        """After a backward pass: the parts' δ add up to the site's."""
        for label, moved in self.arrivals.take().items():
            self.totals[label] += 0.5 * float(moved.square().sum())


def products(
    options: Sequence[Option], site: Site, part: Site, store: Prepares, dense: nn.Module, g: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """`Method.gradient_dot_outputs` at the anchor of a ``part`` of the ``site``, of options of several methods.

    Of an embedding table, ``dense``, gᵀ ê for the rows ê that x, token ids, look up. What rounding does to a joint site
    is left out: see `joint_rounding`.
    """
    if part.anchor.kind == "embedding":
        return {
            option.label: (g.float() * _looked_up(store.factors(site, option)["weight"], dense, x)).sum(1)
            for option in options
        }
    stand_in = {option: measured_as(site, option) for option in options}
    by_method: dict[str, list[Option]] = {}
    for option in dict.fromkeys(stand_in.values()):
        by_method.setdefault(option.method, []).append(option)
    found: dict[str, Tensor] = {}
    for name, chosen in by_method.items():
        method = get_method(name)
        if method.nested:
            found |= method.gradient_dot_outputs(part, store.load(site, chosen[0]), chosen, g, x)
        else:
            for option in chosen:
                found |= method.gradient_dot_outputs(part, store.load(site, option), [option], g, x)
    return {option.label: found[own.label] for option, own in stand_in.items()}


@torch.no_grad()
def _looked_up(factors: Factors, dense: nn.Module, ids: Tensor) -> Tensor:
    """The rows (tokens, width) that ``factors`` have for token ids in the place of the table ``dense``."""
    tensors = {name: tensor.to(ids.device) for name, tensor in factors.tensors.items()}
    rows: Tensor = replacement(dense, factors.kind, tensors, factors.settings)(ids)
    return rows.float()
