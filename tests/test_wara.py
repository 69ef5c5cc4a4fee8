"""Low rank in wavelet bands: the transform, what one global rank gives, the sort over bands, the order of inputs."""

import itertools

import common
import numpy as np
import pytest
import pywt
import torch
from rows import output_loss
from test_method_laws import make_sample, make_weight

from rankfront.methods import Gram, Grid, InputError, Option, Statistics, get_method
from rankfront.methods._algebra import regularise
from rankfront.methods._fitted import matrix_of
from rankfront.methods._low_rank import weighted_subspace
from rankfront.methods._weighting import Unweighted
from rankfront.methods.layers import replacement
from rankfront.methods.layers_wavelet import analyse, filters, synthesise
from rankfront.methods.wara import TURNS, bands_of, cosines, fit_bands, pairing, share_ranks

NAMES = ("wara", "wara-db2", "wara-ordered")
MOMENTS = pytest.mark.parametrize("moments", [1, 2])


def transform(size, moments):
    """T (n, n)."""
    return torch.cat(analyse(torch.eye(size, dtype=torch.float64), filters(moments)), -1).T


def white(n):
    """Inputs without preference."""
    return {"weight": Statistics(n, gram=Gram(torch.eye(n)))}


def fitted(name, weight, statistics, components):
    method, option = get_method(name), Option.of(name, components=components)
    prepared = method.prepare(common.linear_site(*weight.shape), {"weight": weight}, statistics, [option])
    return method.error(prepared, option), method.truncate(prepared, option)["weight"]


def tail(weight, rank):
    return float(torch.linalg.svdvals(weight.double())[rank:].square().sum())


@pytest.mark.parametrize(("moments", "wavelet"), [(1, "haar"), (2, "db2")])
@pytest.mark.parametrize("size", [4, 10, 64])
def test_the_transform_is_that_of_pywavelets(moments, wavelet, size):
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = pywt.dwt(x.numpy(), wavelet, mode="periodization")
    np.testing.assert_allclose(analyse(x, filters(moments))[0].numpy(), low, atol=1e-12)
    np.testing.assert_allclose(analyse(x, filters(moments))[1].numpy(), high, atol=1e-12)


@MOMENTS
@pytest.mark.parametrize("size", [2, 4, 14, 576])
def test_the_transform_is_orthonormal_and_undone(moments, size):
    """So that errors in bands add up to the error of W."""
    t, identity = transform(size, moments), torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(t @ t.T, identity)
    torch.testing.assert_close(synthesise(*analyse(identity, filters(moments)), filters(moments)), identity)


def test_a_high_band_is_what_neighbours_differ_by():
    """None for a constant, and for db2 none for a line either, away from its ends."""
    line = torch.arange(12.0)
    assert analyse(torch.ones(12), filters(1))[1].abs().max() < 1e-6
    assert analyse(torch.ones(12), filters(2))[1].abs().max() < 1e-6
    assert analyse(line, filters(1))[1].abs().min() > 0.5
    assert analyse(line, filters(2))[1][1:-1].abs().max() < 1e-5


@MOMENTS
@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (16, 16)])
def test_one_rank_for_the_whole_transform_is_svd(moments, shape):
    """So whatever is gained comes from the bands; and in the inputs' metric it is `svd-llm`."""
    weight, sample = make_weight(shape), make_sample(shape)
    left, right = transform(shape[0], moments), transform(shape[1], moments)
    whole = left @ weight.double() @ right.T
    gram = right @ regularise(sample.statistics().gram.raw) @ right.T
    site, statistics = common.linear_site(*shape), {"weight": sample.statistics()}
    for name, weighting in (("svd", Unweighted()), ("svd-llm", Gram(gram))):
        method, options = get_method(name), [common.rank_option(name, rank) for rank in (1, 3, 7)]
        prepared = method.prepare(site, {"weight": weight}, statistics, options)
        basis = weighted_subspace(whole, weighting)[0]
        for option in options:
            u = basis[:, : option["rank"]]
            ours = left.T @ u @ (u.T @ whole) @ right
            expected = matrix_of(method.truncate(prepared, option)["weight"], *shape)
            torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wara", "wara-db2"])
@pytest.mark.parametrize("shape", [(12, 16), (16, 10)])
@pytest.mark.parametrize("components", [1, 3, 5, 9, 11])
def test_without_a_metric_no_choice_of_ranks_does_better(name, shape, components):
    """Bands are apart then: the error is the best of every way to share k components out, each band by svd."""
    weight = make_weight(shape)
    bands = bands_of(weight.double(), get_method(name).moments)
    flat = [band for row in bands for band in row]
    spread = itertools.product(range(min(flat[0].shape) + 1), repeat=4)
    best = min(
        sum(tail(band, rank) for band, rank in zip(flat, ranks, strict=True))
        for ranks in spread
        if sum(ranks) == components
    )
    error, factors = fitted(name, weight, white(shape[1]), components)
    assert error == pytest.approx(best, rel=1e-4)
    assert sum(factors.settings[band] for band in ("ll", "hl", "lh", "hh")) == components


@pytest.mark.parametrize("k", [1, 7, 8, 12, 24, 39, 40])
def test_shares_are_in_chunks_and_sum_to_what_was_asked(k):
    generator = torch.Generator().manual_seed(k)
    spectra = [torch.rand(10, generator=generator).sort(descending=True).values for _ in range(4)]
    ranks = share_ranks(spectra, k)
    assert sum(ranks) == k
    assert all(0 <= rank <= 10 for rank in ranks)
    if k in (8, 24):
        assert all(rank % 8 == 0 for rank in ranks)
    if k % 2:
        assert sum(float(s[:r].sum()) for s, r in zip(spectra, ranks, strict=True)) == pytest.approx(
            float(torch.cat(spectra).sort(descending=True).values[:k].sum())
        )


@pytest.mark.parametrize("kind", ["plain", "outlier", "dead inputs"])
@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (16, 16)])
def test_turns_lower_the_error(monkeypatch, kind, shape):
    """The blocks of the inputs' Gram couple the bands; a band alone would not know."""
    weight, sample = make_weight(shape), make_sample(shape, kind)
    errors = []
    for turns in (1, 2, TURNS, 3 * TURNS):
        monkeypatch.setattr("rankfront.methods.wara.TURNS", turns)
        errors.append(fitted("wara", weight, {"weight": sample.statistics()}, 8)[0])
    assert errors[1] < errors[0]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_turns_end_where_no_band_alone_can_be_bettered(monkeypatch, shape):
    """Against gradients: at the end the error is stationary in the factors of every band."""
    monkeypatch.setattr("rankfront.methods.wara.TURNS", 3000)
    weight, gram = make_weight(shape).double(), regularise(make_sample(shape).statistics().gram.raw)
    bands, grams = bands_of(weight, 1), bands_of(gram, 1)
    found, _ = fit_bands(bands, grams, 8)
    factors = {name: [t.clone().requires_grad_(True) for t in pair] for name, pair in found.items()}

    def loss():
        total = torch.zeros((), dtype=torch.float64)
        for a, row in enumerate("lh"):
            e = [bands[a][b] - factors[row + c][0] @ factors[row + c][1] for b, c in enumerate("lh")]
            total = total + sum((e[b] @ grams[b][c] @ e[c].T).trace() for b in range(2) for c in range(2))
        return total

    value = loss()
    value.backward()
    scale = float((weight @ gram @ weight.T).trace())
    assert value.item() < 0.5 * scale
    for pair in factors.values():
        for tensor in pair:
            if tensor.numel():
                assert float((tensor.grad * tensor.detach()).norm()) < 1e-3 * scale


def paired(m, n, seed=0):
    """Every column twice, the pairs scrambled, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(m, n // 2, generator=generator).repeat_interleave(2, 1)
    noisy = columns + 0.02 * torch.randn(m, n, generator=generator)
    return noisy[:, torch.randperm(n, generator=generator)]


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 64)])
def test_an_order_finds_scrambled_pairs(shape):
    """Differences of neighbours vanish then: half of the columns tell the whole weight."""
    weight = paired(*shape)
    components = min(shape)  # all of the two bands of the low inputs
    plain, ordered = (fitted(name, weight, white(shape[1]), components)[0] for name in ("wara", "wara-ordered"))
    assert ordered < 0.01 * float(weight.square().sum())
    assert ordered < 0.05 * plain


def test_where_nothing_is_alike_an_order_changes_little():
    """Neither does it cost much more than its bits."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain, ordered = (fitted(name, weight, white(64), 32)[0] for name in ("wara", "wara-ordered"))
    assert 0.9 * plain < ordered < 1.02 * plain


def slow_pairing(likeness):
    n = len(likeness)
    free, order = set(range(n)), []
    for _, i, j in sorted((-float(likeness[a, b]), a, b) for a in range(n) for b in range(a + 1, n)):
        if i in free and j in free:
            order += [i, j]
            free -= {i, j}
    return order + sorted(free)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_pairs_are_those_of_a_greedy_loop(n, kind):
    gram = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double()
    likeness = cosines(gram @ gram.T) if kind == "random" else torch.ones(n, n, dtype=torch.float64)
    found = pairing(likeness)
    assert sorted(found.tolist()) == list(range(n))
    if kind == "random":
        assert found.tolist() == slow_pairing(likeness)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(13, 17), (12, 17), (13, 16)])
def test_odd_sizes_lose_nothing_by_their_padding(name, shape):
    """The error counts the weight's own rows and columns alone, and never more than the bands' own."""
    weight, sample = make_weight(shape), make_sample(shape)
    for option in get_method(name).options(common.linear_site(*shape), Grid((0.3, 0.6), 1)).values():
        error, factors = fitted(name, weight, {"weight": sample.statistics()}, option["components"])
        measured = output_loss(weight.double() - matrix_of(factors, *shape).double(), sample)
        assert error == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_no_dense_weight_is_rebuilt_to_run(name, monkeypatch):
    """Nor does compiling lose anything."""
    _, factors = fitted(name, make_weight((12, 16)), white(16), 8)
    layer = replacement(torch.nn.Linear(16, 12), factors.kind, factors.tensors, factors.settings)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.matrix().T + layer.bias
    monkeypatch.setattr(type(layer), "matrix", None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_more_components_than_the_bands_hold_are_refused(name):
    with pytest.raises(InputError, match="components"):
        fitted(name, make_weight((12, 16)), white(16), 25)
    with pytest.raises(InputError, match="components"):
        get_method(name).check(Option.of(name, components="all"))
