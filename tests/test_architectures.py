"""Every architecture: its sites are found, and factors at full rank leave its logits alone."""

import json

import common
import pytest
import torch
from torch import nn

from rankfront.methods import InputError, get_method
from rankfront.methods.layers import replacement, set_module, weight_of
from rankfront.search.inputs.known_sites import pack_sites, unpack_sites
from rankfront.search.inputs.model import count_parameters
from rankfront.search.inputs.sites import blocks, find_sites

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # fp32 through two blocks


def logits(model):
    with torch.no_grad():
        return model(input_ids=common.tokens(2, 20), use_cache=False).logits


def factor(model, site, rank=None):
    """Put rank-``rank`` factors (full rank by default) of `svd` in the place of every module of ``site``."""
    (weight,) = site.weights
    dense = model.get_submodule(weight.path)
    option = common.rank_option("svd", rank or min(weight.out_features, weight.in_features))
    prepared = get_method("svd").prepare(site, {"weight": weight_of(dense)}, {}, [option])
    factors = get_method("svd").truncate(prepared, option)["weight"]
    shared = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in factors.tensors.items()}
    for path in (weight.path, *weight.tied):
        set_module(model, path, replacement(model.get_submodule(path), factors.kind, shared))


def test_sites_inside_the_blocks_are_its_linears(architecture, model):
    inside = {site: place for site, place in common.single_sites(model).items() if place.block is not None}
    found = {site.name: (site.weights[0].out_features, site.weights[0].in_features) for site in inside}
    assert found == architecture.linears
    for site, place in inside.items():
        assert site.name == f"{architecture.blocks}.{place.block}.{place.kind}"
        assert [(w.role, w.path, w.kind, w.tied) for w in site.weights] == [("weight", site.name, "linear", ())]


def test_sites_are_the_same_after_they_were_kept(model):
    sites = find_sites(model)
    again = unpack_sites(json.loads(json.dumps(pack_sites(sites))))
    assert list(again.items()) == list(sites.items())


def test_sites_outside_are_the_head_and_the_table(architecture, model):
    outside = [site for site, place in common.single_sites(model).items() if place.block is None]
    weights = {site.name: (site.weights[0].kind, site.weights[0].tied) for site in outside}
    if architecture.tied:
        assert weights == {architecture.head: ("linear", (architecture.table,))}
    else:
        assert weights == {architecture.head: ("linear", ()), architecture.table: ("embedding", ())}
    for site in outside:
        assert (site.weights[0].out_features, site.weights[0].in_features) == (
            common.VOCABULARY,
            common.HIDDEN,
        )


def test_places_follow_the_order_of_the_blocks(model):
    numbers = [place.block for place in common.single_sites(model).values() if place.block is not None]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(common.BLOCKS))


def test_a_skeleton_has_the_same_sites(architecture, model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert common.single_sites(empty) == common.single_sites(model)


def test_blocks_are_found(architecture, model):
    path, found = blocks(model)
    assert path == architecture.blocks
    assert len(found) == common.BLOCKS


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="no list of blocks"):
        blocks(nn.Sequential(nn.Linear(4, 4)))


def test_weights_are_read_out_by_in(architecture, model):
    for path, shape in architecture.linears.items():
        module = model.get_submodule(path)
        weight = weight_of(module)
        assert tuple(weight.shape) == shape
        x = torch.randn(3, shape[1])
        torch.testing.assert_close(module(x), nn.functional.linear(x, weight, module.bias), rtol=1e-4, atol=1e-5)


def test_biases_are_not_zero(architecture, model):
    """The other tests show nothing about biases that are zero."""
    biases = [model.get_submodule(path).bias for path in architecture.linears]
    assert any(bias is not None and bool((bias != 0).all()) for bias in biases) == architecture.biases


def test_every_full_rank_site_leaves_the_logits_alone(model):
    """Transposition, biases, embedding scales and tying all survive the swap."""
    before = logits(model)
    for site in common.single_sites(model):
        factor(model, site)
    torch.testing.assert_close(logits(model), before, **TOLERANCE)


def test_full_rank_factors_are_what_runs(architecture, model):
    for site in common.single_sites(model):
        factor(model, site)
    kept = [path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert not kept
    assert all(type(model.get_submodule(path)).__name__ == "LowRankLinear" for path in architecture.linears)
    assert type(model.get_submodule(architecture.table)).__name__ == "LowRankEmbedding"


def test_low_rank_changes_the_logits(model):
    before = logits(model)
    factor(model, next(iter(common.single_sites(model))), rank=2)
    assert (logits(model) - before).abs().max() > 1e-3


def test_the_head_alone_leaves_the_logits_alone(architecture, model):
    before = logits(model)
    for site, place in common.single_sites(model).items():
        if place.block is None:
            factor(model, site)
    torch.testing.assert_close(logits(model), before, **TOLERANCE)


def test_a_tied_head_stays_tied_to_its_table(architecture, model):
    """One pair of factors, read by both modules and counted once."""
    dense = count_parameters(model)
    rank = 4
    site = next(site for site in common.single_sites(model) if site.name == architecture.head)
    factor(model, site, rank)
    head, table = model.get_submodule(architecture.head), model.get_submodule(architecture.table)
    if not architecture.tied:
        assert isinstance(table, nn.Embedding)
        return
    assert head.left is table.left
    assert head.right is table.right
    saved = common.VOCABULARY * common.HIDDEN - rank * (common.VOCABULARY + common.HIDDEN)
    assert count_parameters(model) == dense - saved


def test_generation_runs_on_factors(model):
    """Prefill, then single tokens through the key-value cache, give the logits of one pass."""
    for site in common.single_sites(model):
        factor(model, site)
    ids = common.tokens(1, 6)
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        step = model(input_ids=ids[:, 5:], past_key_values=out.past_key_values, use_cache=True).logits[:, -1]
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(step, whole, **TOLERANCE)
