"""Sequential refit: what it minimises, against slow code; what it leaves alone; exports of it."""

import common
import pytest
import torch
from launching import make_run, measured, small_data, verify_here
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods import DENSE_OPTION, get_method
from rankfront.methods._fitted import matrix_of
from rankfront.methods._rounded import Rounded
from rankfront.methods.layers import weight_of
from rankfront.search.measure import refit
from rankfront.search.measure.refit import refitted
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

METHODS = {  # architectures differ in biases, positions, Conv1D, and in what blocks are called with
    "llama": ["svd-llm", "svd", "vo-svd", "nystrom", "lama", "hola", "shared-basis"],
    "gpt2": ["svd-llm", "nystrom"],
    "opt": ["svd-llm", "vo-svd", "nystrom"],
    "gemma3": ["svd-llm", "vo-svd", "nystrom"],
    "gpt-neox": ["svd-llm"],
}
NARROW = ["svd-llm", "cospadi", "vo-svd", "nystrom"]  # in 8 and 4 bits, and the dense weight


@pytest.fixture(scope="module")
def residents(tmp_path_factory, text_file):
    """Name of an architecture -> its resident model with `METHODS` in its space, or `NARROW` ones alone."""
    made = {}

    def make(name, narrow=False):
        key = name, narrow
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            data = small_data(common.save_folder(name, folder), text_file)
            data["space"] = {"methods": METHODS[name], "keep": [0.3, 0.6], "rank_multiple": 2}
            if narrow:
                data["space"] |= {"methods": NARROW, "bits": [8, 4]}
            made[key] = JobRunner(Study(data).setup())
        common.restore(made[key])
        return made[key]

    return make


def plan_of(resident, methods, blocks=None):
    """The cheapest option of the first of ``methods`` that each site has, where nothing of it is treated yet."""
    chosen, taken = {}, set()
    for method in methods:
        for site, options in resident.compressed.space.wanted().items():
            own = [option for option in options if option.method == method]
            within = blocks is None or resident.compressed.sites[site].block in blocks
            if own and within and taken.isdisjoint(w.path for w in site.weights):
                chosen[site.name] = min(own, key=lambda o: get_method(method).storage(site, o).parameters)
                taken |= {weight.path for weight in site.weights}
    return Plan.of(chosen, resident.setup.origin())


def inputs(resident, path, ids):
    """What the module at ``path`` reads, (tokens, n)."""
    seen = []
    handle = resident.compressed.model.get_submodule(path).register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    with torch.no_grad():
        resident.compressed.model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2)


def logits(resident):
    with torch.no_grad():
        return resident.compressed.model(input_ids=common.tokens(2, 24, seed=3), use_cache=False).logits


def without_bias(module, x):
    """What a module makes of x, its bias apart."""
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        return module(x) - (0 if bias is None else bias)


@pytest.mark.parametrize("name", METHODS)
def test_no_matrix_of_its_rank_fits_the_dense_outputs_better(residents, name, monkeypatch):
    """Of every weight alone in turn, on the inputs that it now reads: Σ ‖W x − Ŵ x'‖² is the least of its rank, which
    is the tail of the spectrum of the target's outputs and what no matrix reaches; plain factors leave more."""
    monkeypatch.setattr(refit, "RIDGE", 1e-7)
    monkeypatch.setattr(refit, "ANCHOR", 1.0)
    resident = residents(name)
    ids = resident.setup.tokens["calibrate"]
    plan = plan_of(resident, ["svd-llm"])
    treated = {site for site in resident.compressed.sites if site.name in plan.by_site}
    with resident.compressed.dense():
        dense = {site: inputs(resident, site.name, ids) for site in treated}
    resident.compressed.apply(plan)
    with refitted(resident.compressed, plan):
        for site in treated:
            x, now = dense[site].double(), inputs(resident, site.name, ids).double()
            weight = weight_of(resident.compressed.dense_modules[site.name]).double()
            wanted = x @ weight.T
            left = (
                (wanted - without_bias(resident.compressed.model.get_submodule(site.name), now.float()).double())
                .square()
                .sum()
            )
            best = torch.linalg.pinv(now, rtol=1e-5) @ wanted  # (n, m): of any rank
            floor = (wanted - now @ best).square().sum()
            rank = plan.option(site.name)["rank"]
            tail = torch.linalg.svdvals(now @ best)[rank:].square().sum()
            assert float(left) == pytest.approx(float(floor + tail), rel=0.01)
            factors = resident.compressed.store.factors(site, plan.option(site.name))["weight"].tensors
            plain = (wanted - now @ factors["right"].double().T @ factors["left"].double().T).square().sum()
            assert float(left) <= float(plain) * 1.001


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_behind_a_dense_model_nothing_changes(residents, name):
    """The first weights of the first block read what they read when they were factored: M is W, C' is C."""
    resident = residents(name)
    plan = plan_of(resident, ["svd-llm"], blocks=[0])
    first = next(site for site in resident.compressed.sites if site.name in plan.by_site)
    plan = Plan.of({first.name: plan.option(first.name)}, resident.setup.origin())
    resident.compressed.apply(plan)
    plain = logits(resident)
    with refitted(resident.compressed, plan):
        torch.testing.assert_close(logits(resident), plain, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_dense_after(residents, name):
    resident = residents(name)
    before = logits(resident)
    modules = dict(resident.compressed.model.named_modules())
    plan = plan_of(resident, METHODS[name][::-1])
    with refitted(resident.compressed, plan):
        assert not torch.allclose(logits(resident), before)
    assert torch.equal(logits(resident), before)
    assert all(modules[path] is module for path, module in resident.compressed.model.named_modules())
    resident.compressed.apply(plan)
    plain = logits(resident)
    common.restore(resident)
    resident.compressed.apply(plan)
    assert torch.equal(logits(resident), plain)


@pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
def test_the_target_goes_part_of_the_way_to_the_regression(monkeypatch, anchor):
    """From W itself to what predicts W x from x' with the least error."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 7, generator=generator), torch.randn(5, 7, generator=generator)
    compressed = x + 0.7 * torch.randn(200, 7, generator=generator)
    sums = refit._Sums()
    for part, other in zip(x.split(60), compressed.split(60), strict=True):
        sums.add(part, other)
    monkeypatch.setattr(refit, "ANCHOR", anchor)
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    best = torch.linalg.lstsq(compressed.double(), x.double() @ weight.double().T).solution.T
    expected = (1 - anchor) * weight.double() + anchor * best
    torch.testing.assert_close(sums.target(weight), expected, rtol=1e-4, atol=1e-4)
    assert sums.tokens == 200


@pytest.mark.parametrize("method", ["svd", "lama", "shared-basis"])
def test_what_has_no_gram_to_replace_stays(residents, method):
    resident = residents("llama")
    plan = plan_of(resident, [method])
    resident.compressed.apply(plan)
    before = logits(resident)
    assert plan.choices
    assert not any(
        get_method(method).refit_roles(site) for site in resident.compressed.sites if site.name in plan.by_site
    )
    with refitted(resident.compressed, plan):
        assert torch.equal(logits(resident), before)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "vo-svd"),
        ("llama", "nystrom"),
        ("llama", "hola"),
        ("opt", "vo-svd"),
        ("opt", "nystrom"),
        ("gpt2", "nystrom"),
        ("llama", "vo-svd-int8"),
        ("llama", "vo-svd-int4"),
        ("llama", "nystrom-int8"),
        ("opt", "nystrom-int4"),
        ("gpt2", "nystrom-int4"),
    ],
)
def test_joint_treatments_come_nearer_to_the_dense_outputs(residents, name, method):
    """At the weight that the refitted Gram belongs to, or what reads its outputs, summed over the blocks."""
    resident = residents(name, "-int" in method)
    ids = resident.setup.tokens["calibrate"]
    plan = plan_of(resident, [method, "svd-llm", "svd-llm-int8"])
    paths = [site.anchor.path for site in resident.compressed.sites if plan.option(site.name).method == method]
    assert paths

    def outputs():
        seen = {}
        handles = [
            resident.compressed.model.get_submodule(path).register_forward_hook(
                lambda module, given, output, path=path: seen.__setitem__(path, output)
            )
            for path in paths
        ]
        with torch.no_grad():
            resident.compressed.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return torch.cat([seen[path].flatten() for path in paths])

    with resident.compressed.dense():
        dense = outputs()
    resident.compressed.apply(plan)
    plain = (outputs() - dense).square().sum()
    with refitted(resident.compressed, plan):
        assert (outputs() - dense).square().sum() < plain


@pytest.mark.parametrize("method", [f"{base}-int{bits}" for base in ("svd-llm", "cospadi", "gptq") for bits in (8, 4)])
def test_what_is_in_fewer_bits_leaves_no_more_of_the_dense_outputs(residents, method, monkeypatch):
    """Σ ‖W x − Ŵ x'‖² of every weight, on the inputs that it now reads, against the factors of the dense inputs."""
    monkeypatch.setattr(refit, "RIDGE", 1e-7)
    monkeypatch.setattr(refit, "ANCHOR", 1.0)
    resident = residents("llama", narrow=True)
    ids, plan = resident.setup.tokens["calibrate"], plan_of(resident, [method])
    treated = [site for site in resident.compressed.sites if site.name in plan.by_site]
    assert treated
    with resident.compressed.dense():
        wanted = {
            site: without_bias(resident.compressed.model.get_submodule(site.name), inputs(resident, site.name, ids))
            for site in treated
        }
    with refitted(resident.compressed, plan):
        for site in treated:
            now = inputs(resident, site.name, ids)
            factors = resident.compressed.store.factors(site, plan.option(site.name))["weight"]
            plain = now @ matrix_of(factors, *wanted[site].shape[1:], now.shape[1]).T
            fitted = without_bias(resident.compressed.model.get_submodule(site.name), now)
            left, before = ((wanted[site] - found).double().square().sum() for found in (fitted, plain))
            assert float(left) <= float(before) * 1.001, site.name


def test_what_is_rounded_beside_is_rounded_under_what_it_reads(residents, monkeypatch):
    """Of an MLP the down projection alone is fitted; the Gram of the others is of inputs of the compressed model."""
    resident = residents("llama", narrow=True)
    seen, prepare = [], Rounded.prepare
    monkeypatch.setattr(Rounded, "prepare", lambda *given: seen.append((given[1], given[3])) or prepare(*given))
    with refitted(resident.compressed, plan_of(resident, ["nystrom-int4", "vo-svd-int4"])):
        for site, statistics in seen:
            assert statistics.keys() == set(site.roles)
            for weight in site.weights:
                if weight.role in ("gate", "up"):
                    now = inputs(resident, weight.path, resident.setup.tokens["calibrate"]).double()
                    torch.testing.assert_close(statistics[weight.role].gram.raw.double(), now.T @ now)
    assert len(seen) > 1


def test_options_keep_their_levels_and_storage(residents):
    resident = residents("llama")
    plan = plan_of(resident, METHODS["llama"])
    resident.compressed.apply(plan)
    shapes = {name: p.shape for name, p in resident.compressed.model.named_parameters()}
    with refitted(resident.compressed, plan):
        assert {name: p.shape for name, p in resident.compressed.model.named_parameters()} == shapes


def test_a_plan_that_treats_nothing(residents):
    resident = residents("llama")
    before = logits(resident)
    with refitted(resident.compressed, Plan(())):
        assert torch.equal(logits(resident), before)


@pytest.fixture(scope="module")
def run(model_folder, text_file, tmp_path_factory):
    """A finished run that refits its front."""
    data = small_data(model_folder, text_file)
    data["search"] |= {"trials": 6, "refit": "sequential"}
    return make_run(data, tmp_path_factory.mktemp("run") / "run")


def test_the_front_is_measured_with_and_without(run):
    front = run.front()
    assert any(row.plan.choices for row in front)
    for row in front:
        assert ("refitted" in row.report) == bool(row.plan.choices)
        assert all(value > 1 for name, value in row.report.items() if name in ("perplexity", "refitted"))


def test_a_run_may_ask_for_it_later(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file)
    data["search"] |= {"trials": 4}
    first = make_run(data, tmp_path / "run")
    assert not any("refitted" in row.report for row in first.front())
    plain = {row.number: row.report["perplexity"] for row in first.front()}
    data["search"]["refit"] = "sequential"
    again = make_run(data, tmp_path / "run")
    assert {row.number: row.report["perplexity"] for row in again.front()} == plain
    assert any("refitted" in row.report for row in again.front())


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_exports_are_refitted_and_verified(run, form, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    row = next(row for row in run.front() if row.plan.choices)
    verified = run.export(tmp_path / "refitted", row, form)
    plain = run.export(tmp_path / "plain", row, form, refit="none")
    assert verified.parameters == plain.parameters
    assert verified.perplexity != plain.perplexity
    assert plain.perplexity == pytest.approx(row.attributes["perplexity"], rel=5e-3)
    card = (tmp_path / "refitted" / "README.md").read_text(encoding="utf-8")
    assert "refitted" in card
    assert "refitted" not in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "refitted")
    windows = run.setup().tokens["report"]
    total = 0.0
    with torch.no_grad():
        for ids in windows:
            out = loaded(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total += float(nn.functional.cross_entropy(out, ids[1:], reduction="sum"))
    perplexity = torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp()
    assert float(perplexity) == pytest.approx(row.report["refitted"], rel=2e-3)
    assert Plan.from_json((tmp_path / "refitted" / "plan.json").read_text()) == row.plan
    assert DENSE_OPTION not in row.plan.by_site.values()


def test_a_refit_that_fails_loses_nothing(model_folder, text_file, tmp_path, monkeypatch):
    """Its reason is kept beside what was measured without it, and it is not tried again."""
    data = small_data(model_folder, text_file)
    data["search"] |= {"trials": 4, "refit": "sequential"}
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        raise torch.OutOfMemoryError("no room\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(refit, "_fit", failing)
        run = make_run(data, tmp_path / "run")
    treated = [row for row in run.front() if row.plan.choices]
    assert treated
    for row in treated:
        assert row.report["refit_failure"] == "OutOfMemoryError: no room"
        assert row.report["perplexity"] > 1
        assert "refitted" not in row.report
    done = len(calls)
    again = make_run(data, tmp_path / "run")
    assert len(calls) == done
    assert [row.report for row in again.front()] == [row.report for row in run.front()]


@pytest.mark.parametrize("method", ["wara", "compot", "oats", "nystrom", "hola"])
def test_an_export_describes_the_factors_that_were_refitted(method, model_folder, text_file, tmp_path, monkeypatch):
    """Also where more than the tensors hangs on the data: the ranks of wavelet bands."""
    verify_here(monkeypatch)
    data = small_data(model_folder, text_file)
    data["space"] = {"methods": [method], "keep": [0.5], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    row = measured(resident, plan_of(resident, [method]))
    with refitted(resident.compressed, row.plan):
        expected = logits(resident)
    export(resident.setup, row, tmp_path / "out", "factored", "sequential")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = loaded(input_ids=common.tokens(2, 24, seed=3), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
