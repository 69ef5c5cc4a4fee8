"""Predicted divergence of every option from one forward and one backward pass: the Fisher quadratic.

    d(option) = ½ (1/N) Σ_t (g_tᵀ (W − Ŵ) x_t)²,

with x_t a weight's input at token t and g_t the gradient of Σ −log p(y) with respect to its output, the labels y
drawn from the model itself. E[g gᵀ] over such labels is the Fisher information, which is the Hessian of
KL(dense ‖ compressed) at zero, so d is the second-order divergence of compressing that one weight, tokens taken
as independent. For nested low-rank factors g_tᵀ Ŵ_r x_t is a running sum over components: all ranks in one pass.

Sources: the Fisher as Hessian of KL, Martens (1412.1193) section 9.2; gradient scores of singular values in the manner
of ZS-SVD; the quadratic form over whole options is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import Factors, Option, Site, get_method
from rankfront.methods.layers import LAYERS
from rankfront.search.factors import FactorStore

BATCH_TOKENS = 1024  # tokens of one backward pass
PASS_TOKENS = 3  # a backward pass costs about two forward passes: tokens count threefold


def quadratic_divergence(
    model: Any, windows: Tensor, wanted: Mapping[Site, Sequence[Option]], store: FactorStore, seed: int
) -> dict[str, dict[str, float]]:
    """Site name -> option label -> predicted divergence in nats a token, for every option wanted.

    ``model`` must be dense; ``windows`` (W, L). Sites whose inputs are token ids get no prediction.
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, dict[str, float]] = {}
    handles = [
        model.get_submodule(site.weights[0].path).register_forward_hook(_hook(site, options, store, totals))
        for site, options in wanted.items()
        if len(site.weights) == 1 and site.weights[0].kind == "linear"
    ]
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_(True)
        )
    )
    step = max(1, BATCH_TOKENS // windows.shape[1])
    try:
        for start in range(0, len(windows), step):
            ids = windows[start : start + step].to(next(model.parameters()).device)
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()  # (tokens, V)
                labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return {site: {label: total / windows.numel() for label, total in found.items()} for site, found in totals.items()}


def _hook(
    site: Site, options: Sequence[Option], store: FactorStore, totals: dict[str, dict[str, float]]
) -> Callable[..., None]:
    """A forward hook that adds ½ Σ_t (g_tᵀ (W − Ŵ) x_t)² of every option to ``totals`` when the gradient arrives."""
    sums = totals.setdefault(site.name, {option.label: 0.0 for option in options})
    nested: dict[str, list[Option]] = {}
    for option in options:
        nested.setdefault(option.method, []).append(option)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        bias = getattr(module, "bias", None)

        def arrived(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float()  # (tokens, m)
            x = inputs[0].detach().flatten(0, -2).float()  # (tokens, n)
            y = output.detach().flatten(0, -2).float()  # (tokens, m)
            dense = (g * (y if bias is None else y - bias.float())).sum(1)  # (tokens,) gᵀ W x
            for method, chosen in nested.items():
                for option, compressed in _products(method, chosen, site, store, g, x):
                    sums[option.label] += 0.5 * float((dense - compressed).square().sum())

        output.register_hook(arrived)

    return hook


def _products(
    method: str, options: Sequence[Option], site: Site, store: FactorStore, g: Tensor, x: Tensor
) -> list[tuple[Option, Tensor]]:
    """(option, gᵀ Ŵ x (tokens,)) for every option of one method at one site."""
    role = site.weights[0].role
    if get_method(method).nested:
        largest = max(options, key=lambda option: int(option["rank"]))
        tensors = store.factors(site, largest)[role].tensors
        left, right = (tensors[name].to(g.device).float() for name in ("left", "right"))
        running = ((g @ left) * (x @ right.T)).cumsum(1)  # (tokens, r)
        return [(option, running[:, int(option["rank"]) - 1]) for option in options]
    return [(option, (g * _run(store.factors(site, option)[role], x)).sum(1)) for option in options]


def _run(factors: Factors, x: Tensor) -> Tensor:
    """Ŵ x (tokens, m), without bias."""
    tensors = {name: tensor.to(x.device).float() for name, tensor in factors.tensors.items()}
    y: Tensor = LAYERS[factors.kind](**tensors)(x)
    return y
