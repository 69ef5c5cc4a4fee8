"""Laws of joint treatments, over every method that has one, through whole tiny models of every architecture."""

import itertools

import common
import numpy as np
import pytest
import torch
import transformers
from launching import make_run, measured, optuna_study, small_data, verify_here
from rows import JOINT_METHODS, SHARED_METHODS
from synthetic import compatible

from rankfront.methods import Grid, InputError, Option, get_method, method_names
from rankfront.methods.layers import replacement, set_module, weight_of
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.sites import find_sites, weights_at
from rankfront.search.measure import compressed_model
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.optimise.answer import prior_predictor
from rankfront.search.output.export import _multiply_out, export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

METHODS = JOINT_METHODS
FULL = {"lama": "width", "vo-svd": "width", "nystrom": "neurons"}
ATTENTION, GATED, PLAIN = {"lama", "vo-svd", "drop-block"}, {"nystrom", "drop-block"}, {"nystrom", "drop-block"}
TREATED = {  # what can be treated of which architecture: normalised queries cannot
    "llama": ATTENTION | GATED,
    "llama-tied": ATTENTION | GATED,
    "mistral": ATTENTION | GATED,
    "qwen2": ATTENTION | GATED,
    "qwen3": (ATTENTION - {"lama"}) | GATED,
    "gemma2": ATTENTION | GATED,
    "gemma3": (ATTENTION - {"lama"}) | GATED,
    "phi3": ATTENTION | GATED,
    "gpt-neox": ATTENTION | PLAIN,
    "opt": ATTENTION | PLAIN,
    "gpt2": ATTENTION | PLAIN,
}
NAMES = [name for name, treated in TREATED.items() if treated]
PAIRS = [(name, method) for name in NAMES for method in METHODS if method in TREATED[name]]
each_pair = pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda value: value)
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


class World:
    """A tiny model resident with everything that can be treated jointly, and its statistics."""

    def __init__(self, name, folder, text):
        data = common.study_data(common.save_folder(name, folder), text)
        data["space"] = {"methods": sorted(TREATED[name]), "keep": [0.3, 0.5, 0.8], "rank_multiple": 2}
        self.setup = Study(data).setup()
        self.resident = JobRunner(self.setup)
        self.sites = list(self.resident.compressed.space.choices)
        self.ids = common.tokens(2, 24, seed=3)
        model = load_model(self.setup.source, torch.float32, "cpu")
        windows = self.setup.tokens["calibrate"]
        self.statistics = dict(calibrate(model, windows, self.sites, frozenset({"gram"}), lambda done, total: None))
        self.model = model

    def treated(self, method):
        """(site, its options of the method from the cheapest)."""
        for site, options in self.resident.compressed.space.wanted().items():
            own = [option for option in options if option.method == method]
            if own:
                yield site, sorted(own, key=lambda o: get_method(method).storage(site, o).parameters)

    def prepared(self, site, option):
        return self.resident.compressed.store.load(site, option)

    def logits(self):
        with torch.no_grad():
            return self.resident.compressed.model(input_ids=self.ids, use_cache=False).logits

    def weights(self, site):
        return weights_at(self.model, site)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, text_file):
    made = {}

    def make(name):
        if name not in made:
            made[name] = World(name, tmp_path_factory.mktemp(name), text_file)
        common.restore(made[name].resident)
        return made[name]

    return make


def full(method, site):
    """The level that keeps everything."""
    level = FULL[method]
    return Option.of(method, **{level: site.anchor.in_features if level == "neurons" else site.heads.width})


def test_every_architecture_says_what_can_be_treated_jointly(architecture):
    model = architecture.build()
    take_apart(model)
    grid = Grid((0.5,), 2)
    offered = {
        name
        for site in find_sites(model)
        for name in METHODS
        if len(site.weights) > 1 and get_method(name).options(site, grid)
    }
    assert offered == TREATED[architecture.name]


def test_a_joint_site_is_named_after_what_it_claims(architecture):
    names = set()
    for site, place in find_sites(architecture.build()).items():
        names.add(site.name)
        if site.roles[0] == "0":  # a run of blocks
            numbers = [next(part for part in weight.path.split(".") if part.isdigit()) for weight in site.weights]
            run, _, kind = site.name.partition(f"{numbers[0]}-{numbers[-1]}")
            assert [weight.path for weight in site.weights] == [f"{run}{number}{kind}" for number in numbers]
        elif len(site.weights) > 1:
            parent, _, children = site.name.rpartition(".")
            assert [f"{parent}.{child}" for child in children.split("+")] == [weight.path for weight in site.weights]
            assert site.name.endswith(place.kind)
    assert len(names) == len(find_sites(architecture.build()))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_normalised_queries_are_refused_with_the_reason(name):
    reasons = [get_method("lama").refuses(site) for site in find_sites(common.architecture(name).build())]
    assert "queries and keys are normalised after their projections" in reasons


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_rotary_planes_are_what_the_model_turns(name):
    site = next(s for s in find_sites(common.architecture(name).build()) if s.roles == ("key", "query"))
    half = common.HEAD_WIDTH // 2
    assert site.heads.planes == tuple((i, i + half) for i in range(half))
    assert (site.heads.queries, site.heads.keys) == (common.HEADS, common.KEY_VALUE_HEADS)


def test_learned_positions_have_no_planes():
    site = next(s for s in find_sites(common.architecture("opt").build()) if s.roles == ("key", "query"))
    assert site.heads.planes is None


@each_pair
def test_the_full_level_changes_nothing(worlds, name, method):
    if method == "drop-block":
        pytest.skip("it has no full level")
    world = worlds(name)
    before = world.logits()
    for site, options in world.treated(method):
        factors = get_method(method).truncate(world.prepared(site, options[0]), full(method, site))
        for path, module in world.resident.compressed.made({w.role: [w.path] for w in site.weights}, factors).items():
            set_module(world.resident.compressed.model, path, module)
    torch.testing.assert_close(world.logits(), before, **CLOSE)
    for path, module in world.resident.compressed.dense_modules.items():
        set_module(world.resident.compressed.model, path, module)


@each_pair
def test_the_anchor_alone_does_the_same(worlds, name, method):
    """Every level: the whole treatment, and its anchor's stand-in with all else dense, give the same logits."""
    world = worlds(name)
    for site, options in world.treated(method):
        for option in options:
            world.resident.compressed.apply(Plan.of({site.name: option}))
            treated = world.logits()
            with world.resident.compressed.anchored():
                torch.testing.assert_close(world.logits(), treated, **CLOSE)
            torch.testing.assert_close(world.logits(), treated)


@each_pair
def test_all_joint_sites_together_run_alone_too(worlds, name, method):
    world = worlds(name)
    world.resident.compressed.apply(Plan.of({site.name: options[-1] for site, options in world.treated(method)}))
    treated = world.logits()
    with world.resident.compressed.anchored():
        torch.testing.assert_close(world.logits(), treated, **CLOSE)


@each_pair
def test_products_are_those_of_the_stand_in(worlds, name, method):
    """gradient_dot_outputs(g, x) = gᵀ (ŷ − b), token by token, with ŷ what `equivalent` gives and b the dense bias."""
    world, generator = worlds(name), torch.Generator().manual_seed(0)
    for site, options in world.treated(method):
        prepared, anchor = world.prepared(site, options[0]), site.anchor
        g = torch.randn(7, anchor.out_features, generator=generator)
        x = torch.randn(7, anchor.in_features, generator=generator)
        found = get_method(method).gradient_dot_outputs(site, prepared, options, g, x)
        assert found.keys() == {option.label for option in options}
        for option in options:
            tensors = get_method(method).equivalent(site, prepared, option).tensors
            y = x @ tensors["weight"].float().T
            if "bias" in tensors:
                y = y + tensors["bias"].float() - world.weights(site)[f"{anchor.role}.bias"]
            torch.testing.assert_close(found[option.label], (g * y).sum(1), rtol=1e-3, atol=1e-3)


@each_pair
def test_what_is_stored_is_what_was_claimed(worlds, name, method):
    """Parameters of the modules, biases included, fall by what the plan says; index bits are told apart."""
    world = worlds(name)
    before = sum(parameter.numel() for parameter in world.resident.compressed.model.parameters())
    for site, options in world.treated(method):
        for option in options:
            world.resident.compressed.apply(Plan.of({site.name: option}))
            now = sum(parameter.numel() for parameter in world.resident.compressed.model.parameters())
            storage = get_method(method).storage(site, option)
            assert before - now == site.storage.values - storage.values
            assert storage.parameters < site.storage.parameters


@each_pair
def test_error_never_rises_with_level_and_ends_at_nothing(worlds, name, method):
    world = worlds(name)
    for site, options in world.treated(method):
        errors = [get_method(method).error(world.prepared(site, option), option) for option in options]
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert all(error > 0 for error in errors)
        if method in FULL:
            assert get_method(method).error(world.prepared(site, options[0]), full(method, site)) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if "nystrom" in TREATED[name]])
def test_nystrom_error_is_that_of_the_down_projection(worlds, name):
    """‖(W − Ŵ) C^{1/2}‖² with Ŵ = W C_{:J} C_JJ⁻¹ by a plain solve, and J the largest leverage scores."""
    world = worlds(name)
    for site, options in world.treated("nystrom"):
        weight = world.weights(site)["down"].double()
        gram = world.statistics[site]["down"].gram.raw.double()
        for option in options:
            prepared = world.prepared(site, option)
            kept = prepared["order"][: option["neurons"]]
            down = get_method("nystrom").equivalent(site, prepared, option).tensors["weight"].double()
            assert (down[:, [i for i in range(down.shape[1]) if i not in set(kept.tolist())]] == 0).all()
            delta = weight - down
            measured = float(torch.einsum("ij,jk,ik->", delta, gram, delta))
            whole = float(torch.einsum("ij,jk,ik->", weight, gram, weight))
            assert get_method("nystrom").error(prepared, option) == pytest.approx(measured, rel=2e-2, abs=1e-4 * whole)
            ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
            exact = weight @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept] + ridge)
            best = torch.zeros_like(weight)
            best[:, kept] = exact
            least = float(torch.einsum("ij,jk,ik->", weight - best, gram, weight - best))
            assert measured <= least * 1.05 + 1e-4 * whole


@pytest.mark.parametrize("name", [name for name in NAMES if "vo-svd" in TREATED[name]])
def test_value_output_is_the_best_of_its_rank(worlds, name):
    """Per key-value head, the tail of the singular values of the stacked W_o W_v C^{1/2}."""
    world = worlds(name)
    for site, options in world.treated("vo-svd"):
        heads, weights = site.heads, world.weights(site)
        root = world.statistics[site]["value"].gram.root
        shared = heads.queries // heads.keys
        for option in options:
            expected = 0.0
            for head in range(heads.keys):
                value = weights["value"].double().unflatten(0, (heads.keys, heads.width))[head]
                output = weights["output"].double().unflatten(1, (heads.queries, heads.width))
                stack = torch.cat([output[:, head * shared + i] for i in range(shared)])
                expected += float(torch.linalg.svdvals(stack @ value @ root)[option["width"] :].square().sum())
            prepared = world.prepared(site, option)
            assert get_method("vo-svd").error(prepared, option) == pytest.approx(expected, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2"])
def test_rotary_queries_and_keys_keep_whole_planes_of_the_largest_score(worlds, name):
    world = worlds(name)
    for site, options in world.treated("lama"):
        heads, weights = site.heads, world.weights(site)
        gram, half = world.statistics[site]["key"].gram.matrix, site.heads.width // 2
        squares = {role: weights[role].double() for role in site.roles}
        energy = {role: torch.einsum("ij,jk,ik->i", weight, gram, weight) for role, weight in squares.items()}
        key = energy["key"].unflatten(0, (heads.keys, heads.width))
        query = energy["query"].unflatten(0, (heads.keys, -1, heads.width)).sum(1)
        scores = (key[:, :half] + key[:, half:]) * (query[:, :half] + query[:, half:])
        for option in options:
            factors = get_method("lama").truncate(world.prepared(site, option), option)
            for head, places in enumerate(factors["key"].tensors["place"].tolist()):
                planes = sorted(place for place in places if place < half)
                assert sorted(places) == sorted([*planes, *(plane + half for plane in planes)])
                best = scores[head].argsort(descending=True)[: option["width"] // 2]
                assert planes == sorted(best.tolist())


def test_affinity_without_rotary_positions_is_the_best_of_its_rank(worlds):
    """‖C_q^{1/2} (I − P Qᵀ) C_k^{1/2}‖² is the tail of the singular values of C_q^{1/2} C_k^{1/2}."""
    world = worlds("opt")
    for site, options in world.treated("lama"):
        heads, weights = site.heads, world.weights(site)
        root = world.statistics[site]["key"].gram.root
        for option in options:
            expected = 0.0
            for head in range(heads.keys):
                by_head = (weights[role].double().unflatten(0, (heads.keys, -1))[head] for role in ("query", "key"))
                query, key = (weight @ root for weight in by_head)
                expected += float(_affinity_tail(query, key, option["width"]))
            prepared = world.prepared(site, option)
            assert get_method("lama").error(prepared, option) == pytest.approx(expected, rel=1e-2, abs=1e-6)


def _affinity_tail(query, key, width):
    """Σ_{i > width} σ_i² of C_q^{1/2} C_k^{1/2}."""
    values, vectors = torch.linalg.eigh(query @ query.T)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    others, directions = torch.linalg.eigh(key @ key.T)
    other = (directions * others.clamp_min(0).sqrt()) @ directions.T
    return torch.linalg.svdvals(root @ other)[width:].square().sum()


@each_pair
def test_the_dense_export_of_a_plan_gives_the_same_logits(worlds, name, method):
    world = worlds(name)
    resident = JobRunner(world.setup)
    resident.compressed.apply(Plan.of({site.name: options[-1] for site, options in world.treated(method)}))
    ids = world.ids
    with torch.no_grad():
        treated = resident.compressed.model(input_ids=ids, use_cache=False).logits
        _multiply_out(resident.compressed.model, resident.compressed.modules, resident.compressed.dense_modules)
        torch.testing.assert_close(resident.compressed.model(input_ids=ids, use_cache=False).logits, treated, **CLOSE)
    assert {type(module).__name__ for module in resident.compressed.model.modules()}.isdisjoint(
        {"HeadsLinear", "FromHeadsLinear", "PlainLinear", "AbsentLinear"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2"])
def test_a_joint_plan_is_exported_and_reloaded(text_file, tmp_path, monkeypatch, name):
    """A study of every joint method; each export is verified, biases and all: one of them in a fresh process."""
    if name != "llama":
        verify_here(monkeypatch)
    data = common.study_data(common.save_folder(name, tmp_path / "model"), text_file)
    data["space"] = {"methods": sorted(TREATED[name]), "keep": [0.5, 0.8], "rank_multiple": 2}
    data["search"] |= {"sampler": "random", "trials": 6, "anchors": [0.5], "groups": 0}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete" and len(row.plan.choices) > 1]
    methods = {option.method for row in rows for option in row.plan.by_site.values()}
    assert len(methods) > 1
    row = max(rows, key=lambda row: len({option.method for option in row.plan.by_site.values()}))
    for form in ("factored", "dense"):
        verified = export(study.setup(), row, tmp_path / form, form)
        assert verified.perplexity == pytest.approx(row.attributes["perplexity"], rel=5e-3)
        verify_here(monkeypatch)


@pytest.mark.slow
def test_a_study_searches_joint_and_single_sites_together(model_folder, text_file, tmp_path):
    """Our sampler over everything: no plan treats a weight twice, slopes are measured, a budget is answered."""
    data = small_data(model_folder, text_file, sampler="rankfront", trials=18)
    data["space"] |= {"methods": ["svd-llm", *METHODS], "keep": [0.4, 0.6, 0.8]}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete"]
    weights = {site.name: [w.path for w in site.weights] for site in find_sites(CompressedModel(study.setup()).model)}
    for row in rows:
        claimed = [path for site in row.plan.by_site for path in weights[site]]
        assert len(claimed) == len(set(claimed))
    methods = {option.method for row in rows for option in row.plan.by_site.values()}
    assert methods >= {"svd-llm", "lama", "vo-svd", "nystrom"}
    slopes = [trial for trial in optuna_study(study).trials if "slopes_of" in trial.user_attrs]
    assert slopes
    assert all("slopes" in trial.user_attrs for trial in slopes)
    assert study.answer("block_parameters<=0.77").figures["block_parameters"] <= 0.77


@pytest.mark.slow
def test_the_search_believes_the_plans_that_were_measured(model_folder, text_file, tmp_path):
    """Anchors draw joint sites and their weights' own sites at once: what it learns from is the plan that was run."""
    data = small_data(model_folder, text_file, sampler="rankfront", trials=22, anchors=[0.8, 0.4])
    data["space"] |= {"methods": ["svd-llm", *METHODS], "keep": [0.4, 0.6, 0.8]}
    study = make_run(data, tmp_path / "run")
    state, rows = study.read().state, {row.number: row for row in study.rows()}
    predictor, _, _ = prior_predictor(state, study.config, study.read().space)
    menu = predictor.menu
    predictor.learn(state.trials)
    measured = predictor.history.measured
    assert {rows[known.trial].origin.partition(":")[0] for known in measured.values()} >= {"anchor", "menu"}
    for places, known in measured.items():
        assert compatible(menu, places)
        assert menu.decode(places).key == rows[known.trial].plan_key
    for budget in np.linspace(menu.least / menu.dense + 0.01, 0.9, 9):
        assert study.answer(f"block_parameters<={budget}").figures["block_parameters"] <= budget


@pytest.mark.slow
@pytest.mark.parametrize("methods", [["nystrom"], ["lama", "vo-svd"]], ids="+".join)
def test_a_space_of_joint_sites_alone_is_searched(model_folder, text_file, tmp_path, methods):
    """Weights that only joint sites treat have no variable of their own: warm start, slopes, menu and answer do."""
    data = small_data(model_folder, text_file, sampler="rankfront", trials=14)
    data["space"] |= {"methods": methods, "keep": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete"]
    assert len(rows) == 14
    assert {option.method for row in rows for option in row.plan.by_site.values()} == set(methods)
    assert any(row.origin.startswith("menu") for row in rows)
    assert any("slopes" in trial.user_attrs for trial in optuna_study(study).trials)
    assert set(study.menu().method) == {"dense", *methods}
    assert study.answer("block_parameters<=0.9").figures["block_parameters"] <= 0.9


def test_anchors_of_a_single_method_leave_joint_sites_dense(model_folder, text_file):
    data = small_data(model_folder, text_file)
    data["space"] |= {"methods": ["svd-llm", *METHODS], "keep": [0.4, 0.8]}
    data["search"]["groups"] = 0
    space = make_space(Study(data).setup())
    for anchor in space.anchors((0.8,)):
        treated = space.decode(space.anchor_parameters(anchor)).by_site
        if anchor.method == "svd-llm":
            assert {option.method for option in treated.values()} == {"svd-llm"}
        if anchor.method == "nystrom":
            assert "nystrom" in {option.method for option in treated.values()}
        if anchor.label == "dense":
            assert not treated


@pytest.mark.parametrize(
    ("option", "remedy"),
    [("nystrom neurons=0", "neurons"), ("vo-svd width=x", "width"), ("lama", "width")],
)
def test_levels_that_are_none_are_refused(option, remedy):
    method, _, level = option.partition(" ")
    parsed = {} if not level else {level.split("=")[0]: int(v) if (v := level.split("=")[1]).isdigit() else v}
    with pytest.raises(InputError, match=remedy):
        get_method(method).check(Option.of(method, **parsed))


def test_single_methods_refuse_joint_sites_and_the_other_way_round():
    for site in find_sites(common.architecture("llama").build()):
        for name in method_names():
            if (len(site.weights) > 1) != (name in (*METHODS, *SHARED_METHODS)):
                assert get_method(name).refuses(site)
                assert get_method(name).options(site, Grid((0.5,), 2)) == {}


def test_weights_without_bias_or_with_one_are_told_apart():
    model = common.architecture("qwen2").build()
    for site in find_sites(model):
        for weight in site.weights:
            assert weight.bias == (getattr(model.get_submodule(weight.path), "bias", None) is not None)
            assert tuple(weight_of(model.get_submodule(weight.path)).shape) == (weight.out_features, weight.in_features)


@pytest.mark.parametrize("method", METHODS)
def test_a_site_is_treated_whole_or_not_at_all(worlds, monkeypatch, method):
    """Memory that ends halfway through a joint site leaves the model as it was."""
    world = worlds("llama")
    before = world.logits()
    for site, options in world.treated(method):
        calls = itertools.count()

        def failing(*arguments, calls=calls):
            if next(calls) == 1:
                raise torch.OutOfMemoryError("no room")
            return replacement(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(compressed_model, "replacement", failing)
            with pytest.raises(torch.OutOfMemoryError):
                world.resident.compressed.apply(Plan.of({site.name: options[0]}))
        torch.testing.assert_close(world.logits(), before, rtol=0, atol=0)


# -- what attentions cache


CACHING = [(name, method) for name, method in PAIRS if method in ("lama", "vo-svd")]


def decoded(model, ids, cache, start=5):
    """Logits of ``ids`` (B, L): a prompt at once, then token by token, with a ``cache``."""
    with torch.no_grad():
        found = [model(input_ids=ids[:, :start], past_key_values=cache, use_cache=True).logits]
        for i in range(start, ids.shape[1]):
            found.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def at_once(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def widths(cache):
    """(dimensions of keys, of values) that each layer of a cache stores."""
    return [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]


@pytest.mark.parametrize(("name", "method"), CACHING)
def test_the_cache_holds_what_was_kept(worlds, name, method):
    """Decoding with a cache gives what the whole sequence at once gives, and the cache is as thin as the heads."""
    world = worlds(name)
    model, ids, side = world.resident.compressed.model, world.ids[:, :12], 0 if method == "lama" else 1
    full = dense_width(model, ids)
    chosen = {site.name: options[0] for site, options in world.treated(method)}
    world.resident.compressed.apply(Plan.of(chosen))
    kept = {option["width"] for option in chosen.values()}
    cache = transformers.DynamicCache(config=model.config)
    torch.testing.assert_close(decoded(model, ids, cache), at_once(model, ids), **CLOSE)
    assert {pair[side] for pair in widths(cache)} == kept
    assert {pair[1 - side] for pair in widths(cache)} == {full}
    assert max(kept) < full
    common.restore(world.resident)
    assert dense_width(model, ids) == full


def dense_width(model, ids):
    """The dimensions that every head of a dense model caches."""
    cache = transformers.DynamicCache(config=model.config)
    torch.testing.assert_close(decoded(model, ids, cache), at_once(model, ids), **CLOSE)
    (width,) = {width for pair in widths(cache) for width in pair}
    return width


def everywhere(world, block=None):
    """A plan of lama and vo-svd at their thinnest, in one block or in all."""
    return Plan.of(
        {
            site.name: options[0]
            for method in ("lama", "vo-svd")
            for site, options in world.treated(method)
            if block in (None, world.resident.compressed.sites[site].block)
        },
        world.resident.setup.origin(),
    )


def test_the_cache_is_thin_only_where_heads_are(worlds):
    world = worlds("llama")
    model, ids = world.resident.compressed.model, world.ids[:, :12]
    world.resident.compressed.apply(everywhere(world, block=0))
    cache = transformers.DynamicCache(config=model.config)
    torch.testing.assert_close(decoded(model, ids, cache), at_once(model, ids), **CLOSE)
    first, *others = widths(cache)
    assert max(first) < common.HEAD_WIDTH
    assert set(others) == {(common.HEAD_WIDTH, common.HEAD_WIDTH)}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_static_cache_is_thin_too(worlds, name):
    world = worlds(name)
    model, ids = world.resident.compressed.model, world.ids[:, :12]
    world.resident.compressed.apply(everywhere(world))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(decoded(model, ids, cache), at_once(model, ids), **CLOSE)
    assert all(max(pair) < common.HEAD_WIDTH for pair in widths(cache))


def test_an_export_caches_thinly(worlds, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    world = worlds("llama")
    row = measured(world.resident, everywhere(world))
    export(world.setup, row, tmp_path / "out", "factored")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = transformers.DynamicCache(config=loaded.config)
    torch.testing.assert_close(decoded(loaded, world.ids[:, :12], cache), world.logits()[:, :12], **CLOSE)
    assert all(max(pair) < common.HEAD_WIDTH for pair in widths(cache))
    asked = {"input_ids": world.ids[:, :4], "max_new_tokens": 6, "do_sample": False}
    plain = loaded.generate(**asked, use_cache=False)
    assert torch.equal(loaded.generate(**asked), plain)
    assert torch.equal(loaded.generate(**asked, cache_implementation="static"), plain)
