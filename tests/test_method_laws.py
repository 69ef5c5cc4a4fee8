"""Laws that every method keeps, over every row of `rows.METHOD_ROWS`, shape, dtype and kind of sample."""

import itertools
import math

import common
import pytest
import torch
from rows import EXPERT_METHODS, FITTED_ROWS, JOINT_METHODS, METHOD_ROWS, SHARED_METHODS, Sample, prepared_once
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfront.methods import FAMILIES, Grid, InputError, Option, Site, Weight, get_method, method_names
from rankfront.methods.layers import replacement

SHAPES = [(24, 10), (10, 24), (16, 16), (3, 17), (1, 9), (9, 1), (2, 2)]  # tall, wide, square, awkward
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLES = ["plain", "outlier", "few tokens", "one token", "dead inputs"]
FLOOR = 1e-5  # of the whole loss: what floors on weights and fp32 factors may add to a predicted error


def crossed(shapes, others):
    """All of ``others`` with a tall and a wide shape, the first two, and the first of them with every shape."""
    return [(shape, *other) for shape in shapes for other in (others if shape in shapes[:2] else others[:1])]


def id_of(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


# Every kind of sample in fp32, every dtype with a plain one.
NUMBERS = [(torch.float32, kind) for kind in (*SAMPLES, "zero")] + [(dtype, "plain") for dtype in DTYPES[1:]]
# Every special weight with a plain sample, every kind of sample with one.
SINGULAR = [(special, "plain") for special in ("rank one", "zero", "tiny", "huge")]
SINGULAR += [("rank one", kind) for kind in (*SAMPLES[1:], "zero")]

each_method = pytest.mark.parametrize("name", METHOD_ROWS)
each_gridded = pytest.mark.parametrize("name", [name for name, row in METHOD_ROWS.items() if row.gridded])
each_needy = pytest.mark.parametrize("name", [name for name, row in METHOD_ROWS.items() if row.needs])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=id_of)
each_dtype = pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, [(dtype,) for dtype in DTYPES]), ids=id_of)
each_sample = pytest.mark.parametrize(("shape", "kind"), crossed(SHAPES, [(kind,) for kind in SAMPLES]), ids=id_of)
each_number = pytest.mark.parametrize(("shape", "dtype", "kind"), crossed(SHAPES, NUMBERS), ids=id_of)
each_singular = pytest.mark.parametrize(("shape", "special", "kind"), crossed(SHAPES, SINGULAR), ids=id_of)
KEEPS = (0.05, 0.2, 0.35, 0.5, 0.7, 0.9, 0.999)


def make_weight(shape, dtype=torch.float32, seed=0):
    """Random W (m, n) with a decaying spectrum."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, m, generator=generator), torch.randn(m, n, generator=generator)
    return (left @ (right * torch.arange(1, m + 1)[:, None] ** -0.7) / m).to(dtype)


def make_sample(shape, kind="plain", seed=1):
    """Correlated inputs and output gradients, or a singular variety of them."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    count = {"few tokens": max(1, n // 2), "one token": 1}.get(kind, 3 * n + 5)
    x = torch.randn(count, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64) + 0.3
    if kind == "outlier":
        x[:, 0] *= 300
    if kind == "dead inputs":
        x[:, ::3] = 0
    g = torch.randn(count, m, generator=generator, dtype=torch.float64)
    if kind == "zero":
        x, g = 0 * x, 0 * g
    return Sample(x, g)


def prepare(name, weight, sample, options=None):
    ladder = METHOD_ROWS[name].ladder(name, *weight.shape) if options is None else options
    return prepared_once(name, METHOD_ROWS[name].site(*weight.shape), weight, sample, ladder)


def rebuilt(name, prepared, option):
    """Ŵ (m, n) in fp64."""
    tensors = get_method(name).truncate(prepared, option)["weight"].tensors
    return tensors["left"].double() @ tensors["right"].double()


def ladder_of(name, weight):
    return METHOD_ROWS[name].ladder(name, *weight.shape)


def left_of(row, sample, weight):
    """R (m, m)."""
    return torch.eye(len(weight), dtype=torch.float64) if row.left is None else row.left(sample)


def optimum(weight, left, root, rank):
    """Σ_{i > rank} σ_i²(R W S), the least loss that any matrix of that rank has."""
    return float(torch.linalg.svdvals(left @ weight.double() @ root)[rank:].square().sum())


def test_every_method_has_a_row():
    assert sorted([*METHOD_ROWS, *FITTED_ROWS, *JOINT_METHODS, *SHARED_METHODS, *EXPERT_METHODS]) == sorted(
        method_names()
    )


@pytest.mark.parametrize("name", method_names())
def test_has_its_place_in_the_taxonomy(name):
    method = get_method(name)
    assert method.family in FAMILIES
    assert method.geometry
    assert method.paper
    assert method.formula


@each_method
def test_says_what_it_needs(name):
    method = get_method(name)
    assert method.needs == METHOD_ROWS[name].needs
    assert method.name == name


@each_method
@each_dtype
def test_factors_have_the_shape_of_the_weight(name, shape, dtype):
    """left (m, r) and right (r, n), in fp32 whatever the weight came in; the product is near W's own dtype."""
    weight, sample = make_weight(shape, dtype), make_sample(shape)
    prepared = prepare(name, weight, sample)
    for option in ladder_of(name, weight):
        factors = get_method(name).truncate(prepared, option)["weight"]
        rank = option["rank"]
        assert {key: tuple(value.shape) for key, value in factors.tensors.items()} == {
            "left": (shape[0], rank),
            "right": (rank, shape[1]),
        }
        assert all(tensor.dtype == torch.float32 for tensor in factors.tensors.values())
        assert all(torch.isfinite(tensor).all() for tensor in factors.tensors.values())


@each_method
@each_shape
def test_preparing_twice_gives_the_same(name, shape):
    weight, statistics, site = make_weight(shape), make_sample(shape).statistics(), METHOD_ROWS[name].site(*shape)
    first = prepare(name, weight, make_sample(shape))
    second = get_method(name).prepare(site, {"weight": weight}, {"weight": statistics}, ladder_of(name, weight))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_method
def test_preparing_leaves_its_inputs_alone(name):
    weight, sample = make_weight((12, 8)), make_sample((12, 8))
    before, statistics = weight.clone(), sample.statistics()
    raw = {"gram": statistics.gram.raw.clone(), "absolute": statistics.absolute.clone()}
    site = METHOD_ROWS[name].site(*weight.shape)
    get_method(name).prepare(site, {"weight": weight}, {"weight": statistics}, ladder_of(name, weight))
    assert torch.equal(weight, before)
    assert torch.equal(statistics.gram.raw, raw["gram"])
    assert torch.equal(statistics.absolute, raw["absolute"])


@each_method
@each_number
def test_full_level_reproduces_the_weight(name, shape, dtype, kind):
    weight = make_weight(shape, dtype)
    prepared = prepare(name, weight, make_sample(shape, kind))
    full = ladder_of(name, weight)[-1]
    torch.testing.assert_close(rebuilt(name, prepared, full), weight.double(), rtol=1e-5, atol=1e-5)


@each_method
@each_sample
def test_predicted_error_is_the_measured_one(name, shape, kind):
    """error(option) is the loss of Δ = W − Ŵ, measured token by token."""
    weight, sample, row = make_weight(shape), make_sample(shape, kind), METHOD_ROWS[name]
    prepared = prepare(name, weight, sample)
    whole = row.loss(weight.double(), sample)
    spread = float(weight.double().square().sum() * row.root(sample).square().mean())
    for option in ladder_of(name, weight):
        measured = row.loss(weight.double() - rebuilt(name, prepared, option), sample)
        predicted = get_method(name).error(prepared, option)
        assert math.isclose(predicted, measured, rel_tol=1e-3, abs_tol=FLOOR * (whole + spread)), option


@each_method
@each_sample
def test_error_never_rises_with_level(name, shape, kind):
    weight, sample, row = make_weight(shape), make_sample(shape, kind), METHOD_ROWS[name]
    prepared = prepare(name, weight, sample)
    whole = row.loss(weight.double(), sample)
    options = ladder_of(name, weight)
    predicted = [get_method(name).error(prepared, option) for option in options]
    measured = [row.loss(weight.double() - rebuilt(name, prepared, option), sample) for option in options]
    assert all(later <= earlier for earlier, later in itertools.pairwise(predicted))
    assert all(later <= earlier + 1e-6 * whole for earlier, later in itertools.pairwise(measured))
    assert predicted[-1] == pytest.approx(0, abs=1e-12 * (1 + whole))


@each_method
@each_sample
def test_no_worse_than_plain_svd_in_its_own_norm(name, shape, kind):
    weight, sample, row = make_weight(shape), make_sample(shape, kind), METHOD_ROWS[name]
    prepared, plain = prepare(name, weight, sample), prepare("svd", weight, sample)
    whole = row.loss(weight.double(), sample)
    for option in ladder_of(name, weight):
        ours = row.loss(weight.double() - rebuilt(name, prepared, option), sample)
        svd = Option.of("svd", rank=option["rank"])
        assert ours <= row.loss(weight.double() - rebuilt("svd", plain, svd), sample) + FLOOR * whole


@each_method
@each_sample
def test_loss_is_the_least_of_its_rank(name, shape, kind):
    """No rank-r matrix does better under ‖Δ S‖_F than the tail of the spectrum of W S (Eckart & Young)."""
    weight, sample, row = make_weight(shape), make_sample(shape, kind), METHOD_ROWS[name]
    prepared, root = prepare(name, weight, sample), row.root(sample)
    whole = row.loss(weight.double(), sample)
    for option in ladder_of(name, weight):
        best = optimum(weight, left_of(row, sample, weight), root, option["rank"])
        ours = row.loss(weight.double() - rebuilt(name, prepared, option), sample)
        assert ours == pytest.approx(best, rel=1e-3, abs=FLOOR * whole)
        assert ours >= best - 1e-6 * whole


@each_method
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_matrix_is_the_truncated_svd_of_ws_times_the_inverse(name, shape):
    """Ŵ = R⁻¹ [R W S]_r S⁻¹ where S can be inverted."""
    weight, sample = make_weight(shape), make_sample(shape)
    root, left = METHOD_ROWS[name].root(sample), left_of(METHOD_ROWS[name], sample, weight)
    square = torch.linalg.cholesky(root @ root.T)
    u, s, vh = torch.linalg.svd(left @ weight.double() @ square, full_matrices=False)
    prepared = prepare(name, weight, sample)
    for option in ladder_of(name, weight):
        r = option["rank"]
        reference = torch.linalg.inv(left) @ (u[:, :r] * s[:r]) @ vh[:r] @ torch.linalg.inv(square)
        torch.testing.assert_close(rebuilt(name, prepared, option), reference, rtol=2e-3, atol=2e-4)


@each_method
@each_shape
def test_zero_statistics_fall_to_plain_svd(name, shape):
    """Where calibration saw only zeros, no direction weighs more than another."""
    weight, sample = make_weight(shape), make_sample(shape, "zero")
    prepared, plain = prepare(name, weight, sample), prepare("svd", weight, sample)
    for option in ladder_of(name, weight):
        svd = rebuilt("svd", plain, Option.of("svd", rank=option["rank"]))
        torch.testing.assert_close(rebuilt(name, prepared, option), svd, rtol=1e-4, atol=1e-5)


@each_method
@each_singular
def test_singular_weights_give_finite_factors(name, shape, kind, special):
    m, n = shape
    weight = {
        "zero": torch.zeros(m, n),
        "rank one": torch.ones(m, n),
        "tiny": 1e-20 * make_weight(shape),
        "huge": 1e15 * make_weight(shape),
    }[special]
    prepared = prepare(name, weight, make_sample(shape, kind))
    assert all(torch.isfinite(tensor).all() for tensor in prepared.values())
    full = rebuilt(name, prepared, ladder_of(name, weight)[-1])
    torch.testing.assert_close(full, weight.double(), rtol=1e-5, atol=1e-5 * float(weight.abs().max()))


@each_needy
def test_statistics_that_are_not_finite_are_refused(name):
    sample = make_sample((6, 5))
    sample.x[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        prepare(name, make_weight((6, 5)), sample)


@each_needy
def test_missing_statistics_are_named(name):
    sample = make_sample((6, 5))
    statistics = sample.statistics()
    for need in get_method(name).needs:
        setattr(statistics, need, None)
    with pytest.raises(ValueError, match=get_method(name).needs[0]):
        get_method(name).prepare(
            METHOD_ROWS[name].site(6, 5), {"weight": make_weight((6, 5))}, {"weight": statistics}, []
        )


@each_method
@each_shape
def test_factors_survive_half_precision(name, shape):
    """The norm of each component is shared by its two sides, so that rounding them costs little."""
    weight = make_weight(shape)
    prepared = prepare(name, weight, make_sample(shape, "outlier"))
    left, right = prepared["left"].T.bfloat16().double(), prepared["right"].bfloat16().double()
    difference = (left @ right - weight.double()).norm()
    assert difference <= 0.02 * prepared["left"].norm() * prepared["right"].norm()
    torch.testing.assert_close(prepared["left"].norm(dim=1), prepared["right"].norm(dim=1), rtol=1e-4, atol=1e-6)


@each_method
@each_shape
def test_claimed_storage_is_what_the_tensors_hold(name, shape):
    weight, row = make_weight(shape), METHOD_ROWS[name]
    prepared = prepare(name, weight, make_sample(shape))
    for option in row.ladder(name, *shape):
        factors = get_method(name).truncate(prepared, option)
        held = sum(tensor.numel() for each in factors.values() for tensor in each.tensors.values())
        assert sum(each.storage.values for each in factors.values()) == held
        assert get_method(name).storage(row.site(*shape), option).values == held


@each_gridded
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (50, 50), (576, 192), (96, 7)])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_options_lie_on_the_grid_and_under_dense(name, shape, multiple):
    site = METHOD_ROWS[name].site(*shape)
    for keep, option in get_method(name).options(site, Grid(KEEPS, multiple)).items():
        assert keep in KEEPS
        assert option.method == name
        assert option["rank"] >= multiple
        assert option["rank"] % multiple == 0
        assert get_method(name).storage(site, option).parameters < site.storage.parameters


@each_gridded
@pytest.mark.parametrize("shape", [(64, 48), (50, 50), (576, 192)])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_keep_goes_to_the_nearest_level(name, shape, multiple):
    """Of the levels on the grid and under dense, none keeps a fraction nearer to what was asked."""
    m, n = shape
    site = METHOD_ROWS[name].site(m, n)
    options = get_method(name).options(site, Grid(KEEPS, multiple))
    levels = [r for r in range(multiple, min(m, n) + 1, multiple) if r * (m + n) < m * n]
    assert set(options) == set(KEEPS)
    for keep, option in options.items():
        gap = abs(option["rank"] * (m + n) / (m * n) - keep)
        assert gap <= min(abs(r * (m + n) / (m * n) - keep) for r in levels) + 1e-12


@each_gridded
def test_too_coarse_a_grid_offers_nothing(name):
    assert get_method(name).options(METHOD_ROWS[name].site(12, 12), Grid((0.5,), 8)) == {}


@each_method
@each_shape
def test_what_it_cannot_do_has_a_reason(name, shape):
    """Nothing to offer on the finest grid means a reason, and the other way round."""
    site = METHOD_ROWS[name].site(*shape)
    offered = get_method(name).options(site, Grid(KEEPS, 1))
    assert bool(offered) == (get_method(name).refuses(site) is None)


@each_method
def test_several_weights_are_refused_with_a_reason(name):
    pair = Site("pair", (Weight("gate", "gate", 64, 48), Weight("up", "up", 64, 48)))
    assert get_method(name).refuses(pair)
    assert get_method(name).options(pair, Grid(KEEPS, 8)) == {}


@each_method
def test_embedding_tables_only_without_statistics(name):
    table = common.linear_site(96, 32, kind="embedding")
    method, allowed = get_method(name), METHOD_ROWS[name].embedding
    assert (method.refuses(table) is None) == allowed
    assert bool(method.options(table, Grid(KEEPS, 1))) == allowed


@each_method
@each_shape
def test_more_than_was_prepared_is_refused(name, shape):
    weight = make_weight(shape)
    prepared = prepare(name, weight, make_sample(shape))
    with pytest.raises(InputError, match="rebuild"):
        get_method(name).truncate(prepared, common.rank_option(name, min(shape) + 1))


def modules(shape, kind):
    """A dense module of W (m, n), with a bias where the kind says so."""
    m, n = shape
    if kind == "conv1d":
        dense = Conv1D(m, n)
        dense.weight = nn.Parameter(make_weight(shape).T.contiguous())
        dense.bias = nn.Parameter(torch.linspace(-1, 1, m))
        return dense
    dense = nn.Linear(n, m, bias=kind == "bias")
    dense.weight = nn.Parameter(make_weight(shape))
    return dense


@each_method
@each_shape
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_layer_computes_what_its_matrix_does(name, shape, kind):
    dense = modules(shape, kind)
    prepared = prepare(name, make_weight(shape), make_sample(shape))
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(2))
    for option in ladder_of(name, make_weight(shape)):
        factors = get_method(name).truncate(prepared, option)["weight"]
        layer = replacement(dense, factors.kind, factors.tensors)
        torch.testing.assert_close(layer.matrix().double(), rebuilt(name, prepared, option), rtol=1e-5, atol=1e-5)
        expected = nn.functional.linear(x, layer.matrix(), getattr(dense, "bias", None))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)  # the last level reproduces W


@each_method
def test_gradients_reach_the_factors(name):
    """Of loss = Σ y, ∂/∂left = 1 (right Σx)ᵀ and ∂/∂right = (leftᵀ 1) (Σx)ᵀ."""
    weight = make_weight((12, 8))
    prepared = prepare(name, weight, make_sample((12, 8)))
    factors = get_method(name).truncate(prepared, common.rank_option(name, 3))["weight"]
    layer = replacement(nn.Linear(8, 12), factors.kind, factors.tensors).requires_grad_(True)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    layer(x).sum().backward()
    total = x.sum(0)
    torch.testing.assert_close(layer.left.grad, (layer.right @ total).expand(12, 3))
    torch.testing.assert_close(layer.right.grad, torch.outer(layer.left.sum(0), total))
    torch.testing.assert_close(layer.bias.grad, torch.full((12,), 5.0))
