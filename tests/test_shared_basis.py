"""Weights that share a basis: across adjacent blocks, and the siblings of one block."""

import common
import pytest
import torch
import transformers
from launching import make_run, measured, small_data, verify_here
from test_method_laws import make_sample, make_weight
from transformers import AutoModelForCausalLM

from rankfront.methods import DENSE_OPTION, Grid, Option, Site, Weight, get_method
from rankfront.methods._fitted import matrix_of
from rankfront.search.factors.calibration import calibrate
from rankfront.search.factors.gradient import quadratic_divergence
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.sites import find_sites, weights_at
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

METHODS = ("shared-basis", "hola")
OFFERED = {  # kinds of projection that adjacent blocks share, and siblings
    "llama": (5, {("query", "key", "value"), ("gate", "up")}),
    "phi3": (2, set()),
    "gpt-neox": (2, set()),
    "opt": (4, {("query", "key", "value")}),
    "gpt2": (2, set()),
}
TREATED = [(name, method) for name in OFFERED for method in METHODS if method == "shared-basis" or OFFERED[name][1]]
each_pair = pytest.mark.parametrize(("name", "method"), TREATED, ids=lambda value: value)
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


class World:
    """A tiny resident model with one method in its space."""

    def __init__(self, name, method, folder, text):
        data = small_data(common.save_folder(name, folder), text)
        data["space"] = {"methods": [method], "keep": [0.3, 0.6], "rank_multiple": 2}
        self.resident = JobRunner(Study(data).setup())
        self.wanted = {s: o for s, o in self.resident.compressed.space.wanted().items() if o}
        self.method = get_method(method)
        self.model = load_model(self.resident.setup.source, torch.float32, "cpu")
        windows = self.resident.setup.tokens["calibrate"]
        self.statistics = dict(calibrate(self.model, windows, list(self.wanted), frozenset({"gram"}), lambda *_: None))

    def logits(self):
        with torch.no_grad():
            return self.resident.compressed.model(input_ids=common.tokens(2, 24, seed=3), use_cache=False).logits


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, text_file):
    made = {}

    def make(name, method):
        if (name, method) not in made:
            made[name, method] = World(name, method, tmp_path_factory.mktemp(name) / "model", text_file)
        common.restore(made[name, method].resident)
        return made[name, method]

    return make


def stack(world, site):
    return torch.cat([weights_at(world.model, site)[role] for role in site.roles]).double()


def summed_gram(world, site):
    """Once for every input: siblings read the same one."""
    grams = {id(s.gram): s.gram.raw.double() for s in world.statistics[site].values()}
    return torch.stack(list(grams.values())).sum(0)


def rebuilt(world, site, option):
    factors = world.resident.compressed.store.factors(site, option)
    return torch.cat([matrix_of(factors[w.role], w.out_features, w.in_features) for w in site.weights]).double()


@pytest.mark.parametrize("name", OFFERED)
def test_every_architecture_says_what_can_share(name):
    runs, siblings = OFFERED[name]
    apart = [site for site in find_sites(common.architecture(name).build()) if site.separate]
    assert len([site for site in apart if site.roles == ("0", "1")]) == runs
    assert {site.roles for site in apart if site.roles[0] != "0"} == siblings
    for site in apart:
        assert [part.anchor for part in site.parts] == list(site.weights)
        assert sum(get_method(m).refuses(site) is None for m in METHODS) == 1


@pytest.mark.parametrize(("count", "blocks", "expected"), [(2, 5, [0, 2]), (3, 7, [0, 3]), (4, 4, [0])])
def test_runs_follow_each_other_without_overlap(count, blocks, expected):
    row = common.architecture("llama")
    config = getattr(transformers, row.config)(**{**row.settings, "num_hidden_layers": blocks})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    sites = find_sites(model)
    own = [site for site in sites if len(site.weights) == count and site.roles[0] == "0" and "q_proj" in site.name]
    assert [sites[site].block for site in own] == expected
    assert [[weight.path for weight in site.weights] for site in own] == [
        [f"model.layers.{first + i}.self_attn.q_proj" for i in range(count)] for first in expected
    ]
    name = "shared-basis" if count == 2 else f"shared-basis-{count}"
    assert all(get_method(name).options(site, Grid((0.5,), 2)) for site in own)


@each_pair
def test_it_is_the_truncated_svd_of_the_stack(worlds, name, method):
    """Its loss Σ_i ‖Δ_i C^{1/2}‖², C the sum of the Grams, is the tail of the spectrum of the weighted stack."""
    world = worlds(name, method)
    for site, options in world.wanted.items():
        weight, gram = stack(world, site), summed_gram(world, site)
        values, vectors = torch.linalg.eigh(gram)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        spectrum = torch.linalg.svdvals(weight @ root).square()
        for option in options:
            delta = weight - rebuilt(world, site, option)
            loss, floor = float((delta @ root).square().sum()), 1e-5 * float(spectrum.sum())
            predicted = world.method.error(world.resident.compressed.store.load(site, option), option)
            assert loss == pytest.approx(float(spectrum[option["rank"] :].sum()), rel=2e-3, abs=floor)
            assert predicted == pytest.approx(loss, rel=2e-3, abs=floor)


@pytest.mark.parametrize("shapes", [((20, 14), (20, 14)), ((7, 9), (12, 9), (5, 9)), ((6, 9),) * 5])
def test_the_full_rank_reproduces_every_weight(shapes):
    name, roles = {
        2: ("shared-basis", ("0", "1")),
        3: ("hola", ("query", "key", "value")),
        5: ("hola-experts", tuple(f"expert{number}" for number in range(5))),
    }[len(shapes)]
    site = Site("s", tuple(Weight(r, r, *shape) for r, shape in zip(roles, shapes, strict=True)), separate=True)
    method = get_method(name)
    weights = {r: make_weight(shape, seed=i) for i, (r, shape) in enumerate(zip(roles, shapes, strict=True))}
    statistics = {
        r: make_sample(shape, seed=i).statistics() for i, (r, shape) in enumerate(zip(roles, shapes, strict=True))
    }
    option = Option.of(method.name, rank=shapes[0][1])
    factors = method.truncate(method.prepare(site, weights, statistics, [option]), option)
    for role, shape in zip(roles, shapes, strict=True):
        torch.testing.assert_close(matrix_of(factors[role], *shape), weights[role], rtol=1e-4, atol=1e-4)
    assert len({id(each.tensors["right"]) for each in factors.values()}) == 1
    assert sum(each.storage.values for each in factors.values()) == method.storage(site, option).values


@each_pair
def test_the_basis_is_one_parameter_and_counted_once(worlds, name, method):
    world = worlds(name, method)
    before = sum(p.numel() for p in world.resident.compressed.model.parameters())
    for site, options in world.wanted.items():
        for option in options:
            world.resident.compressed.apply(Plan.of({site.name: option}))
            now = sum(p.numel() for p in world.resident.compressed.model.parameters())
            assert before - now == site.storage.values - world.method.storage(site, option).values
            modules = [world.resident.compressed.model.get_submodule(weight.path) for weight in site.weights]
            assert len({id(module.right) for module in modules}) == 1
            assert len({id(module.left) for module in modules}) == len(modules)
        world.resident.compressed.apply(Plan.of({site.name: DENSE_OPTION}))


@each_pair
def test_it_runs_alike_within_slopes(worlds, name, method):
    world = worlds(name, method)
    world.resident.compressed.apply(Plan.of({site.name: options[0] for site, options in world.wanted.items()}))
    treated = world.logits()
    with world.resident.compressed.anchored():
        torch.testing.assert_close(world.logits(), treated, **CLOSE)
    torch.testing.assert_close(world.logits(), treated, rtol=0, atol=0)


@each_pair
def test_products_are_those_of_each_weight(worlds, name, method):
    world, generator = worlds(name, method), torch.Generator().manual_seed(0)
    for site, options in world.wanted.items():
        prepared = world.resident.compressed.store.load(site, options[0])
        for part in site.parts:
            g = torch.randn(7, part.anchor.out_features, generator=generator)
            x = torch.randn(7, part.anchor.in_features, generator=generator)
            found = world.method.gradient_dot_outputs(part, prepared, options, g, x)
            for option in options:
                factors = world.method.truncate(prepared, option)[part.anchor.role]
                matrix = matrix_of(factors, part.anchor.out_features, part.anchor.in_features)
                torch.testing.assert_close(found[option.label], (g * (x @ matrix.T)).sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_menu_adds_up_what_all_weights_do(worlds, method):
    """½ E[(Σ_i g_iᵀ Δ_i x_i)²], gradients of the one drawn loss at every weight: slow, from whole matrices."""
    world = worlds("llama", method)
    model, windows = world.resident.compressed.model, common.tokens(3, 16)
    found = quadratic_divergence(model, windows, world.wanted, world.resident.compressed.store, 5)
    for site, options in world.wanted.items():
        for option in options:
            factors = world.resident.compressed.store.factors(site, option)
            moves = torch.zeros(windows.numel())
            handles, seen = [], {}
            for weight in site.weights:
                module = model.get_submodule(weight.path)
                delta = module.weight - matrix_of(factors[weight.role], weight.out_features, weight.in_features)

                def hook(module, inputs, output, delta=delta, path=weight.path, seen=seen):
                    added = torch.zeros_like(output, requires_grad=True)
                    seen[path] = added, (inputs[0].detach() @ delta.T).flatten(0, 1)
                    return output + added

                handles.append(module.register_forward_hook(hook))
            logits = model(input_ids=windows, use_cache=False).logits.flatten(0, 1).float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            for added, moved in seen.values():
                moves += (added.grad.flatten(0, 1) * moved).sum(1)
            for handle in handles:
                handle.remove()
            expected = 0.5 * float(moves.square().mean())
            assert found[site.name][option.label] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@each_pair
@pytest.mark.parametrize("form", ["factored", "dense"])
def test_exports_load_with_one_basis(worlds, name, method, form, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    world = worlds(name, method)
    resident = world.resident
    row = measured(resident, Plan.of({site.name: options[-1] for site, options in world.wanted.items()}))
    expected = world.logits()
    export(resident.setup, row, tmp_path / "out", form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = loaded(input_ids=common.tokens(2, 24, seed=3), use_cache=False).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    if form == "factored":
        for site in world.wanted:
            modules = [loaded.get_submodule(weight.path) for weight in site.weights]
            assert len({module.right.data_ptr() for module in modules}) == 1
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        with torch.no_grad():
            logits = again(input_ids=common.tokens(2, 24, seed=3), use_cache=False).logits
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_search_mixes_shared_and_single_treatments(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file)
    data["space"] = {
        "methods": ["svd-llm", "shared-basis", "hola", "vo-svd"],
        "keep": [0.3, 0.5, 0.8],
        "rank_multiple": 2,
    }
    data["search"] |= {"sampler": "rankfront", "trials": 14, "anchors": [0.5]}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete"]
    assert len(rows) == 14
    assert set(data["space"]["methods"]) <= set(study.menu()["method"])
    mixed = [{option.method for option in row.plan.by_site.values()} for row in rows]
    assert any("svd-llm" in used and used & {"shared-basis", "hola"} for used in mixed)
