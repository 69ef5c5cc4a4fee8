"""The Low-Rank Transformer: its published rank rule, and semi-NMF between two ranks of svd."""

import common
import pytest
import torch
from test_method_laws import KEEPS, make_weight

from rankfront.methods import Grid, Option, get_method
from rankfront.methods.lrt import semi_nmf

BOTH = pytest.mark.parametrize("name", ["lrt", "lrt-snmf"])
SHAPES = [(24, 12), (12, 24), (16, 16), (13, 17)]


def snmf_error(weight, rank):
    method, site, option = get_method("lrt-snmf"), common.linear_site(*weight.shape), Option.of("lrt-snmf", rank=rank)
    return method.error(method.prepare(site, {"weight": weight}, {}, [option]), option)


@BOTH
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((576, 576), {0.25: 72, 0.5: 144, 0.75: 216}),  # r* = 288
        ((1536, 576), {0.1: 41, 0.3: 125, 0.9: 376}),  # r* = 418
        ((192, 576), {0.01: 1, 0.5: 72, 0.99: 142}),  # r* = 144
        ((49, 51), {0.5: 12, 0.02: None}),  # r* = 24: a fraction that gives no rank is skipped
    ],
)
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_the_rank_is_the_published_one_whatever_the_grid(name, shape, ranks, multiple):
    offered = get_method(name).options(common.linear_site(*shape), Grid(tuple(ranks), multiple))
    assert {keep: option["rank"] for keep, option in offered.items()} == {k: r for k, r in ranks.items() if r}


@BOTH
@pytest.mark.parametrize("shape", [(2, 2), (1, 9), (3, 2)])
def test_weights_that_the_rule_always_skips_are_refused(name, shape):
    """r* is 1 at most, and r ≥ r* is skipped."""
    assert get_method(name).refuses(common.linear_site(*shape))
    assert get_method(name).options(common.linear_site(*shape), Grid(KEEPS, 1)) == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_have_no_negative_side(shape):
    method, site, option = get_method("lrt-snmf"), common.linear_site(*shape), Option.of("lrt-snmf", rank=4)
    factors = method.truncate(method.prepare(site, {"weight": make_weight(shape)}, {}, [option]), option)["weight"]
    assert (factors.tensors["left"] >= 0).all()
    assert (factors.tensors["right"] < 0).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_semi_nmf_lies_between_two_ranks_of_svd(shape, seed):
    """No matrix of rank r beats svd, and its start already has what svd has at r − 1."""
    weight = make_weight(shape, seed=seed)
    tails = torch.linalg.svdvals(weight.double()).square().flip(0).cumsum(0).flip(0).tolist()
    for rank in range(1, min(shape)):
        error = snmf_error(weight, rank)
        assert tails[rank] * (1 - 1e-4) <= error <= tails[rank - 1] * (1 + 1e-4)


def test_outputs_of_one_sign_need_no_more_than_svd():
    """One positive direction: the optimum of rank one has no negative side, and semi-NMF comes near it."""
    weight = torch.outer(torch.arange(1, 13.0), torch.linspace(-1, 1, 8))
    g, f = semi_nmf(weight, 1)
    assert (g @ f.T - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("iterations", [0, 1, 9])
def test_every_iteration_lowers_the_error(monkeypatch, iterations):
    weight = make_weight((16, 20))
    errors = []
    for count in (iterations, iterations + 1):
        monkeypatch.setattr("rankfront.methods.lrt.ITERATIONS", count)
        errors.append(snmf_error(weight, 5))
    assert errors[1] < errors[0]
