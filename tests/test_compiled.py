"""What torch's compiler makes of models and layers says what they say. In one file, for headers are compiled once."""

import copy

import common
import pytest
import torch
from test_method_laws import make_weight
from torch import nn
from transformers import StaticCache

from rankfront.methods._integers import rounded
from rankfront.methods.integer_matrix import FEW_TOKENS, IntegerMatrix
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.objectives import compiled, generate
from rankfront.search.plans.plan import Plan

# torch's compiler loads it itself
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_model_says_what_it_says_eagerly(resident):
    """By the compiler of the platform, token by token, with a static cache and a growing one: of one block, where every
    second site is treated and the others are dense. A second block would have kernels of the same kinds compiled."""
    wanted = list(resident.compressed.space.wanted().items())
    resident.compressed.apply(Plan.of({site.name: options[0] for site, options in wanted[::2]}))
    model = copy.deepcopy(resident.compressed.model)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    kinds = {type(module) for module in model.modules()}
    assert {nn.Linear, LowRankLinear} <= kinds
    ids, said = common.tokens(2, 5), {}
    for name, forward in (("eager", model), ("compiled", compiled(model))):
        calls = []

        def recorded(forward=forward, calls=calls, **inputs):
            out = forward(**inputs)
            calls.append(out.logits.clone())
            return out

        cache = None if name == "eager" else StaticCache(config=model.config, max_cache_len=8)
        generate(recorded, ids, 3, cache)
        said[name] = calls
    assert len(said["eager"]) == 4
    for ours, theirs in zip(said["compiled"], said["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


class Products(nn.Module):
    """Products with several matrices, of whose columns each takes as many of the input's as it has."""

    def __init__(self, matrices):
        super().__init__()
        self.matrices = nn.ModuleList(matrices)

    def forward(self, x):
        return [matrix(x[..., : matrix.columns]) for matrix in self.matrices]


def test_compiled_products_of_integers_are_the_eager_ones():
    """By the platform's compiler, which puts a kernel of its own in the place of what it recognises."""
    matrices = []
    for bits in (8, 4):
        for columns in (64, 72):
            found = rounded(make_weight((48, columns)), bits)
            matrices.append(IntegerMatrix(found.integers, found.scales.bfloat16(), bits, columns))
    products = Products(matrices)
    with torch.inference_mode():
        for tokens in (2, max(FEW_TOKENS.values()) + 1):
            x = torch.randn(tokens, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
            found, expected = torch.compile(products)(x), products(x)
            assert len(found) == 4
            torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
