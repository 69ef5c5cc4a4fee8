"""Mixtures of experts: each expert's projections are weights like any other, whatever tensor holds them."""

import common
import pytest
import torch
from launching import make_run, small_data
from mixtures import MIXTURES, built
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError, Option, Storage, get_method
from rankfront.methods.layers import replacement
from rankfront.methods.unfused import fuse, unfused_in
from rankfront.search.factors import calibration
from rankfront.search.heal.settings import HealSettings
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.coverage import coverage_of
from rankfront.search.inputs.reached import UNREACHED
from rankfront.search.inputs.sites import find_sites, weights_at
from rankfront.search.measure.setup import make_space
from rankfront.search.names import inside_blocks
from rankfront.search.output.healed import heal_folder
from rankfront.search.output.healing_card import HealText
from rankfront.search.plans.plan import Plan, cost_of
from rankfront.search.study import Study


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return built(request.param)


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}


IDS = torch.randint(0, common.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def test_taken_apart_and_put_back_a_model_computes_the_same(mixture):
    wanted = mixture(input_ids=IDS).logits
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    count = sum(tensor.numel() for tensor in mixture.parameters())
    held = storages(mixture)
    take_apart(mixture)
    apart = unfused_in(mixture)
    assert apart
    assert sum(tensor.numel() for tensor in mixture.parameters()) == count
    assert storages(mixture) == held  # nothing is held twice
    torch.testing.assert_close(mixture(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    cached = mixture(input_ids=IDS[:, :5], use_cache=True)
    parts = [cached.logits]
    for place in range(5, 9):
        cached = mixture(input_ids=IDS[:, place : place + 1], past_key_values=cached.past_key_values, use_cache=True)
        parts.append(cached.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-3, atol=1e-4)
    fuse(mixture)
    after = mixture.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_every_weight_is_one_of_a_site():
    model = built("qwen3_moe")
    take_apart(model)
    sites = find_sites(model)
    found = coverage_of(model, sites)
    assert not found.left
    experts = {site.name for site in sites if sites[site].kind == "mlp.experts.*.gate_proj" and len(site.weights) == 1}
    named = {f"model.layers.{block}.mlp.experts.{number}.gate_proj" for block in (0, 1) for number in range(4)}
    assert experts == named


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_goes_from_study_to_export_and_back(name, tokenizer, text_file, tmp_path, verified_here):
    built(name).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    data = small_data(tmp_path / name, text_file, trials=3)
    study = make_run(data, tmp_path / "run")
    rows = study.rows()
    assert {row.state for row in rows} == {"complete"}
    row = next(row for row in rows if any(".experts." in site for site in row.plan.by_site))
    study.export(tmp_path / "small", row)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    logits = ours(input_ids=IDS).logits
    assert torch.equal(alone(input_ids=IDS).logits, logits)
    study.export(tmp_path / "dense", row, form="dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not unfused_in(dense)
    torch.testing.assert_close(dense(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("mixture")
    built("qwen3_moe").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_experts_of_a_layer_take_one_choice_unless_a_study_wants_them_apart(folder, text_file, tmp_path):
    data = small_data(folder, text_file, sampler="rankfront", trials=5)
    data["space"]["include"] = ["*.experts.*"]
    study = make_run(data, tmp_path / "run")
    names = {f"model.layers.{block}.mlp.experts.*.{kind}_proj" for block in (0, 1) for kind in ("gate", "up", "down")}
    assert set(study.menu()["site"]) == names
    rows = [row for row in study.rows() if row.state != "waiting"]
    assert {row.state for row in rows} == {"complete"}
    for row in rows:
        for site, option in row.plan.by_site.items():
            alike = site.split(".")
            others = [".".join([*alike[:-2], str(number), alike[-1]]) for number in range(4)]
            assert [row.plan.option(other) for other in others] == [option] * 4
    space = make_space(Study(data | {"space": data["space"] | {"experts": "apart"}}).setup())
    assert len(space.variables) == 4 * len(names)


def test_rows_of_experts_that_give_what_they_are_given_are_kept_and_counted():
    """Nothing reads them; whoever takes the others apart puts them back, dtypes changed in between too."""
    model = built("longcat_flash").double()
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.clone()
    take_apart(model)
    found = coverage_of(model, find_sites(model))
    idle = [each for each in found.left if each.why == UNREACHED]
    assert [each.values for each in idle] == [before[4:].numel()]
    fuse(model.float())
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, before.float())


# -- what is measured of an expert


def test_statistics_are_of_the_tokens_that_are_routed_to_an_expert_by_the_routers_weights(monkeypatch):
    """Gate and up read one input: Σ w² x xᵀ, over the tokens of the expert."""
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 0)
    model = built("qwen3_moe", num_hidden_layers=1)
    take_apart(model)
    experts = model.model.layers[0].mlp.experts
    sites = [site for site in find_sites(model) if ".experts." in site.name and len(site.weights) == 1]
    needs = frozenset({"gram", "absolute", "fisher", "gradient"})
    windows = torch.randint(0, common.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    found = {site.name: own["weight"] for site, own in calibration.calibrate(model, windows, sites, needs, progress)}
    given = []
    experts.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    model(input_ids=windows)
    hidden, chosen, weights = given[0]
    for number in range(4):
        tokens, place = (chosen == number).nonzero().T
        x = hidden[tokens] * weights[tokens, place, None]
        own = found[f"model.layers.0.mlp.experts.{number}.gate_proj"]
        torch.testing.assert_close(own.gram.raw, x.T @ x)
        torch.testing.assert_close(own.absolute, x.abs().sum(0))
        assert own.tokens == len(tokens)
        assert found[f"model.layers.0.mlp.experts.{number}.up_proj"].gram is own.gram


def progress(done, total):
    """Nobody listens."""


def unused(folder):
    """A mixture of which one expert is never given a token."""
    model = built("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias[3] = -1e4
    model.save_pretrained(folder)


def test_an_expert_without_tokens_is_calibrated_searched_refitted_and_healed(
    tokenizer, text_file, tmp_path, verified_here
):
    unused(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = small_data(tmp_path / "model", text_file, sampler="rankfront", trials=6)
    data["space"] = {
        "methods": ["svd-llm", "kfac-svd", "fwsvd", "asvd", "nystrom", "gptq-int8"], "keep": [0.5], "rank_multiple": 2,
        "include": ["*.experts.*"],
    }  # fmt: skip
    data["objectives"] |= {"active_parameters": {}, "flops": {}}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state != "waiting"]
    assert {row.state for row in rows} == {"complete"}
    assert all(0.5 < row.values["active_parameters"] < 1.1 for row in rows)  # integers have scales beside them
    row = min(rows, key=lambda row: row.values["active_parameters"])
    study.export(tmp_path / "refitted", row, refit="sequential")
    settings = HealSettings(tokens=256, stages=("blocks", "logits"))
    heal_folder(
        tmp_path / "refitted",
        HealText(str(text_file), 16, (0.0, 0.5)),
        settings,
        tmp_path / "healed",
        dense=str(tmp_path / "model"),
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "healed")(input_ids=IDS).logits.isfinite().all()


def test_what_one_token_reads_is_the_experts_that_it_is_given_to_and_all_else():
    model = built("qwen3_moe", num_experts=8)
    whole = sum(parameter.numel() for parameter in model.parameters())
    take_apart(model)
    sites = find_sites(model)
    experts = [site for site in sites if ".experts." in site.name and site.roles == ("weight",)]
    idle = sum(site.storage.parameters for site in experts) * 6 // 8
    option = Option.of("svd", rank=4)
    plan = Plan.of({site.name: option for site in experts})
    cost = cost_of(plan, inside_blocks(sites), whole, 2)
    read = whole - idle - sum(site.storage.parameters - 4 * (32 + 16) for site in experts) * 2 / 8
    assert cost.active_parameters == pytest.approx(read / (whole - idle))
    assert cost_of(Plan(()), inside_blocks(sites), whole, 2).active_parameters == 1


def test_the_experts_of_a_layer_share_a_basis(folder, text_file, tmp_path, verified_here):
    data = small_data(folder, text_file, sampler="rankfront", trials=4)
    data["space"] = {
        "methods": ["hola-experts"], "keep": [0.3, 0.6], "rank_multiple": 2, "include": ["*.experts.*"]
    }  # fmt: skip
    data["objectives"] |= {"active_parameters": {}}
    study = make_run(data, tmp_path / "run")
    row = max((row for row in study.rows() if row.state == "complete"), key=lambda row: len(row.plan.choices))
    assert row.plan.choices
    study.export(tmp_path / "small", row)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    site = next(site for site in row.plan.by_site)
    parent, _, name = site.rpartition(".0-3.")
    linears = [model.get_submodule(f"{parent}.{number}.{name}") for number in range(4)]
    assert len({id(linear.right) for linear in linears}) == 1
    assert len({id(linear.left) for linear in linears}) == 4


# -- fewer experts


def pruned(model):
    """Its sites of a router and all experts."""
    return [site for site in find_sites(model) if site.roles[0] == "router"]


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_that_can_choose_among_fewer_are_found(name):
    model = built(name)
    take_apart(model)
    layers = len(unfused_in(model))
    # Groups of experts are as large as they were, Llama 4 multiplies inputs by the router's weights, and the routers of
    # the others have their matrix in a linear of their own.
    without = ("deepseek_v3", "llama4_text", "longcat_flash", "dbrx", "jetmoe")
    assert len(pruned(model)) == (0 if name in without else layers)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_a_layer_without_some_experts_routes_among_the_others(name):
    """As the router of only these rows does; with all of them it is the model's own."""
    model = built(name)
    take_apart(model)
    site = pruned(model)[0]
    method = get_method("expert-prune")
    weights = {role: tensor.float() for role, tensor in weights_at(model, site).items()}
    windows = torch.randint(0, common.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    ((_, statistics),) = calibration.calibrate(model, windows, [site], frozenset({"gram"}), progress)
    option = Option.of("expert-prune", experts=3)
    prepared = method.prepare(site, weights, statistics, [option])
    factors = method.truncate(prepared, option)
    gone = int(prepared["order"][-1])
    assert {role for role, each in factors.items() if each.kind == "absent"} == {
        role for role in site.roles if role.startswith(f"{gone}.")
    }
    stored = sum((each.storage for each in factors.values()), Storage(0))
    dense = sum((w.storage for w in site.weights if w.role not in factors), Storage(0))
    biases = sum(w.biases.values for w in site.weights if w.role.startswith(f"{gone}.")) + site.weights[0].bias
    assert stored.parameters + dense.parameters - biases == method.storage(site, option).parameters
    router, tensors = model.get_submodule(site.weights[0].path), factors["router"].tensors
    tensors = {each: tensor.float() if tensor.is_floating_point() else tensor for each, tensor in tensors.items()}
    own = replacement(router, "router", tensors, factors["router"].settings)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    _, scales, chosen = own(hidden)
    assert chosen.shape == scales.shape == (20, 2)
    assert not (chosen == gone).any()
    bias = router._parameters.get("bias")
    logits = hidden @ router.weight.T + (0 if bias is None else bias)
    logits[:, gone] = -torch.inf
    if name != "nemotron_h":  # whose router corrects its choices
        assert torch.equal(logits.topk(2).indices.sort(1).values, chosen.sort(1).values)


def test_a_mixture_of_fewer_experts_goes_from_study_to_export(folder, text_file, tmp_path, verified_here):
    data = small_data(folder, text_file, sampler="rankfront", trials=5)
    data["space"] = {"methods": ["expert-prune"], "keep": [0.5, 0.8], "rank_multiple": 2}
    data["objectives"] |= {"active_parameters": {}}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state != "waiting"]
    assert {row.state for row in rows} == {"complete"}
    row = next(row for row in rows if "expert-prune" in {option.method for option in row.plan.by_site.values()})
    study.export(tmp_path / "small", row)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    assert torch.equal(alone(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    with pytest.raises(InputError, match=r"a router of fewer experts .* export it factored"):
        study.export(tmp_path / "dense", row, form="dense")
