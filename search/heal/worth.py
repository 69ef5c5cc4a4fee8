"""The widths that a knapsack over what components are worth gives all low-rank sites, at any share of their size.

    D_i(b) = ½ (1/N) Σ_t (Σ_{k > b} h_tᵀ L_k R_k x_t)²,    h the gradient of −log p(y), y drawn from the model itself

the Fisher quadratic of cutting site i to b components; see `factors.gradient`. Slices are cut by it, so these are the
widths to train at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfront.methods import Option
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.search.factors.gradient import BATCH_TOKENS, arriving, drawn_loss
from rankfront.search.inputs.reached import differentiated
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import TINY, Line, Menu

TOKENS = 4_096  # that worth is measured on; guess
LEVELS = 32  # widths of a site that are looked at; guess


def widths_at(
    model: Any, sites: Sequence[Sequence[nn.Module]], windows: Tensor, shares: Sequence[float], seed: int
) -> list[list[int]]:
    """For each of ``shares``, the width of every site, which all its modules have, that together store at most that
    share; by ``windows`` (W, L). Sites without a linear, which are embedding tables, have that share of their rank."""
    ranks = [len(site[0].right) for site in sites]  # type: ignore[arg-type]
    tails = _tails(model, sites, windows[: max(1, TOKENS // windows.shape[1])], seed)
    lines, widths = {}, {}
    for number, tail in tails.items():
        rank = ranks[number]
        factors = {id(factor): factor for m in sites[number] for factor in m.parameters() if factor.ndim == 2}
        values = sum(factor.numel() for factor in factors.values()) // rank  # of one component
        own = np.unique(np.linspace(1, rank, min(rank, LEVELS)).round().astype(int))[::-1]
        lost = np.maximum.accumulate([0.0, *(max(tail[width], TINY) for width in own[1:])])
        options = tuple(Option.of("width", width=int(width)) for width in own)
        widths[number] = own
        lines[number] = Line(str(number), options, own * values, lost)
    menu = Menu(tuple(lines.values()))
    solver = Lagrangian(menu) if lines else None
    found = []
    for share in shares:
        row = [max(1, round(share * rank)) for rank in ranks]
        if solver is not None:
            places = solver.solve(max(share * menu.dense, menu.least))
            for number, place in zip(lines, places, strict=True):
                row[number] = int(widths[number][place])
        found.append(row)
    return found


def _tails(model: Any, sites: Sequence[Sequence[nn.Module]], windows: Tensor, seed: int) -> dict[int, np.ndarray]:
    """D(b) for b = 0 … r − 1 of every site that has a linear, (r,), by its number."""
    paths = {module: path for path, module in model.named_modules()}
    linears = [[module for module in site if isinstance(module, LowRankLinear) and module.in_full] for site in sites]
    totals = {n: torch.zeros(own[0].rank, dtype=torch.float64) for n, own in enumerate(linears) if own}
    arrived: dict[int, Tensor] = {}  # of each site, h_tᵀ L_k R_k x_t (tokens, r), its modules added up

    def hook(number: int) -> Callable[..., None]:
        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = arriving(inputs)

            def backward(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2)
                made = (g @ module.left).float() * (x @ module.right.T).float()
                arrived[number] = made + arrived[number] if number in arrived else made

            if output.requires_grad:  # HRM runs its blocks without a gradient first
                output.register_hook(backward)

        return forward

    hooks = [(paths[module], hook(number)) for number, own in enumerate(linears) for module in own]
    generator = torch.Generator().manual_seed(seed)
    with differentiated(model, hooks):
        for ids in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, 1).float()
            drawn_loss(logits, generator).backward()
            for number, made in arrived.items():
                cut = made.flip(1).cumsum(1).flip(1)  # (tokens, r): Σ over components b …
                totals[number] += 0.5 * cut.square().sum(0).double().cpu()
            arrived.clear()
    return {number: (total / windows.numel()).numpy() for number, total in totals.items()}
