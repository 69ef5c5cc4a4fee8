"""DSFormer's block dictionaries: supports keep their pattern, pursuit against slow code, sweeps that descend."""

import common
import pytest
import torch
from test_fitted_laws import prepare
from test_method_laws import make_sample, make_weight
from torch import nn

from rankfront.methods import Gram, Grid, InputError, Option, get_method
from rankfront.methods._fitted import measured
from rankfront.methods._group_pursuit import coded, pursued
from rankfront.methods._scatter import dense_of
from rankfront.methods.dsformer import swept
from rankfront.methods.layers import replacement

SHAPES = [(24, 12), (12, 24), (40, 34), (64, 64)]


def option_of(atoms, group, nonzeros, block, name="dsformer"):
    return Option.of(name, atoms=atoms, group=group, nonzeros=nonzeros, block=block)


def layer_of(weight, sample, option):
    factors = get_method(option.method).truncate(prepare(option.method, weight, sample, option), option)["weight"]
    return replacement(nn.Linear(*weight.shape[::-1], bias=False), factors.kind, factors.tensors, factors.settings)


def slow_pursuit(row, atoms, nonzeros):
    """Of every atom that is not taken yet, the one with which least squares come nearest to the row."""
    taken = []
    for _ in range(nonzeros):

        def left(atom, taken=taken):
            chosen = atoms[[*taken, atom]].T
            return float((chosen @ torch.linalg.lstsq(chosen, row).solution - row).norm())

        taken.append(min((atom for atom in range(len(atoms)) if atom not in taken), key=left))
    return sorted(taken)


@pytest.mark.parametrize("nonzeros", [1, 2, 4])
def test_pursuit_is_the_slow_one(nonzeros):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(9, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 10)[:, None]
    rows = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    found = pursued(rows @ atoms.T, atoms @ atoms.T, 9, nonzeros)
    assert found.tolist() == [slow_pursuit(row, atoms, nonzeros) for row in rows]
    values = coded(rows @ atoms.T, atoms @ atoms.T, found)
    for row, columns, value in zip(rows, found, values, strict=True):
        torch.testing.assert_close(value, torch.linalg.lstsq(atoms[columns].T, row).solution, rtol=1e-4, atol=1e-5)


def test_pursuit_of_orthonormal_atoms_takes_the_largest_products():
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = rows.abs().topk(3, dim=1).indices.sort(1).values
    assert torch.equal(pursued(rows, torch.eye(8).double(), 8, 3), expected)


@pytest.mark.parametrize("nonzeros", [1, 2, 3])
def test_pursuit_takes_as_many_of_every_group(nonzeros):
    atoms = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = pursued(rows @ atoms.T, atoms @ atoms.T, 4, nonzeros)
    assert found.shape == (20, 2 * nonzeros)
    assert ((found // 4).view(20, 2, nonzeros) == torch.tensor([[0], [1]])).all()
    assert (found.diff(dim=1) > 0).all()


@pytest.mark.parametrize("special", ["zero rows", "equal atoms", "zero atoms"])
def test_pursuit_takes_distinct_atoms_of_any(special):
    atoms = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = 0 * rows if special == "zero rows" else rows
    atoms = {"zero rows": atoms, "equal atoms": atoms[:1].expand(6, -1), "zero atoms": 0 * atoms}[special]
    found = pursued(rows @ atoms.T, atoms @ atoms.T, 6, 5)
    assert (found.diff(dim=1) > 0).all()
    assert torch.isfinite(coded(rows @ atoms.T, atoms @ atoms.T, found)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("group", "nonzeros"), [(8, 3), (4, 1), (4, 2)])
def test_coefficients_keep_their_pattern(shape, group, nonzeros):
    layer = layer_of(make_weight(shape), make_sample(shape), option_of(8, group, nonzeros, 10))
    blocks = -(-shape[1] // 10)
    codes = layer._codes(torch.ones_like(layer.values))
    assert (codes.view(shape[0], blocks * 8 // group, group).sum(2) == nonzeros).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_of_few_atoms_that_all_rows_use_is_the_weighted_subspace(shape):
    """One block, dense coefficients: the optimum is that of svd-llm."""
    weight, sample = make_weight(shape), make_sample(shape)
    full, low = option_of(3, 3, 3, shape[1]), Option.of("svd-llm", rank=3)
    ours = get_method("dsformer").error(prepare("dsformer", weight, sample, full), full)
    best = get_method("svd-llm").error(prepare("svd-llm", weight, sample, low), low)
    assert ours == pytest.approx(best, rel=1e-4)


def swept_error(weight, gram, sweeps, level):
    fits = swept(weight.double(), gram, *level, sweeps=sweeps)
    return float(measured(weight, torch.cat([fit.product() for fit in fits], 1), gram)["error"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [(6, 6, 2, 8), (8, 4, 1, 12), (8, 4, 2, 12)])
def test_later_sweeps_lower_the_error(shape, level):
    weight, sample = make_weight(shape), make_sample(shape)
    errors = [swept_error(weight, Gram(sample.x.T @ sample.x), sweeps, level) for sweeps in (1, 2, 8)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [(12, 24), (40, 34), (64, 64)])
def test_the_full_metric_beats_blocks_that_know_nothing_of_each_other(shape):
    """Against the same sweeps under the Gram's diagonal blocks alone, both judged by the tokens."""
    weight, sample = make_weight(shape), make_sample(shape)
    gram = sample.x.T @ sample.x
    near = torch.arange(shape[1]) // 8
    alone = swept(weight.double(), Gram(gram * (near == near[:, None])), 6, 6, 2, 8)
    apart = weight.double() - torch.cat([fit.product() for fit in alone], 1)
    assert swept_error(weight, Gram(gram), 2, (6, 6, 2, 8)) < float((sample.x @ apart.T).square().sum())


def test_values_are_the_least_squares_ones_within_their_block():
    """One block: row by row against the tokens."""
    weight, sample = make_weight((24, 12)), make_sample((24, 12))
    layer = layer_of(weight, sample, option_of(6, 6, 2, 12))
    for row, columns, values in zip(weight.double(), layer.columns(), layer.values, strict=True):
        atoms = sample.x @ layer.basis[columns].double().T
        best = torch.linalg.lstsq(atoms, sample.x @ row).solution
        torch.testing.assert_close(values.double(), best, rtol=1e-3, atol=1e-4)


def test_a_planted_dictionary_is_found():
    """Two blocks with orthogonal atoms of falling norm, one used by each row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, (60, 2), generator=generator)
    atoms = (
        torch.linalg.qr(torch.randn(2, 8, 4, generator=generator)).Q.mT * torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None]
    )
    scale = 1 + torch.rand(60, 2, 1, generator=generator)
    weight = torch.cat([scale[:, b] * atoms[b][rows[:, b]] for b in range(2)], 1)
    identity = Gram(torch.eye(16).double())
    assert swept_error(weight, identity, 2, (4, 4, 1, 8)) <= 1e-6 * float(weight.square().sum())


@pytest.mark.parametrize(
    "level",
    [{"atoms": 6, "group": 4, "nonzeros": 2}, {"atoms": 8, "group": 4, "nonzeros": 5}, {"atoms": 0, "group": 1}],
)
def test_levels_that_make_no_pattern_are_refused(level):
    with pytest.raises(InputError, match="dsformer"):
        get_method("dsformer").check(Option.of("dsformer", **{"nonzeros": 1, "block": 8, **level}))


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_both_patterns_are_offered_as_they_are_named(shape):
    site, grid = common.linear_site(*shape), Grid((0.2, 0.4, 0.6, 0.8), 8)
    for option in get_method("dsformer").options(site, grid).values():
        assert option["group"] == option["atoms"]
        assert option["atoms"] % 8 == 0
        assert 2 <= option["atoms"] / option["nonzeros"] <= 4
    for option in get_method("dsformer-nm").options(site, grid).values():
        assert (option["group"], option["nonzeros"]) in [(4, 1), (4, 2)]


@pytest.mark.parametrize("group", [8, 4])
def test_the_layer_runs_compiled(group):
    layer = layer_of(make_weight((12, 24)), make_sample((12, 24)), option_of(8, group, 2, 10))
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))
    assert torch.equal(dense_of(layer.values, layer.columns(), 24), layer._codes(layer.values))
