"""The dictionary family: closed forms, solvers against slow ones and against each other, and what they store."""

import gc
import itertools
import math
import weakref

import common
import pytest
import torch
from common import linear_site
from rows import FITTED_ROWS
from test_method_laws import make_sample, make_weight
from torch import nn

from rankfront.methods import Gram, Grid, InputError, Option, Statistics, get_method
from rankfront.methods._algebra import polar, root_and_inverse
from rankfront.methods._dictionary import best_atoms, largest_in_rows, whitened
from rankfront.methods._fitted import matrix_of
from rankfront.methods._pursuit import pursuit, update_atoms
from rankfront.methods.compot import orthonormal_coding
from rankfront.methods.cospadi import thresholded_coding, unit_rows
from rankfront.methods.layers import replacement
from rankfront.methods.rocket import shared_mask

NAMES = ("cospadi", "cospadi-published", "rocket", "compot", "compot-published")
each_name = pytest.mark.parametrize("name", NAMES)


def prepare(name, weight, statistics, atoms, nonzeros):
    """Prepared tensors and the option behind them."""
    option = Option.of(name, atoms=atoms, nonzeros=nonzeros)
    site = linear_site(*weight.shape)
    return get_method(name).prepare(site, {"weight": weight}, {"weight": statistics}, [option]), option


def share(name, weight, statistics, atoms, nonzeros):
    """The part of ‖W C^{1/2}‖² that is lost."""
    prepared, option = prepare(name, weight, statistics, atoms, nonzeros)
    return get_method(name).error(prepared, option) / float(prepared["energy"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subspaces(m, n, groups, rank, seed=0, spread=0.05):
    """Rows from a few subspaces of their own, with a little noise: what dictionaries are for."""
    left, right = noise(groups, m // groups, rank, seed=seed), noise(groups, rank, n, seed=seed + 1)
    return (left @ right).flatten(0, 1) + spread * rank**0.5 * noise(m, n, seed=seed + 2)


def structured(m, n, kind, seed=0):
    """Weights of a real size's proportions, and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed + 7)
    mixing = torch.randn(n, n, generator=generator) * torch.arange(1, n + 1) ** -0.5
    x = torch.randn(6 * n, n, generator=generator) @ mixing
    weight = make_weight((m, n), seed=seed) if kind == "decaying" else subspaces(m, n, 4, n // 4, seed)
    return weight, Statistics(len(x), Gram(x.T @ x))


# -- closed forms


@each_name
@pytest.mark.parametrize("kind", ["plain", "few tokens", "dead inputs"])
def test_where_nothing_is_left_to_choose_it_is_svd_llm(name, kind):
    weight, statistics = make_weight((15, 12)), make_sample((15, 12), kind).statistics()
    for atoms in (1, 4, 9):
        prepared, option = prepare(name, weight, statistics, atoms, atoms)
        low_rank = common.rank_option("svd-llm", atoms)
        best = get_method("svd-llm").prepare(
            linear_site(15, 12), {"weight": weight}, {"weight": statistics}, [low_rank]
        )
        whole = float(prepared["energy"])
        error = get_method(name).error(prepared, option)
        assert math.isclose(error, get_method("svd-llm").error(best, low_rank), rel_tol=1e-3, abs_tol=1e-6 * whole)
        ours = matrix_of(get_method(name).truncate(prepared, option)["weight"], 15, 12)
        theirs = matrix_of(get_method("svd-llm").truncate(best, low_rank)["weight"], 15, 12)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_name
def test_the_atoms_are_the_best_for_their_coefficients(name):
    """In the whitened norm, against least squares with explicit roots, which a well-conditioned Gram permits."""
    weight, statistics = structured(30, 20, "decaying")
    prepared, _ = prepare(name, weight, statistics, 10, 5)
    layer = replacement(
        nn.Linear(20, 30, bias=False), "dictionary", {key: prepared[key] for key in ("right", "values", "support")}
    )
    coefficients = layer.sparse_matrix().double()
    root, inverse = root_and_inverse(statistics.gram.matrix)
    explicit = torch.linalg.lstsq(coefficients, weight.double() @ root).solution @ inverse
    torch.testing.assert_close(prepared["right"].double(), explicit, rtol=1e-3, atol=1e-4 * float(explicit.abs().max()))


def test_atoms_of_parallel_and_unused_columns_are_finite():
    coefficients = torch.zeros(6, 4, dtype=torch.float64)
    coefficients[:, 0] = coefficients[:, 1] = torch.arange(1.0, 7.0)
    coefficients[:, 2] = 1e9
    target = noise(6, 5).double()
    atoms = best_atoms(coefficients, target)
    assert torch.isfinite(atoms).all()
    assert torch.equal(atoms[3], torch.zeros(5, dtype=torch.float64))
    best = coefficients[:, [0, 2]] @ torch.linalg.lstsq(coefficients[:, [0, 2]], target).solution
    torch.testing.assert_close(coefficients @ atoms, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
def test_solvers_see_the_whitened_weight(shape):
    """Coordinates have the inner products of W C^{1/2}'s rows; lengths are ‖C^{-1/2} v_i‖ without an inverse."""
    weight, statistics = structured(*shape, "decaying")
    seen = whitened(weight, statistics.gram)
    root, inverse = root_and_inverse(statistics.gram.matrix)
    scaled = weight.double() @ root
    norm = scaled.norm()
    expected = scaled @ scaled.T / norm**2
    torch.testing.assert_close(seen.coordinates @ seen.coordinates.T, expected.float(), rtol=1e-4, atol=1e-6)
    right = torch.linalg.svd(scaled, full_matrices=False).Vh
    lengths = (right @ inverse).norm(dim=1)
    torch.testing.assert_close(seen.lengths / seen.lengths[0], (lengths / lengths[0]).float(), rtol=2e-3, atol=0)


def test_levels_of_a_weight_share_its_decomposition_and_no_more():
    weight, gram = make_weight((9, 7)), make_sample((9, 7)).statistics().gram
    first = whitened(weight, gram)
    assert whitened(weight, gram) is first
    assert whitened(weight.clone(), gram) is not first
    assert whitened(weight, make_sample((9, 7), seed=2).statistics().gram) is not first
    again = whitened(weight, gram)
    weight[0, 0] += 1
    assert not torch.equal(whitened(weight, gram).coordinates, again.coordinates)
    held = weakref.ref(whitened(weight, gram).basis.untyped_storage())
    del gram, first, again
    gc.collect()
    assert held() is None


def test_polar_is_the_nearest_with_orthonormal_rows():
    matrix = noise(4, 9).double()
    nearest = polar(matrix)
    torch.testing.assert_close(nearest @ nearest.T, torch.eye(4, dtype=torch.float64))
    for seed in range(20):
        other = torch.linalg.qr(noise(9, 4, seed=seed).double()).Q.T
        assert (matrix * nearest).sum() >= (matrix * other).sum()
    singular = torch.zeros(3, 5)
    torch.testing.assert_close(polar(singular) @ polar(singular).T, torch.eye(3))


def test_polar_falls_back_to_a_wider_dtype(monkeypatch):
    real, seen = torch.linalg.svd, []

    def failing(matrix, full_matrices):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, full_matrices=full_matrices)

    expected = polar(noise(3, 5))
    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = polar(noise(3, 5))
    assert seen == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


# -- solvers against slow ones


def slow_pursuit(y, dictionary, nonzeros):
    """Orthogonal matching pursuit by the book: one signal, one least-squares problem a step."""
    found = torch.zeros(len(y), len(dictionary), dtype=y.dtype)
    for row, signal in enumerate(y):
        chosen, residual = [], signal
        for _ in range(nonzeros):
            scores = (dictionary @ residual).abs()
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            fit = torch.linalg.lstsq(dictionary[chosen].T, signal[:, None]).solution[:, 0]
            residual = signal - fit @ dictionary[chosen]
        found[row, chosen] = fit
    return found


@pytest.mark.parametrize(("atoms", "nonzeros"), [(6, 1), (6, 3), (10, 4), (14, 9)])
def test_pursuit_is_that_of_the_book(atoms, nonzeros, monkeypatch):
    y, (dictionary, _) = noise(13, 9).double(), unit_rows(noise(atoms, 9, seed=1).double())
    expected = slow_pursuit(y, dictionary, nonzeros)
    found, mask = pursuit(y, dictionary, nonzeros)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert (mask.sum(1) == nonzeros).all()
    assert not found[~mask].any()
    monkeypatch.setattr("rankfront.methods._pursuit.ENTRIES", 4 * nonzeros**2)  # in batches of four
    torch.testing.assert_close(pursuit(y, dictionary, nonzeros)[0], found)


def test_pursuit_past_what_the_signals_span():
    """Twin atoms and a rank below the number asked for: finite, and nothing is lost."""
    dictionary, _ = unit_rows(noise(3, 3).double().repeat(2, 1))
    y = noise(5, 3, seed=1).double()
    found, mask = pursuit(y, dictionary, 5)
    assert torch.isfinite(found).all()
    assert (mask.sum(1) == 5).all()
    torch.testing.assert_close(found @ dictionary, y)


def test_a_sweep_of_many_powers_is_k_svd_by_the_book():
    y, (dictionary, _) = noise(40, 8).double(), unit_rows(noise(6, 8, seed=1).double())
    coefficients, mask = pursuit(y, dictionary, 2)
    expected, atoms = coefficients.clone(), dictionary.clone()
    for j in range(len(atoms)):
        users = mask[:, j]
        own = y[users] - expected[users] @ atoms + expected[users, j, None] * atoms[j]
        left, sizes, right = torch.linalg.svd(own, full_matrices=False)
        expected[users, j], atoms[j] = left[:, 0] * sizes[0], right[0]
    update_atoms(y, coefficients, mask, dictionary, 300)
    torch.testing.assert_close(coefficients @ dictionary, expected @ atoms, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_sweep_never_loses_and_leaves_unused_atoms_alone():
    y, (dictionary, _) = noise(40, 8).double(), unit_rows(noise(7, 8, seed=1).double())
    coefficients, mask = pursuit(y, dictionary, 2)
    coefficients[:, 3], mask[:, 3] = 0, False
    unused = dictionary[3].clone()
    errors = [float((y - coefficients @ dictionary).square().sum())]
    for _ in range(5):
        update_atoms(y, coefficients, mask, dictionary, 1)
        errors.append(float((y - coefficients @ dictionary).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]
    assert torch.equal(dictionary[3], unused)
    assert not coefficients[~mask].any()


def test_plain_turns_of_procrustes_never_lose():
    weight, statistics = structured(48, 32, "subspaces")
    y = whitened(weight, statistics.gram).coordinates
    errors = [1 - float(orthonormal_coding(y, 16, 8, turns, 0.0)[0].square().sum()) for turns in range(8)]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("solver", [lambda y, t: orthonormal_coding(y, 16, 8, t, 1.0),
                                    lambda y, t: thresholded_coding(y, 16, 8, t)])  # fmt: skip
@pytest.mark.parametrize("kind", ["decaying", "subspaces"])
def test_more_turns_never_lose(solver, kind):
    """The best met is returned, so even turns that overshoot do no harm."""
    weight, statistics = structured(48, 32, kind)
    y = whitened(weight, statistics.gram).coordinates

    def error(turns):
        coefficients, mask = solver(y, turns)
        assert (mask.sum(1) == 8).all()
        return float((y - coefficients @ best_atoms(coefficients, y)).square().sum())

    errors = [error(turns) for turns in (0, 3, 12)]
    assert errors[0] >= errors[1] * 0.999
    assert errors[1] >= errors[2] * 0.999


def test_places_that_rows_share():
    scores = noise(9, 40).abs()
    scores[4] *= 10
    mask = shared_mask(scores, 20)
    assert int(mask.sum()) == 9 * 20
    assert mask[largest_in_rows(scores, 19)].all()
    assert int(mask[4].sum()) == 19 + 9  # the loud row takes every place that is free
    assert torch.equal(shared_mask(scores, 1), largest_in_rows(scores, 1))


# -- solvers against each other


@pytest.mark.parametrize("kind", ["decaying", "subspaces"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_solvers_agree_at_equal_storage(kind, shape, keep):
    """compot within a tenth of cospadi, and each default near what it replaces.

    Where rows come from separate subspaces, starting at rows of W, as published, finds better atoms than starting at
    eigenvectors, and the fast solvers give up to a half away.
    """
    weight, statistics = structured(*shape, kind)
    level = dict(get_method("compot").options(linear_site(*shape), Grid((keep,), 1))[keep].level)
    lost = {name: share(name, weight, statistics, **level) for name in NAMES}
    assert lost["compot"] <= 1.1 * lost["cospadi"]
    assert lost["compot"] <= 1.02 * lost["compot-published"]
    assert lost["compot"] <= lost["rocket"]
    published = lost["cospadi-published"]
    if kind == "decaying":
        assert lost["compot"] <= 1.1 * published
        assert lost["cospadi"] <= 1.02 * published
    else:
        assert published <= lost["cospadi"] <= 1.5 * published


@pytest.mark.parametrize("name", ["cospadi", "cospadi-published", "compot"])
def test_dictionaries_beat_one_subspace_where_there_are_several(name):
    weight, statistics = structured(96, 64, "subspaces")
    site, grid = linear_site(96, 64), Grid((0.6,), 1)
    level = dict(get_method(name).options(site, grid)[0.6].level)
    low_rank = get_method("svd-llm").options(site, grid)[0.6]
    prepared = get_method("svd-llm").prepare(site, {"weight": weight}, {"weight": statistics}, [low_rank])
    single = get_method("svd-llm").error(prepared, low_rank) / float(prepared["energy"].double().sum())
    assert share(name, weight, statistics, **level) < 0.8 * single


# -- levels, storage, the layer


@each_name
def test_levels_have_two_atoms_a_nonzero_until_there_are_no_more(name):
    site = linear_site(1536, 576)
    offered = get_method(name).options(site, Grid((0.2, 0.5, 0.8, 0.99), 8))
    levels = [get_method(name).level(offered[keep]) for keep in (0.2, 0.5, 0.8, 0.99)]
    assert all(k % 8 == 0 and k == 2 * s for k, s in levels[:3])
    assert levels[3][0] == 576
    assert levels[3][1] > 288
    k, s = levels[0]
    assert get_method(name).storage(site, offered[0.2]).parameters == 576 * k + 1536 * s + 1536 * k // 16


@each_name
@pytest.mark.parametrize("level", [{"atoms": 4}, {"atoms": 4, "nonzeros": 5}, {"atoms": 4, "nonzeros": 0}, {"rank": 3}])
def test_levels_that_make_no_sense_are_refused(name, level):
    with pytest.raises(InputError):
        get_method(name).check(Option.of(name, **level))


@each_name
def test_more_atoms_than_dimensions_are_refused(name):
    with pytest.raises(InputError, match="least"):
        prepare(name, make_weight((12, 8)), make_sample((12, 8)).statistics(), 9, 4)


def test_factors_of_another_level_are_refused():
    prepared, _ = prepare("compot", make_weight((12, 8)), make_sample((12, 8)).statistics(), 6, 3)
    with pytest.raises(InputError, match="rebuild"):
        get_method("compot").truncate(prepared, Option.of("compot", atoms=6, nonzeros=2))


def make_layer(bias=True):
    prepared, option = prepare("rocket", make_weight((12, 8)), make_sample((12, 8)).statistics(), 6, 3)
    factors = get_method("rocket").truncate(prepared, option)["weight"]
    return replacement(nn.Linear(8, 12, bias=bias), factors.kind, factors.tensors, factors.settings)


def test_the_layer_follows_a_step_of_training():
    layer, x = make_layer().requires_grad_(True), noise(5, 8)
    with torch.no_grad():
        before = layer(x)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimiser.step()
    with torch.no_grad():
        after = layer(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, nn.functional.linear(x, layer.matrix(), layer.bias))


def test_the_layer_compiles_whole():
    layer, x = make_layer(), noise(5, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    layer.requires_grad_(True)
    compiled(x).sum().backward()
    assert layer.values.grad.abs().sum() > 0


def test_every_name_has_a_row():
    assert set(NAMES) <= FITTED_ROWS.keys()
