"""The tied embedding and head factored once: what is frequent weighs more, what stays tied counts once."""

import common
import pytest
import torch
from common import linear_site, rank_option
from launching import measured, small_data, verify_here
from test_method_laws import make_weight
from transformers import AutoModelForCausalLM

from rankfront.methods import Gram, Grid, Statistics, get_method
from rankfront.methods._weighting import LeftDiagonal, LeftGram
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs.model import count_parameters
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

NAME, HEAD, TABLE = "hola-embedding", "lm_head", "model.embed_tokens"
SITE = linear_site(60, 16, tied=("table",))
COUNTS = (1000 / torch.arange(1, 61).float() ** 1.5).floor()  # as words have; the last of them are rare
COUNTS[50:] = 0


def statistics(m, n, counts):
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(1)).double()
    x = x @ torch.randn(n, n, generator=torch.Generator().manual_seed(2)).double()
    return Statistics(len(x), gram=Gram((x.T @ x).float()), frequency=counts), x


def rebuilt(name, weight, found, rank, site=SITE):
    method, option = get_method(name), rank_option(name, rank)
    prepared = method.prepare(site, {"weight": weight}, {"weight": found}, [option])
    tensors = method.truncate(prepared, option)["weight"].tensors
    return tensors["left"].double() @ tensors["right"].double()


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_frequent_tokens_come_nearer_and_rare_ones_stay_farther(rank):
    """Than with `svd-llm`, to which tokens are alike, at the same rank."""
    weight = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    found, x = statistics(60, 16, COUNTS)
    ours, even = (((weight - rebuilt(name, weight, found, rank)) @ x.T).square().sum(1) for name in (NAME, "svd-llm"))
    assert ours[0] < 0.5 * even[0]
    assert ours[:3].sum() < 0.7 * even[:3].sum()
    assert ours[40:].sum() > even[40:].sum()
    assert (COUNTS + 1) @ ours.float() < (COUNTS + 1) @ even.float()


def test_tokens_that_never_occur_keep_their_place():
    """Finite rows in the shared basis, near the weight as ranks grow."""
    weight = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    found, _ = statistics(60, 16, COUNTS)
    gaps = [float((weight - rebuilt(NAME, weight, found, rank))[COUNTS == 0].norm()) for rank in (2, 8, 16)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4 * float(weight[COUNTS == 0].norm())
    norms = rebuilt(NAME, weight, found, 8)[COUNTS == 0].norm(dim=1)
    assert torch.isfinite(norms).all()
    assert (norms > 0).all()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_equal_counts_give_svd_llm(rank):
    """Then R is a number."""
    weight = make_weight((60, 16))
    found, _ = statistics(60, 16, torch.full((60,), 7.0))
    torch.testing.assert_close(
        rebuilt(NAME, weight, found, rank), rebuilt("svd-llm", weight, found, rank), rtol=1e-4, atol=1e-5
    )


def test_a_vocabulary_needs_no_matrix_of_its_own_size():
    """200,000 tokens squared would be 320 GB."""
    m, n = 200_000, 4
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    found, _ = statistics(m, n, torch.arange(m).remainder(50).float())
    site = linear_site(m, n, tied=("table",))
    assert rebuilt(NAME, weight, found, 2, site).shape == (m, n)


def test_a_diagonal_weighs_rows_as_its_matrix_does():
    squares, weight = torch.rand(12).double() + 0.1, make_weight((12, 8)).double()
    thin, full = LeftDiagonal(squares), LeftGram(squares.diag())
    torch.testing.assert_close(thin.times(weight), full.times(weight), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(thin.undone(thin.times(weight)), weight)
    torch.testing.assert_close(full.undone(full.times(weight)), weight, rtol=1e-6, atol=1e-7)


def test_only_what_table_and_head_share_is_treated(architecture):
    offered = {
        site.name: site for site in find_sites(architecture.build()) if get_method(NAME).options(site, Grid((0.5,), 2))
    }
    assert list(offered) == ([architecture.head] if architecture.tied else [])
    refused = [site for site in find_sites(architecture.build()) if site.name not in offered]
    assert all(get_method(NAME).refuses(site) for site in refused)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("limit", [1, 2**30])
def test_counts_are_those_of_a_loop_over_tokens(name, limit):
    """At the head alone, and only where they are needed."""
    model, windows = common.architecture(name).build(), common.tokens(3, 12, seed=3)
    sites = common.single_sites(model)
    expected = torch.zeros(common.VOCABULARY)
    for token in windows.flatten().tolist():
        expected[token] += 1
    for needs in ({"gram", "frequency"}, {"frequency"}, {"gram"}):
        found = calibrate(model, windows, list(sites), frozenset(needs), lambda done, total: None, limit=limit)
        for site, by_role in found:
            statistic = by_role["weight"].frequency
            if "frequency" in needs and site.name == HEAD:
                assert torch.equal(statistic, expected)
            else:
                assert statistic is None


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_an_exported_model_stays_tied_and_shrinks_as_claimed(tied_folder, text_file, tmp_path, monkeypatch, form):
    verify_here(monkeypatch)
    data = small_data(tied_folder, text_file)
    data["space"] = {"include": [HEAD], "methods": [NAME], "keep": [0.5], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    dense = count_parameters(resident.compressed.model)
    ((site, (option,)),) = resident.compressed.space.wanted().items()
    saved = common.VOCABULARY * common.HIDDEN - option["rank"] * (common.VOCABULARY + common.HIDDEN)
    row = measured(resident, Plan.of({site.name: option}))
    assert row.attributes["parameter_count"] == dense - saved
    assert row.attributes["parameters"] == pytest.approx(1 - saved / dense)

    ids = common.tokens(2, 24, seed=3)
    with torch.no_grad():
        expected = resident.compressed.model(input_ids=ids, use_cache=False).logits
        export(resident.setup, row, tmp_path / "out", form)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    table, head = loaded.get_submodule(TABLE), loaded.get_submodule(HEAD)
    assert {p.data_ptr() for p in table.parameters()} == {p.data_ptr() for p in head.parameters()}
    assert count_parameters(loaded) == (dense - saved if form == "factored" else dense)
