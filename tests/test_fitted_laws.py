"""Laws of the methods that fit each level anew (dictionaries, tensor formats, ...), over `rows.FITTED_ROWS`."""

import copy
import itertools
import math
import random
from collections import Counter

import common
import pytest
import torch
from common import save_folder
from launching import make_run, measured, small_data, verify_here
from rows import FITTED_ROWS, prepared_once
from test_method_laws import (
    DTYPES,
    KEEPS,
    NUMBERS,
    SAMPLES,
    SINGULAR,
    crossed,
    id_of,
    make_sample,
    make_weight,
    modules,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rankfront.methods import Grid, Site, Weight, get_method
from rankfront.methods._fitted import matrix_of
from rankfront.methods.layers import empty_replacement, layers, replacement
from rankfront.methods.layers_tensor import Network
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

SHAPES = [(24, 12), (12, 24), (16, 16), (15, 34), (13, 17)]  # tall, wide, square, awkward, prime
FLOOR = 1e-5  # of the whole loss

FAST = [name for name, row in FITTED_ROWS.items() if not row.slow]


def cases(others=((),), rows=FITTED_ROWS):
    """A method, a shape and one of ``others``; of a slow row, the code of another at a published setting: one."""
    slow = crossed(SHAPES, others)[:1]
    return [(name, *case) for name in rows for case in (slow if FITTED_ROWS[name].slow else crossed(SHAPES, others))]


SAMPLED = [(kind,) for kind in SAMPLES]
FALLING = [name for name, row in FITTED_ROWS.items() if row.falls]
EXACT = [name for name, row in FITTED_ROWS.items() if row.exact(name, *SHAPES[0])]

each_method = pytest.mark.parametrize("name", FITTED_ROWS)
each_gridded = pytest.mark.parametrize("name", [name for name, row in FITTED_ROWS.items() if row.gridded])
each_needy = pytest.mark.parametrize("name", [name for name, row in FITTED_ROWS.items() if row.needs])
each_case = pytest.mark.parametrize(("name", "shape"), cases(), ids=id_of)
each_dtype = pytest.mark.parametrize(("name", "shape", "dtype"), cases([(dtype,) for dtype in DTYPES]), ids=id_of)
each_sample = pytest.mark.parametrize(("name", "shape", "kind"), cases(SAMPLED), ids=id_of)
each_falling = pytest.mark.parametrize(("name", "shape", "kind"), cases(SAMPLED, FALLING), ids=id_of)
each_exact = pytest.mark.parametrize(("name", "shape", "dtype", "kind"), cases(NUMBERS, EXACT), ids=id_of)
each_singular = pytest.mark.parametrize(("name", "shape", "special", "kind"), cases(SINGULAR), ids=id_of)


def walked(name, shape):
    """Options from the cheapest to the dearest."""
    row, method, site = FITTED_ROWS[name], get_method(name), common.linear_site(*shape)
    if row.own is not None:
        return row.own(name, *shape)
    offered = set(method.options(site, Grid(KEEPS, 1)).values())
    return sorted(offered, key=lambda option: method.storage(site, option).parameters)


def prepare(name, weight, sample, option):
    return prepared_once(name, common.linear_site(*weight.shape), weight, sample, [option])


def rebuilt(name, prepared, option, shape):
    """Ŵ (m, n) in fp64."""
    return matrix_of(get_method(name).truncate(prepared, option)["weight"], *shape).double()


@each_method
def test_says_what_it_needs(name):
    method = get_method(name)
    assert method.needs == FITTED_ROWS[name].needs
    assert method.name == name


@each_case
def test_it_offers_levels_or_says_why_not(name, shape):
    """Nothing to offer on the finest grid means a reason, and the other way round; what it offers is below dense."""
    site, method = common.linear_site(*shape), get_method(name)
    offered = method.options(site, Grid(KEEPS, 1))
    assert bool(offered) == (method.refuses(site) is None)
    costs = []
    for keep in sorted(offered):
        option = offered[keep]
        assert keep in KEEPS
        assert option.method == name
        method.check(option)
        costs.append(method.storage(site, option).bytes(2))
        assert 0 < costs[-1] < site.storage.bytes(2)
    assert costs == sorted(costs)


@each_gridded
@pytest.mark.parametrize("shape", [(576, 192), (576, 1536), (1536, 576), (512, 512)])
def test_levels_come_near_what_was_asked(name, shape):
    """Of a real weight, no offered level is further from the fraction asked for than a tenth of the weight."""
    site, method = common.linear_site(*shape), get_method(name)
    for keep, option in method.options(site, Grid((0.2, 0.4, 0.6, 0.8), 8)).items():
        assert abs(method.storage(site, option).parameters / site.storage.parameters - keep) <= 0.1, option


@each_dtype
def test_factors_are_finite_and_multiply_to_the_weights_shape(name, shape, dtype):
    weight, sample = make_weight(shape, dtype), make_sample(shape)
    for option in walked(name, shape):
        prepared = prepare(name, weight, sample, option)
        factors = get_method(name).truncate(prepared, option)["weight"]
        for tensor in factors.tensors.values():
            assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
            assert torch.isfinite(tensor).all()
        assert matrix_of(factors, *shape).shape == shape
        assert float(prepared["energy"].sum()) > 0


@each_case
def test_preparing_twice_gives_the_same(name, shape):
    weight = make_weight(shape)
    for option in walked(name, shape):
        first = prepare(name, weight, make_sample(shape), option)
        statistics, site = make_sample(shape).statistics(), common.linear_site(*shape)
        second = get_method(name).prepare(site, {"weight": weight}, {"weight": statistics}, [option])
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@each_method
def test_preparing_leaves_its_inputs_alone(name):
    weight, sample = make_weight((12, 8)), make_sample((12, 8))
    before, statistics = weight.clone(), sample.statistics()
    gram, absolute = statistics.gram.raw.clone(), statistics.absolute.clone()
    option = walked(name, (12, 8))[-1]
    get_method(name).prepare(common.linear_site(12, 8), {"weight": weight}, {"weight": statistics}, [option])
    assert torch.equal(weight, before)
    assert torch.equal(statistics.gram.raw, gram)
    assert torch.equal(statistics.absolute, absolute)


@each_exact
def test_exact_level_reproduces_the_weight(name, shape, dtype, kind):
    exact, weight = FITTED_ROWS[name].exact(name, *shape), make_weight(shape, dtype)
    prepared = prepare(name, weight, make_sample(shape, kind), exact)
    torch.testing.assert_close(rebuilt(name, prepared, exact, shape), weight.double(), rtol=1e-4, atol=1e-4)


@each_sample
def test_predicted_error_is_the_measured_one(name, shape, kind):
    """error(option) is the loss of Δ = W − Ŵ, measured token by token."""
    weight, sample, row = make_weight(shape), make_sample(shape, kind), FITTED_ROWS[name]
    whole = row.loss(weight.double(), sample)
    for option in walked(name, shape):
        prepared = prepare(name, weight, sample, option)
        measured = row.loss(weight.double() - rebuilt(name, prepared, option, shape), sample)
        predicted = get_method(name).error(prepared, option)
        assert math.isclose(predicted, measured, rel_tol=2e-3, abs_tol=FLOOR * whole + 1e-6), option
        assert math.isclose(float(prepared["energy"].sum()), whole, rel_tol=1e-3, abs_tol=1e-6)


@each_falling
def test_error_never_rises_with_level(name, shape, kind):
    weight, sample = make_weight(shape), make_sample(shape, kind)
    whole = FITTED_ROWS[name].loss(weight.double(), sample)
    errors = [get_method(name).error(prepare(name, weight, sample, o), o) for o in walked(name, shape)]
    assert all(later <= earlier * 1.001 + FLOOR * whole for earlier, later in itertools.pairwise(errors))


@each_sample
def test_more_levels_help(name, shape, kind):
    """From the cheapest to the dearest, and against leaving everything out."""
    weight, sample = make_weight(shape), make_sample(shape, kind)
    options = walked(name, shape)
    whole = FITTED_ROWS[name].loss(weight.double(), sample)
    errors = [get_method(name).error(prepare(name, weight, sample, o), o) for o in (options[0], options[-1])]
    assert errors[-1] <= errors[0] + (FLOOR + FITTED_ROWS[name].noise) * whole
    assert errors[0] <= whole * (1 + FLOOR) + 1e-9


@each_singular
def test_singular_weights_give_finite_factors(name, shape, kind, special):
    m, n = shape
    weight = {
        "zero": torch.zeros(m, n),
        "rank one": torch.ones(m, n),
        "tiny": 1e-15 * make_weight(shape),
        "huge": 1e10 * make_weight(shape),
    }[special]
    for option in (walked(name, shape)[0], walked(name, shape)[-1]):
        prepared = prepare(name, weight, make_sample(shape, kind), option)
        assert all(torch.isfinite(tensor).all() for tensor in prepared.values())
        assert torch.isfinite(rebuilt(name, prepared, option, shape)).all()


@each_needy
def test_statistics_that_are_not_finite_are_refused(name):
    sample = make_sample((12, 8))
    sample.x[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        prepare(name, make_weight((12, 8)), sample, walked(name, (12, 8))[-1])


@each_needy
def test_missing_statistics_are_named(name):
    statistics = make_sample((12, 8)).statistics()
    for need in get_method(name).needs:
        setattr(statistics, need, None)
    weights, option = {"weight": make_weight((12, 8))}, walked(name, (12, 8))[-1]
    with pytest.raises(ValueError, match=get_method(name).needs[0]):
        get_method(name).prepare(common.linear_site(12, 8), weights, {"weight": statistics}, [option])


@each_case
def test_factors_survive_half_precision(name, shape):
    """Rounding every floating tensor to bfloat16 costs a little, whatever scales the inputs have."""
    weight, sample = make_weight(shape), make_sample(shape, "outlier")
    for option in walked(name, shape):
        factors = get_method(name).truncate(prepare(name, weight, sample, option), option)["weight"]
        rounded = {
            key: tensor.bfloat16().float() if tensor.is_floating_point() else tensor
            for key, tensor in factors.tensors.items()
        }
        narrow = type(factors)(factors.kind, rounded, factors.settings, factors.storage)
        full = matrix_of(factors, *shape)
        assert (matrix_of(narrow, *shape) - full).norm() <= 0.03 * full.norm() + 0.03 * weight.norm()


@each_case
def test_claimed_storage_is_what_the_tensors_hold(name, shape):
    """Values are floating tensors; supports are tensors of whole numbers, all their bytes counted."""
    weight, sample, site = make_weight(shape), make_sample(shape), common.linear_site(*shape)
    for option in walked(name, shape):
        factors = get_method(name).truncate(prepare(name, weight, sample, option), option)["weight"]
        tensors = factors.tensors.values()
        values = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        bits = sum(8 * tensor.nbytes for tensor in tensors if not tensor.is_floating_point())
        assert (factors.storage.values, factors.storage.index_bits + factors.storage.integer_bits) == (values, bits)
        assert get_method(name).storage(site, option) == factors.storage


@each_method
def test_several_weights_and_tables_are_refused_with_a_reason(name):
    pair = Site("pair", (Weight("gate", "gate", 64, 48), Weight("up", "up", 64, 48)))
    table = common.linear_site(96, 32, kind="embedding")
    for site in (pair, table)[: 1 if FITTED_ROWS[name].tables else 2]:
        assert get_method(name).refuses(site)
        assert get_method(name).options(site, Grid(KEEPS, 8)) == {}


@each_case
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_layer_computes_what_its_matrix_does(name, shape, kind):
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(2))
    for option in walked(name, shape):
        dense = modules(shape, kind)  # anew, for the layer has its bias, which is narrowed below
        prepared = prepare(name, make_weight(shape), make_sample(shape), option)
        factors = get_method(name).truncate(prepared, option)["weight"]
        layer = replacement(dense, factors.kind, factors.tensors, factors.settings)
        expected = nn.functional.linear(x, layer.matrix(), getattr(dense, "bias", None))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x[0]), layer(x)[0]) or torch.allclose(layer(x[0]), layer(x)[0], atol=1e-5)
        narrow = copy.deepcopy(layer).to(torch.bfloat16)  # the bias is the dense module's own
        assert narrow(x.bfloat16()).dtype == torch.bfloat16


@each_case
def test_arithmetic_of_a_token_is_what_a_counter_counts(name, shape):
    """With gradients wanted, as torch's counter does not know the packed kernels; nor outer products, of tensors."""
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    for option in walked(name, shape):
        factors = get_method(name).truncate(prepare(name, make_weight(shape), make_sample(shape), option), option)[
            "weight"
        ]
        layer = replacement(modules(shape, "bias"), factors.kind, factors.tensors, factors.settings)
        layer(x)  # what some keep to run with is made at the first use
        with FlopCounterMode(display=False) as counter:
            layer(x)
        counted, ours = counter.get_total_flops(), 2 * layer.multiplications()
        assert counted == ours or (isinstance(layer, Network) and ours / 4 <= counted < ours)


@each_method
@pytest.mark.parametrize("shape", [(24, 12), (13, 17)])
def test_gradients_reach_the_factors(name, shape):
    """The same as through the matrix that the layer multiplies to."""
    dense = modules(shape, "bias")
    option = walked(name, shape)[-1]
    prepared = prepare(name, make_weight(shape), make_sample(shape), option)
    factors = get_method(name).truncate(prepared, option)["weight"]
    tensors = {key: t.clone() for key, t in factors.tensors.items()}
    layer = replacement(dense, factors.kind, tensors, factors.settings).requires_grad_(True)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    ours = {key: parameter.grad.clone() for key, parameter in layer.named_parameters()}
    layer.zero_grad()
    nn.functional.linear(x, layer.matrix(), layer.bias).square().sum().backward()
    assert {key for key, tensor in tensors.items() if tensor.is_floating_point()} | {"bias"} == ours.keys()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-3, atol=1e-3)
        assert ours[key].abs().sum() > 0


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_loading_fills_has_the_shapes_of_the_factors(name, shape, dtype):
    dense = modules(shape, "bias").to(dtype)
    for option in walked(name, shape):
        prepared = prepare(name, make_weight(shape), make_sample(shape), option)
        factors = get_method(name).truncate(prepared, option)["weight"]
        assert factors.kind in layers()
        empty = empty_replacement(dense, factors.kind, factors.settings).state_dict()
        held = {key: (t.shape, dtype if t.is_floating_point() else t.dtype) for key, t in factors.tensors.items()}
        assert {key: (t.shape, t.dtype) for key, t in empty.items() if key != "bias"} == held


@each_case
def test_products_with_gradients_are_those_of_the_matrix(name, shape):
    """`gradient_dot_outputs` gives gᵀ Ŵ x."""
    generator = torch.Generator().manual_seed(5)
    g, x = torch.randn(7, shape[0], generator=generator), torch.randn(7, shape[1], generator=generator)
    method, site = get_method(name), common.linear_site(*shape)
    for option in walked(name, shape):
        prepared = prepare(name, make_weight(shape), make_sample(shape), option)
        expected = torch.einsum("ti,ij,tj->t", g.double(), rebuilt(name, prepared, option, shape), x.double())
        found = method.gradient_dot_outputs(site, prepared, [option], g, x)[option.label]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        alone = method.equivalent(site, prepared, option)
        assert torch.equal(matrix_of(alone, *shape).double(), rebuilt(name, prepared, option, shape))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("names", [FAST[start::4] for start in range(4)], ids="+".join)
def test_exports_load_as_they_were_measured(names, architecture, tmp_path, text_file, monkeypatch):
    """Site after site another method, so that a model has all of ``names``."""
    verify_here(monkeypatch)
    data = small_data(save_folder(architecture, tmp_path / "model"), text_file)
    data["space"] = {"methods": names, "keep": [0.4, 0.7], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    choices, chooser, used = {}, random.Random(4), Counter()
    for site, options in resident.compressed.space.wanted().items():
        method = min((option.method for option in options), key=lambda method: used[method])
        choices[site.name] = chooser.choice([option for option in options if option.method == method])
        used[method] += 1
    assert used.keys() == set(names)
    row = measured(resident, Plan.of(choices))
    ids = common.tokens(2, 24, seed=3)
    with torch.no_grad():
        expected = resident.compressed.model(input_ids=ids, use_cache=False).logits
        for form in ("factored", "dense"):
            export(resident.setup, row, tmp_path / form, form)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / form)
            logits = loaded(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 if form == "factored" else 1e-3)


def test_a_search_over_every_family_goes_from_menu_to_front(tmp_path, model_folder, text_file):
    """All of the fast ones in one space: the menu knows them all, and plans of several families are measured.

    In bytes, for what only rounds a weight stores no fewer values.
    """
    data = small_data(model_folder, text_file)
    data["objectives"] = {"perplexity": {}, "bytes": {}}
    data["space"] = {"methods": ["svd-llm", *FAST], "keep": [0.4, 0.7], "rank_multiple": 2}
    data["search"] |= {"sampler": "rankfront", "trials": 12, "anchors": []}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete"]
    assert len(rows) == 12
    assert set(study.menu().method) == {"dense", "svd-llm", *FAST}
    assert (study.menu().divergence >= 0).all()
    mixed = [row for row in rows if len({option.method for option in row.plan.by_site.values()}) > 1]
    assert mixed
    assert all(row.values["perplexity"] > 1 for row in rows)
