"""Low rank plus sparse: the best values on a support, alternations that descend, fast against published."""

import itertools

import common
import pytest
import torch
from test_fitted_laws import prepare, rebuilt
from test_method_laws import make_sample, make_weight
from torch import nn

from rankfront.methods import Gram, Grid, Option, Site, Weight, get_method
from rankfront.methods._fitted import measured
from rankfront.methods._scatter import columns_of, dense_of
from rankfront.methods._support import seeded_support
from rankfront.methods.layers import empty_replacement, replacement
from rankfront.methods.sltrain import fitted

SHAPES = [(24, 12), (12, 24), (48, 48)]
LARGER = [(48, 48), (96, 64), (64, 96)]


def error_of(name, weight, sample, option):
    return get_method(name).error(prepare(name, weight, sample, option), option)


def layer_of(name, weight, sample, option):
    factors = get_method(name).truncate(prepare(name, weight, sample, option), option)["weight"]
    return replacement(nn.Linear(*weight.shape[::-1], bias=False), factors.kind, factors.tensors, factors.settings)


def fit(weight, sample, rank, nonzeros, alternations, momentum):
    """The error of SLTrain's fit after some alternations."""
    gram, columns = Gram(sample.x.T @ sample.x), seeded_support(3, *weight.shape, nonzeros)
    left, right, values = fitted(weight.double(), gram, columns, rank, alternations, momentum)
    return float(measured(weight, left @ right + dense_of(values, columns, weight.shape[1]), gram)["error"])


@pytest.mark.parametrize("shape", SHAPES)
def test_sltrain_has_the_least_squares_values_of_every_row(shape):
    """Row by row, against the tokens themselves: minimise ‖X (w − l − s_Ω)‖."""
    weight, sample = make_weight(shape), make_sample(shape)
    layer = layer_of("sltrain", weight, sample, Option.of("sltrain", rank=2, nonzeros=3))
    columns = seeded_support(layer.seed, *shape, 3)
    rest = weight.double() - layer.left.double() @ layer.right.double()
    for row, places, values in zip(rest, columns, layer.values, strict=True):
        best = torch.linalg.lstsq(sample.x[:, places], sample.x @ row).solution
        torch.testing.assert_close(values.double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_sltrain_alternations_never_raise_the_error_and_the_first_beats_the_low_rank_part_alone(shape):
    weight, sample = make_weight(shape), make_sample(shape)
    errors = [fit(weight, sample, 3, 3, alternations, 0.0) for alternations in range(8)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    low_rank = Option.of("svd-llm", rank=3)
    alone = weight.double() - rebuilt("svd-llm", prepare("svd-llm", weight, sample, low_rank), low_rank, shape)
    assert errors[-1] < errors[0] < float((sample.x @ alone.T).square().sum())


@pytest.mark.parametrize("shape", LARGER)
def test_momentum_brings_six_alternations_near_a_hundred(shape):
    weight, sample = make_weight(shape), make_sample(shape)
    plain, fast, long = (fit(weight, sample, 4, 2, *steps) for steps in ((6, 0.0), (6, 0.9), (100, 0.0)))
    assert fast < plain
    assert fast <= 1.1 * long


def test_sltrain_draws_another_support_for_every_site():
    weight, statistics = make_weight((12, 24)), make_sample((12, 24)).statistics()
    option, seeds = Option.of("sltrain", rank=1, nonzeros=4), set()
    for path in ("a", "b"):
        site = Site(path, (Weight("weight", path, 12, 24),))
        prepared = get_method("sltrain").prepare(site, {"weight": weight}, {"weight": statistics}, [option])
        factors = get_method("sltrain").truncate(prepared, option)["weight"]
        assert "support" not in factors.tensors
        seeds.add(factors.settings["seed"])
    assert len(seeds) == 2


def test_sltrain_keeps_its_published_density_and_gives_the_rest_to_the_rank():
    site = common.linear_site(576, 1536)
    for option in get_method("sltrain").options(site, Grid((0.2, 0.5, 0.8), 8)).values():
        assert option["nonzeros"] == 46  # 0.03 · 1536


@pytest.mark.parametrize("name", ["oats", "oats-published"])
@pytest.mark.parametrize("shape", SHAPES)
def test_oats_keeps_the_entries_that_stand_out_most(name, shape):
    """Under its metric no other entry of a row of W − L weighs more, and the values are those of W − L."""
    weight, sample = make_weight(shape), make_sample(shape)
    layer = layer_of(name, weight, sample, Option.of(name, rank=2, nonzeros=5))
    rest = weight - (layer.left @ layer.right).detach()
    columns = columns_of(layer.support, *shape, 5)
    torch.testing.assert_close(layer.values.detach(), rest.gather(1, columns), rtol=1e-4, atol=1e-6)
    heights = rest.abs() * sample.x.square().sum(0).sqrt()
    inside = heights.gather(1, columns)
    outside = heights.scatter(1, columns, 0.0)
    assert (inside.amin(1) >= outside.amax(1) * (1 - 1e-4)).all()


@pytest.mark.parametrize("shape", LARGER)
@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("kind", ["plain", "outlier"])
def test_fast_oats_comes_near_the_published_setting(shape, keep, kind):
    weight, sample = make_weight(shape), make_sample(shape, kind)
    fast, published = (
        error_of(name, weight, sample, get_method(name).options(common.linear_site(*shape), Grid((keep,), 1))[keep])
        for name in ("oats", "oats-published")
    )
    assert fast <= 1.1 * published


@pytest.mark.parametrize("name", ["oats", "oats-published"])
def test_oats_finds_a_planted_sum(name):
    """Strong scattered entries on a weak subspace."""
    weight, sample = make_weight((64, 48)), make_sample((64, 48))
    generator = torch.Generator().manual_seed(4)
    planted = torch.randn(64, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    columns = seeded_support(9, 64, 48, 2)
    weight = planted + dense_of(20 + torch.rand(64, 2, generator=generator), columns, 48)
    layer = layer_of(name, weight, sample, Option.of(name, rank=2, nonzeros=2))
    assert torch.equal(columns_of(layer.support, 64, 48, 2), columns)
    torch.testing.assert_close(layer.matrix(), weight, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_oats_meets_the_kept_fraction_to_an_entry_a_row(shape):
    """Bits of the support among what is kept; a quarter of it is the low-rank part."""
    site, method = common.linear_site(*shape), get_method("oats")
    for keep, option in method.options(site, Grid((0.1, 0.3, 0.5, 0.7, 0.9), 1)).items():
        stored = method.storage(site, option).parameters
        assert abs(stored - keep * site.storage.parameters) <= 2 * shape[0]
        assert abs(option["rank"] * sum(shape) - 0.25 * keep * site.storage.parameters) <= sum(shape)


@pytest.mark.parametrize("name", ["sltrain", "oats"])
def test_a_layer_loaded_from_its_state_runs_the_same(name):
    """The support is decoded after loading, not from what stood there when the layer was built."""
    weight, sample = make_weight((12, 24)), make_sample((12, 24))
    option = Option.of(name, rank=1, nonzeros=5)
    factors = get_method(name).truncate(prepare(name, weight, sample, option), option)["weight"]
    full = layer_of(name, weight, sample, option)
    empty = empty_replacement(nn.Linear(24, 12, bias=False), factors.kind, factors.settings)
    empty.load_state_dict(full.state_dict())
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(empty(x), full(x))
    assert "columns" not in full.state_dict()


@pytest.mark.parametrize("name", ["sltrain", "oats"])
def test_the_layer_runs_compiled(name):
    layer = layer_of(name, make_weight((12, 24)), make_sample((12, 24)), Option.of(name, rank=1, nonzeros=5))
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_low_rank_plus_sparse_can_beat_either_alone():
    """Of a weight with outliers, at no more parameters than plain low rank of the same metric's family."""
    weight, sample = make_weight((48, 48)), make_sample((48, 48))
    weight = weight + dense_of(torch.full((48, 2), 3.0), seeded_support(2, 48, 48, 2), 48)
    site, loss = common.linear_site(48, 48), {}
    for name in ("svd-llm", "oats"):
        option = get_method(name).options(site, Grid((0.4,), 1))[0.4]
        delta = weight.double() - rebuilt(name, prepare(name, weight, sample, option), option, (48, 48))
        loss[name] = float((sample.x @ delta.T).square().sum())
    assert loss["oats"] < loss["svd-llm"]
