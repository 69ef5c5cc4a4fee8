"""Training from scratch in a plan's form: what an export stores, initialised anew, and everything of it trains.

    y = (B A + S_Ω) x,    B = 0,    A ~ (α/r) U(±1/√n),    values of S ~ U(±1/√n),    Ω drawn by a seed

Source: SLTrain (2406.02214). It multiplies B A by α/r; here A holds that factor, so that B trains as there and A at r/α
times the rate. Low rank alone cannot start with B = 0: queries and keys, or both branches of a gated MLP, would be zero
and so the gradients of either. It starts at the truncated SVD of the dense weight that the model's own initialiser
draws, as in 2209.13569. Everything else is what that initialiser draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.methods.factored import dense_config
from rankfront.methods.integer_matrix import FactorModule
from rankfront.methods.layers import weight_of
from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear
from rankfront.methods.layers_sparse_sum import LowRankSparseLinear
from rankfront.methods.truncation import truncated
from rankfront.search.heal.trainable import Parameter, factored_modules

SCALE = 0.25  # α/r of SLTrain's smallest model, 32 / 128


def everything(model: Any) -> list[Parameter]:
    """Every floating tensor of ``model``, each once, all at one rate."""
    return [
        Parameter(name, tensor, "factor") for name, tensor in model.named_parameters() if tensor.is_floating_point()
    ]


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Draw all that ``model``, which runs a plan, stores anew; supports that a seed drew stay.

    Raises `InputError` where the plan has anything but low rank, and low rank with values on a drawn support.
    """
    for path, module in factored_modules(model).items():
        drawn = isinstance(module, LowRankSparseLinear) and module.support is None
        fits = drawn or isinstance(module, LowRankLinear | LowRankEmbedding)
        if not (fits and isinstance(module, FactorModule) and module.in_full):
            raise InputError(
                f"{path} is a {type(module).__name__}, which has no initialisation: train plans of low-rank methods and"
                " sltrain from scratch"
            )
    fresh = _fresh(model, seed)
    generator = torch.Generator().manual_seed(seed)
    known = dict(fresh.named_parameters())
    for name, tensor in model.named_parameters():
        if name in known:
            tensor.copy_(known[name])
    done: set[int] = set()  # a table and a head may be the same factors
    for path, module in factored_modules(model).items():
        stored: Any = module
        if id(stored.left) in done:
            continue
        done.add(id(stored.left))
        if isinstance(module, LowRankSparseLinear):
            module.left.zero_()
            module.right.copy_(SCALE * _uniform(module.right, module.in_features, generator))
            module.values.copy_(_uniform(module.values, module.in_features, generator))
        else:
            cut = truncated(weight_of(fresh.get_submodule(path)), None, stored.rank)
            stored.left.copy_(cut.left)
            stored.right.copy_(cut.inner)
            stored.balance()


def _fresh(model: Any, seed: int) -> Any:
    """A dense model of the same configuration, as its class initialises it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(dense_config(model.config))


def _uniform(like: Tensor, inputs: int, generator: torch.Generator) -> Tensor:
    """U(±1/√n), of the shape of ``like``; of a matrix (r, n), Kaiming's with a = √5."""
    drawn = 2 * torch.rand(like.shape, generator=generator) - 1
    scaled: Tensor = drawn * inputs**-0.5
    return scaled
