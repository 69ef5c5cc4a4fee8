"""Tensor formats: closed forms, special cases in which they are one another, and slow solvers against fast ones."""

import itertools
import math

import common
import pytest
import tensorly.decomposition
import torch
from test_method_laws import make_sample, make_weight
from torch import nn

from rankfront.methods import Grid, InputError, Option, get_method
from rankfront.methods._algebra import fix_signs
from rankfront.methods._fitted import matrix_of
from rankfront.methods._modes import (
    LARGEST_RATIO,
    Modes,
    balanced_divisors,
    even_norms,
    even_terms,
    paired_modes,
)
from rankfront.methods.block_term import block, partitioned, sweep
from rankfront.methods.cp import orthogonal_terms, rebuilt
from rankfront.methods.layers import replacement
from rankfront.methods.layers_tensor import LARGEST, KroneckerLinear, TensorRingLinear, best_order
from rankfront.methods.tensor_ring import ring_cores
from rankfront.methods.tensor_train_matrix import train_cores
from rankfront.methods.tucker import SWEEPS, hooi

NAMES = ("tucker", "cp", "tensor-train", "tensor-train-matrix", "tensor-ring", "kronecker", "block-term")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(name, weight, level, sample=None):
    """The option, what is prepared for it, and Ŵ in fp64."""
    method = get_method(name)
    site, option = common.linear_site(*weight.shape), Option.of(name, **{method.level: level})
    sample = sample or make_sample(weight.shape)
    prepared = method.prepare(site, {"weight": weight}, {"weight": sample.statistics()}, [option])
    return option, prepared, matrix_of(method.truncate(prepared, option)["weight"], *weight.shape).double()


def ring_matrix(cores):
    """The matrix of three cores (r_{k−1}, m_k, n_k, r_k)."""
    return torch.einsum("uxas,sybt,tzcu->xyzabc", *cores).flatten(0, 2).flatten(1)


# Shapes


@pytest.mark.parametrize(
    ("size", "two", "three"),
    [
        (576, (24, 24), (8, 8, 9)),
        (1536, (32, 48), (8, 12, 16)),
        (192, (12, 16), (4, 6, 8)),
        (11008, (86, 128), (16, 16, 43)),  # 2⁸ · 43
        (14336, (112, 128), (16, 28, 32)),  # 2¹¹ · 7
        (13, (2, 7), (2, 2, 4)),  # padded to 14 and to 16
        (17, (3, 6), (2, 3, 3)),  # to 18
    ],
)
def test_divisors_are_balanced(size, two, three):
    assert (balanced_divisors(size, 2), balanced_divisors(size, 3)) == (two, three)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_divisors_hold_the_size_and_are_the_most_alike(parts):
    """Against trying all of them."""
    for size in range(1, 80):
        found = balanced_divisors(size, parts)
        product = math.prod(found)
        assert product >= size
        assert found[-1] <= LARGEST_RATIO * found[0]
        for other in range(size, product + 1):
            splits = itertools.combinations_with_replacement([d for d in range(1, other + 1) if other % d == 0], parts)
            ratios = [split[-1] / split[0] for split in splits if math.prod(split) == other]
            least = min(ratios)
            assert least == found[-1] / found[0] if other == product else least > LARGEST_RATIO


@pytest.mark.parametrize("shape", [(24, 12), (13, 17), (15, 34)])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_kronecker_chain_is_a_rank_one_tensor(shape, parts):
    """Van Loan's rearrangement, and its generalisation to more modes."""
    modes = paired_modes(*shape, parts)
    factors = [drawn(m, n, seed=k) for k, (m, n) in enumerate(zip(modes.rows, modes.columns, strict=True))]
    chain = factors[0]
    for factor in factors[1:]:
        chain = torch.kron(chain, factor)
    cut = chain[: shape[0], : shape[1]]
    tensor = modes.tensor(cut)
    assert tensor.shape == modes.pairs
    whole = Modes(len(chain), chain.shape[1], modes.rows, modes.columns).tensor(chain)
    expected = factors[0].flatten()
    for factor in factors[1:]:
        expected = expected[..., None] * factor.flatten()
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(tensor.norm(), cut.norm())  # nothing but zeros is added


def test_weights_that_are_not_finite_are_refused():
    weight = make_weight((12, 8))
    weight[3, 4] = math.inf
    for name in NAMES:
        with pytest.raises(ValueError, match="finite"):
            fit(name, weight, 1)


def test_norms_are_shared_evenly_and_products_stay():
    tensors = [1e-6 * drawn(3, 2), drawn(2, 4), 1e5 * drawn(4, 3)]
    even = even_norms(*tensors)
    torch.testing.assert_close(torch.linalg.multi_dot(even), torch.linalg.multi_dot(tensors))
    assert max(t.norm() for t in even) <= 1.001 * min(t.norm() for t in even)
    factors = [1e-4 * drawn(3, 5), drawn(4, 5), 1e6 * drawn(2, 5)]
    factors[1][:, 2] = 0
    terms = even_terms(factors)
    torch.testing.assert_close(rebuilt(terms), rebuilt(factors))
    assert all((term[:, 2] == 0).all() for term in terms)
    norms = torch.stack([term.norm(dim=0) for term in terms])
    torch.testing.assert_close(norms.amax(0), norms.amin(0))


# Kronecker


@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (16, 16), (15, 35)])
def test_kronecker_leaves_the_tail_of_the_rearranged_spectrum(shape):
    """Optimal: no sum of R Kronecker products leaves less (Eckart-Young on the rearranged weight)."""
    weight, modes = make_weight(shape), paired_modes(*shape, 2)
    assert not modes.padded
    m1, m2, n1, n2 = *modes.rows, *modes.columns
    blocks = weight.double().reshape(m1, m2, n1, n2)
    rearranged = torch.stack([blocks[i, :, j].flatten() for i in range(m1) for j in range(n1)])
    spectrum = torch.linalg.svdvals(rearranged).square()
    for terms in (1, 3, len(spectrum) - 1):
        option, prepared, found = fit("kronecker", weight, terms)
        tail = float(spectrum[terms:].sum())
        assert math.isclose((weight - found).square().sum(), tail, rel_tol=1e-4, abs_tol=1e-9)
        assert math.isclose(get_method("kronecker").error(prepared, option), tail, rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("shape", [(24, 12), (15, 35)])
def test_kronecker_is_exact_for_a_sum_of_its_products(shape):
    modes = paired_modes(*shape, 2)
    (m1, m2), (n1, n2) = modes.rows, modes.columns
    weight = sum(torch.kron(drawn(m1, n1, seed=k), drawn(m2, n2, seed=k + 9)) for k in range(3))
    _, _, found = fit("kronecker", weight, 3)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    assert (fit("kronecker", weight, 2)[2] - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("name", ["kronecker", "tensor-ring"])
@pytest.mark.parametrize("shape", [(24, 12), (13, 17)])
def test_one_preparation_serves_every_level(name, shape):
    weight = make_weight(shape)
    method, site = get_method(name), common.linear_site(*shape)
    options = list(dict.fromkeys(method.options(site, Grid((0.2, 0.5, 0.8), 1)).values()))
    prepared = method.prepare(site, {"weight": weight}, {}, options)
    for option in options:
        _, _, alone = fit(name, weight, method.kept(option))
        together = matrix_of(method.truncate(prepared, option)["weight"], *shape).double()
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="components"):
        method.truncate(prepared, Option.of(name, rank=10**6))


# Trains and rings


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_two_cores_are_the_svd_of_the_reshaped_weight(rank):
    """And so the sum of Kronecker products."""
    weight, modes = make_weight((24, 12)), paired_modes(24, 12, 2)
    first, second = train_cores(modes, weight, (1, rank, 1))
    found = torch.einsum("uxas,sybt->xyab", first, second).reshape(24, 12)
    left, values, right = torch.linalg.svd(modes.tensor(weight), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(modes.tensor(found), best)
    torch.testing.assert_close(found, fit("kronecker", weight, rank)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 12), (13, 17)])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (6, 8)])
def test_a_ring_that_is_open_is_a_train(shape, ranks):
    weight, modes = make_weight(shape), paired_modes(*shape, 3)
    ring, train = ring_cores(modes, weight, (1, *ranks)), train_cores(modes, weight, (1, *ranks, 1))
    torch.testing.assert_close(ring_matrix(ring), ring_matrix(train))


@pytest.mark.parametrize("shape", [(24, 12), (24, 16)])
def test_trains_recover_what_has_their_ranks(shape):
    modes = paired_modes(*shape, 3)
    sizes = list(zip(modes.rows, modes.columns, strict=True))
    ranks = (1, 2, 2, 1)
    weight = ring_matrix([drawn(ranks[k], *sizes[k], ranks[k + 1], seed=k) for k in range(3)])
    _, _, found = fit("tensor-train-matrix", weight, 2)
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)
    assert (fit("tensor-train-matrix", weight, 1)[2] - weight).norm() > 0.1 * weight.norm()


def test_ring_svd_recovers_a_ring():
    """One whose first unfolding has its singular vectors in the order of (r_0, r_1), as TR-SVD splits them."""
    modes = paired_modes(24, 12, 3)  # I = 6, 6, 8 and r_0 r_1 = 2 · 3
    sizes = list(zip(modes.rows, modes.columns, strict=True))
    first = fix_signs(torch.linalg.qr(drawn(6, 6))[0]).reshape(6, 2, 3).permute(1, 0, 2)
    second, third = torch.zeros(3, 6, 2, dtype=torch.float64), torch.zeros(2, 8, 2, dtype=torch.float64)
    for r1, angle in enumerate((0.3, 1.1, 2.5)):
        second[r1, r1] = (3 - r1) * torch.tensor([math.cos(angle), math.sin(angle)])
    for r0 in range(2):
        third[:, 4 * r0 : 4 * r0 + 4, r0] = (10 - 9 * r0) * torch.linalg.qr(drawn(4, 2, seed=r0))[0].T
    weight = ring_matrix([core.unflatten(1, size) for core, size in zip((first, second, third), sizes, strict=True)])
    assert get_method("tensor-ring").ranks(24, 12, 2) == (2, 3, 2)
    _, _, found = fit("tensor-ring", weight, 2)
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)
    assert (fit("tensor-ring", weight, 1)[2] - weight).norm() > 0.1 * weight.norm()


# Whitened trains and Tucker


@pytest.mark.parametrize("kind", ["plain", "outlier", "few tokens", "one token"])
@pytest.mark.parametrize("name", ["tensor-train", "tucker"])
@pytest.mark.parametrize("shape", [(24, 12), (13, 17)])
def test_whole_output_modes_give_the_optimum_of_low_rank(name, shape, kind):
    """From rank m_1 (and m_2) on, these are whitened SVD: the least loss that any matrix of that rank has."""
    weight, sample = make_weight(shape), make_sample(shape, kind)
    rank = max(balanced_divisors(shape[0], 2))
    option, prepared, found = fit(name, weight, rank, sample)
    best = torch.linalg.svdvals(weight.double() @ sample.x.T)[rank:].square().sum()
    whole = (weight.double() @ sample.x.T).square().sum()
    assert ((weight - found) @ sample.x.T).square().sum() <= best * (1 + 1e-3) + 1e-5 * whole
    assert get_method(name).error(prepared, option) >= best * (1 - 1e-3) - 1e-5 * whole


@pytest.mark.parametrize("name", ["tensor-train", "tucker"])
def test_lower_ranks_are_below_low_rank_and_above_nothing(name):
    """Rank 2 on 24 = 4 · 6 outputs: a real restriction, which `svd-llm` at the same rank does not have."""
    weight, sample = make_weight((24, 12)), make_sample((24, 12))
    option, prepared, _ = fit(name, weight, 2, sample)
    values = torch.linalg.svdvals(weight.double() @ sample.x.T).square()
    assert values[2:].sum() * 1.01 < get_method(name).error(prepared, option) < values.sum() * 0.9


def test_tucker_and_train_recover_what_has_their_ranks():
    first, second, third = drawn(4, 2), drawn(6, 2, seed=1), drawn(2, 12, seed=2)
    weight = torch.einsum("abc,ia,jb,ck->ijk", drawn(2, 2, 2, seed=3), first, second, third).reshape(24, 12)
    torch.testing.assert_close(fit("tucker", weight, 2)[2], weight, rtol=1e-4, atol=1e-4)
    weight = torch.einsum("ia,ajb,bk->ijk", first, drawn(2, 6, 2, seed=4), third).reshape(24, 12)
    torch.testing.assert_close(fit("tensor-train", weight, 2)[2], weight, rtol=1e-4, atol=1e-4)


def test_hooi_beats_hosvd_and_is_as_good_as_tensorlys():
    """At C = I, where TensorLy's own Tucker of the reshaped weight has the same loss."""
    scaled = drawn(6, 8, 15)
    first, second = hooi(scaled, (3, 3, 5))
    captured = torch.einsum("ijk,ia,jb->abk", scaled, first, second).reshape(9, 15)
    ours = scaled.square().sum() - torch.linalg.svdvals(captured)[:5].square().sum()
    core, _ = tensorly.decomposition.tucker(scaled.numpy(), (3, 3, 5), n_iter_max=SWEEPS, tol=0)
    theirs = scaled.square().sum() - float((core**2).sum())
    unfold = [scaled.reshape(6, -1), scaled.transpose(0, 1).reshape(8, -1)]
    hosvd = [torch.linalg.svd(u, full_matrices=False)[0][:, :3] for u in unfold]
    start = torch.einsum("ijk,ia,jb->abk", scaled, *hosvd).reshape(9, 15)
    assert ours <= theirs * 1.02
    assert ours < scaled.square().sum() - torch.linalg.svdvals(start)[:5].square().sum()


# CP and block terms


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 7, 5)])
def test_orthogonal_terms_are_orthogonal_and_all_of_them_are_the_tensor(shape):
    tensor = drawn(*shape)
    terms = orthogonal_terms(tensor, 20)
    torch.testing.assert_close(rebuilt(terms), tensor)
    for count in (1, 7, 19):
        kept = orthogonal_terms(tensor, count)
        energy = torch.stack([factor.norm(dim=0) for factor in kept]).prod(0).square()
        assert (energy.diff() <= 1e-12).all()
        torch.testing.assert_close((tensor - rebuilt(kept)).square().sum(), tensor.square().sum() - energy.sum())
    torch.testing.assert_close(rebuilt(orthogonal_terms(tensor, 23)), tensor)  # filled up with zeros


@pytest.mark.parametrize("name", ["cp", "cp-published"])
def test_cp_recovers_a_kronecker_chain(name):
    modes = paired_modes(24, 16, 3)
    a, b, c = (drawn(m, n, seed=k) for k, (m, n) in enumerate(zip(modes.rows, modes.columns, strict=True)))
    weight = torch.kron(torch.kron(a, b), c)
    torch.testing.assert_close(fit(name, weight, 1)[2], weight, rtol=1e-3, atol=1e-3)


def test_cp_of_single_factor_modes_is_the_svd():
    """A matrix as a tensor (1, m, n): the terms are the singular triplets."""
    weight = make_weight((9, 7)).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    found = rebuilt(orthogonal_terms(weight[None], 3))[0]
    torch.testing.assert_close(found, (left[:, :3] * values[:3]) @ right[:3])


def test_published_cp_recovers_what_has_its_rank():
    modes = paired_modes(24, 16, 3)
    sizes = list(zip(modes.rows, modes.columns, strict=True))
    weight = sum(
        torch.kron(torch.kron(*(drawn(*sizes[k], seed=10 * r + k) for k in (0, 1))), drawn(*sizes[2], seed=10 * r + 2))
        for r in range(2)
    )
    found = fit("cp-published", weight, 2)[2]
    assert (found - weight).norm() < 0.01 * weight.norm()


def test_sweeps_help_cp_and_never_hurt():
    weight, modes = make_weight((24, 12)), paired_modes(24, 12, 3)
    tensor = modes.tensor(weight)
    for terms in (2, 5, 9):
        closed = (tensor - rebuilt(orthogonal_terms(tensor, terms))).square().sum()
        option, prepared, _ = fit("cp", weight, terms)
        assert get_method("cp").error(prepared, option) < closed


def test_block_terms_start_orthogonal_and_sweeps_never_hurt():
    tensor = drawn(8, 6, 9)
    errors = []
    for count in (1, 3, 8, 64):
        blocks = partitioned(tensor, count)
        energy = sum(parts[0].square().sum() for parts in blocks)
        residual = tensor - sum(block(*parts) for parts in blocks)
        torch.testing.assert_close(residual.square().sum(), tensor.square().sum() - energy)
        errors.append(float(residual.square().sum()))
        for _ in range(3):
            before = residual.square().sum()
            residual = sweep(blocks, residual)
            torch.testing.assert_close(residual, tensor - sum(block(*parts) for parts in blocks))
            assert residual.square().sum() <= before * (1 + 1e-12) + 1e-20
        if count < 64:
            assert residual.square().sum() < 0.99 * errors[-1]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20 * tensor.square().sum()


def test_one_block_recovers_what_has_its_ranks():
    modes = paired_modes(24, 12, 3)  # I = 6, 6, 8 and L = 2, 2, 2
    parts = [drawn(2, 2, 2), *(drawn(size, 2, seed=k) for k, size in enumerate(modes.pairs))]
    tensor = block(*parts)
    rows, columns = modes.rows, modes.columns
    folded = tensor.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    weight = folded.permute(0, 2, 4, 1, 3, 5).reshape(24, 12)
    torch.testing.assert_close(modes.tensor(weight), tensor)
    torch.testing.assert_close(fit("block-term", weight, 1)[2], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fast", "slow"), [("cp", "cp-published"), ("block-term", "block-term-published")])
@pytest.mark.parametrize("shape", [(24, 12), (32, 48)])
def test_the_default_is_near_the_published_setting(fast, slow, shape):
    """No more than a sixth of the energy worse, and the slow one is what more sweeps can reach."""
    weight = make_weight(shape)
    option = get_method(fast).options(common.linear_site(*shape), Grid((0.5,), 1))[0.5]
    level, whole = get_method(fast).kept(option), float(weight.square().sum())
    errors = [get_method(name).error(fit(name, weight, level)[1], option) for name in (fast, slow)]
    assert errors[1] <= errors[0] * 1.1
    assert errors[0] - errors[1] < whole / 6


# Running


def test_solvers_leave_tensorlys_backend_as_it_was():
    tensorly.set_backend("pytorch")
    try:
        for name in ("tensor-ring", "tensor-train-matrix", "cp"):
            fit(name, make_weight((12, 8)), 2)
            assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")


def test_the_best_order_is_the_best_of_all():
    """Reading the inputs' core first is cheap, reading it last is not."""
    tensors = (("first", ("m1", "r1")), ("second", ("r1", "m2", "r2")), ("third", ("r2", "n1")))
    sizes = tuple({"m1": 24, "m2": 24, "n1": 576, "r1": 24, "r2": 100}.items())
    steps = best_order(("tokens", "n1"), tensors, ("tokens", "m1", "m2"), sizes)
    assert [name for name, _ in steps.equations] == ["third", "second", "first"]
    assert steps.multiplications == 576 * 100 + 100 * 24 * 24 + 24 * 24 * 24
    assert steps.largest == 24 * 24


def test_many_tokens_run_in_parts():
    """The same, with gradients, when intermediate results would not fit."""
    layer = KroneckerLinear({"left": torch.randn(30, 16, 16), "right": torch.randn(30, 16, 16)}, 256, 256)
    tokens = LARGEST // layer.plans[0].steps.largest + 5
    x = torch.randn(tokens, 256)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.matrix()), rtol=1e-3, atol=1e-2)
    assert layer(x[:0]).shape == (0, 256)
    assert layer(x[0]).shape == (256,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 12), (13, 17)])
def test_every_plan_computes_the_same(name, shape):
    """With the same gradients."""
    option, prepared, _ = fit(name, make_weight(shape), 2)
    factors = get_method(name).truncate(prepared, option)["weight"]
    layer = replacement(nn.Linear(*shape[::-1]), factors.kind, factors.tensors, factors.settings)
    layer.requires_grad_(True)
    x = drawn(5, shape[1]).float()
    expected = nn.functional.linear(x, layer.matrix(), layer.bias)
    reference = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    count = len(factors.tensors)
    assert len(layer.plans) == 2**count - count  # none, and no set of one
    for plan in layer.plans:
        layer.plans = (plan,)
        found = layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        ours = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
        for gradient, other in zip(ours, reference, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)


def test_many_tokens_merge_cores():
    layer = TensorRingLinear(
        {"first": drawn(8, 8, 8, 8), "second": drawn(8, 8, 9, 50), "third": drawn(50, 9, 8, 8)}, 576, 576
    )
    assert not layer.plan(1).merge.equations
    assert layer.plan(4096).merge.equations
    assert layer.plan(4096).multiplications(4096) < 0.3 * layer.plans[0].multiplications(4096)


@pytest.mark.parametrize("name", NAMES)
def test_many_tokens_take_little_more_than_the_dense_product(name):
    """At worst W is contracted once, in order of fewest multiplications, and then multiplied by."""
    option, prepared, _ = fit(name, make_weight((48, 32)), 2)
    factors = get_method(name).truncate(prepared, option)["weight"]
    layer = replacement(nn.Linear(32, 48), factors.kind, factors.tensors, factors.settings)
    sides = math.prod(layer.sizes[i] for i in (*layer.row_modes, *layer.column_modes))
    for tokens in (1, 100, 10_000):
        assert layer.plan(tokens).multiplications(tokens) <= layer.whole.multiplications + tokens * sides


@pytest.mark.parametrize("name", NAMES)
def test_layers_compile(name):
    """Traced whole, without a break."""
    option, prepared, _ = fit(name, make_weight((13, 17)), 2)
    factors = get_method(name).truncate(prepared, option)["weight"]
    layer = replacement(nn.Linear(17, 13), factors.kind, factors.tensors, factors.settings)
    x = torch.randn(3, 17)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_padding_is_counted():
    """13 x 17 runs as 14 x 18 (two modes) and 16 x 18 (three)."""
    assert sorted(paired_modes(13, 17, 2).pairs) == [2 * 6, 7 * 3]
    assert sorted(paired_modes(13, 17, 3).pairs) == [2 * 3, 2 * 3, 4 * 2]
    for name, values in (("kronecker", 12 + 21), ("cp", 6 + 6 + 8), ("block-term", 8 + 2 * 20), ("tucker", 1 + 9 + 17)):
        assert get_method(name).cost(13, 17, 1).values == values


def test_the_layer_of_rings_says_its_sizes():
    layer = TensorRingLinear(
        {"first": torch.zeros(1, 2, 3, 4), "second": torch.zeros(4, 2, 3, 5), "third": torch.zeros(5, 4, 2, 1)}, 13, 17
    )
    assert layer.settings(dict(layer.named_parameters()))["r2"] == 5
    assert layer(torch.ones(2, 17)).shape == (2, 13)
    assert "17, 13" in layer.extra_repr()
