"""Prepacked weights: the same results and the same tensors, in a layout that products read faster."""

import copy

import common
import pytest
import torch
from launching import small_data
from torch import nn
from transformers import AutoModelForCausalLM

import rankfront.methods.prepacked as prepacked_module
from rankfront.methods import InputError, prepack, undo_prepack
from rankfront.methods.joined import Joined
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.methods.prepacked import Prepacked, prepacked
from rankfront.objectives import Clock, make_objective
from rankfront.search.measure import timing
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.timing import Stopwatches
from rankfront.search.plans.job import Job
from rankfront.search.plans.latency_table import timed_objectives
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SMALL = {"batch": 1, "prompt": 6, "decode": 2, "rounds": 2, "seconds": 0, "prepack": True}
METHODS = (
    "svd-llm",
    "compot",
    "oats",
    "sltrain",
    "dsformer",
    "lama",
    "vo-svd",
    "nystrom",
    "shared-basis",
    "hola",
    "gptq-int4",
    "tucker",
    "wara",
)


def logits(model, count=5):
    with torch.inference_mode():
        return model(common.tokens(2, count)).logits


def close(ours, theirs, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.fixture
def read_plain(monkeypatch):
    """The weights that linear products read plain."""
    seen = []
    true = nn.functional.linear

    def noted(x, weight, bias=None):
        if not isinstance(weight, Prepacked):
            seen.append(weight)
        return true(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepacked_model_says_what_it_said(model, dtype, read_plain):
    """With none of its products read plain but a head's that is the embedding table too; and is itself again after."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no products in bf16 on this CPU")
    model = model.to(dtype).requires_grad_(False)
    said, before = logits(model), parameters(model)
    values = {name: weight.clone() for name, weight in before.items()}
    read_plain.clear()
    assert prepack(model) >= 0
    close(logits(model), said, dtype)
    table = model.get_input_embeddings().weight
    assert all(weight is table for weight in read_plain)
    undo_prepack(model)
    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("method", METHODS)
def test_so_does_a_plan_of_any_kind_of_layer(method, text_file, tmp_path, read_plain):
    data = small_data(common.save_folder("llama", tmp_path / "model"), text_file)
    data["space"] = {"methods": [method], "keep": [0.5], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    chosen, taken = {}, set()
    for site, options in resident.compressed.space.wanted().items():
        if options and taken.isdisjoint(weight.path for weight in site.weights):
            chosen[site.name] = options[0]
            taken |= {weight.path for weight in site.weights}
    assert chosen
    resident.compressed.apply(Plan.of(chosen))
    said, before = logits(resident.compressed.model), parameters(resident.compressed.model)
    with prepacked(resident.compressed.model):
        logits(resident.compressed.model)  # some make what they keep now
        read_plain.clear()
        close(logits(resident.compressed.model), said, torch.float32)
        assert method in ("wara", "tucker", "gptq-int4") or not read_plain
    after = parameters(resident.compressed.model)
    assert all(after[name] is before[name] for name in before)
    close(logits(resident.compressed.model), said, torch.float32)


def test_nothing_is_held_twice():
    """The bytes of before, each once; what several modules share is prepacked once and shared still."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)).requires_grad_(False)
    model[2].weight = model[0].weight
    plain = list(model.parameters())
    held, matrices = sum(weight.nbytes for weight in plain), plain[0].nbytes + plain[2].nbytes
    assert prepack(model) == matrices
    assert model[2].weight is model[0].weight
    assert sum(weight.nbytes for weight in model.parameters()) == held
    assert plain[0].numel() == plain[2].numel() == 0
    assert len({weight.data_ptr() for weight in model.parameters()}) == len(plain)
    assert prepack(model) == 0
    undo_prepack(model)
    assert model[2].weight is model[0].weight is plain[0]


def test_gradients_pass_through():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)
    x = torch.randn(4, 8)
    found = []
    for pack in (False, True):
        if pack:
            prepack(model)
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(*found)


def test_a_model_can_be_trained_again_afterwards():
    """As it comes from ``from_pretrained``, every weight wants gradients."""
    model, x = nn.Linear(8, 6), torch.randn(4, 8)
    prepack(model)
    assert isinstance(model.weight, Prepacked)
    with torch.no_grad():
        model(x)
    undo_prepack(model)
    model(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(6, 8))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.load_state_dict({"weight": torch.ones(6, 8), "bias": torch.ones(6)}),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.requires_grad_(True),
        lambda layer: layer.weight.requires_grad_(),
    ],
    ids=["in place", "loading", "converting", "training", "training the weight"],
)
def test_writing_to_one_is_refused(write):
    layer = nn.Linear(8, 6).requires_grad_(False)
    before = layer.weight.clone()
    prepack(layer)
    with pytest.raises(RuntimeError, match=r"prepacked weight cannot be written to.*undo_prepack"):
        write(layer)
    undo_prepack(layer)
    assert torch.equal(layer.weight, before)


def test_what_changes_nothing_is_allowed():
    layer = nn.Linear(8, 6).requires_grad_(False)
    prepack(layer)
    layer.to("cpu").to(torch.float32).eval().requires_grad_(False).zero_grad()
    assert isinstance(layer.weight, Prepacked)


def test_a_copy_is_of_its_own():
    layer = nn.Linear(8, 6).requires_grad_(False)
    x, before = torch.randn(2, 8), layer.weight.clone()
    prepack(layer)
    copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, Prepacked)
    assert torch.equal(copied(x), layer(x))
    undo_prepack(copied)
    assert isinstance(layer.weight, Prepacked)
    assert torch.equal(copied.weight, before)


def test_what_is_saved_is_plain(tmp_path):
    model = common.architecture("llama").build().requires_grad_(False)
    said = logits(model)
    prepack(model)
    assert not any(isinstance(weight, Prepacked) for weight in model.state_dict().values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), said)


def test_joined_factors_run_apart():
    torch.manual_seed(0)
    members = [LowRankLinear(torch.randn(6, 2), torch.randn(2, 8)) for _ in range(2)]
    model, x = nn.ModuleList(members), torch.randn(3, 8)
    said = [member(x) for member in members]
    Joined(members)
    prepack(model)
    assert all(member.joined is None for member in members)
    torch.testing.assert_close([member(x) for member in members], said)
    undo_prepack(model)
    torch.testing.assert_close([member(x) for member in members], said)


def test_where_there_is_no_onednn_all_stays_plain(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = nn.Linear(8, 6).requires_grad_(False)
    assert prepack(layer) == 0
    assert not isinstance(layer.weight, Prepacked)


# -- as the latency objectives use it


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_both_models_are_measured_prepacked(resident, kind, monkeypatch):
    """Every linear of either; afterwards the same parameters are plain again."""
    plan = common.random_plan(resident, 3) if kind == "ours" else Plan(())
    subject = resident.subject(plan, Clock())
    before, dense = (
        parameters(resident.compressed.model),
        {p: m.weight for p, m in resident.compressed.dense_modules.items()},
    )
    seen = []

    def noted(model, ids, decode):
        matrices = {name: weight for name, weight in parameters(model).items() if weight.ndim == 2}
        seen.append({name for name, weight in matrices.items() if not isinstance(weight, Prepacked)})
        return real(model, ids, decode)

    real = timing_of(monkeypatch, noted)
    assert make_objective("latency", SMALL).value(subject) > 0
    assert len(seen) >= 3
    assert all(plain <= {"model.embed_tokens.weight"} for plain in seen)
    after = parameters(resident.compressed.model)
    assert all(after[name] is before[name] and after[name].numel() for name in before)
    assert all(
        resident.compressed.dense_modules[path].weight is weight and weight.numel() for path, weight in dense.items()
    )


def timing_of(monkeypatch, replaced):
    from rankfront.objectives import _generation

    real = _generation.generate
    monkeypatch.setattr(_generation, "generate", replaced)
    return real


def test_a_failed_measurement_leaves_the_model_plain(resident, monkeypatch):
    def failing(model, ids, decode):
        raise RuntimeError("out of memory")

    timing_of(monkeypatch, failing)
    subject = resident.subject(common.random_plan(resident, 3), Clock())
    with pytest.raises(RuntimeError, match="out of memory"):
        make_objective("latency", SMALL).value(subject)
    assert not any(isinstance(weight, Prepacked) for weight in resident.compressed.model.parameters())
    assert not any(isinstance(module.weight, Prepacked) for module in resident.compressed.dense_modules.values())


def test_modules_are_timed_prepacked_and_kept_apart(model_folder, text_file, monkeypatch):
    """Every copy of ours and of dense, in a table of their own; the model's own modules are plain afterwards."""
    data = common.study_data(model_folder, text_file)
    data["objectives"]["latency"] = SMALL
    resident = JobRunner(Study(data).setup())
    seen = []

    def noted(copies, x):
        seen.extend(weight for each in copies for name, weight in each.named_parameters() if "bias" not in name)
        return 1.0

    monkeypatch.setattr(timing, "_round", noted)
    assert "timing" in resident.run(Job("timing", 0, Plan(())))
    assert seen
    assert all(isinstance(weight, Prepacked) for weight in seen)
    assert not any(isinstance(weight, Prepacked) for weight in resident.compressed.model.parameters())
    paths = {Stopwatches(text_file.parent, "cpu", torch.float32, prepack=each).path for each in (True, False)}
    assert len(paths) == 2


def test_a_prepacked_study_joins_nothing(model_folder, text_file, monkeypatch):
    data = common.study_data(model_folder, text_file)
    data["objectives"]["latency"] = SMALL
    monkeypatch.setattr("rankfront.search.measure.joining.faster", lambda *_: True)
    resident = JobRunner(Study(data).setup())
    resident.compressed.apply(
        Plan.of({site.name: options[0] for site, options in resident.compressed.space.wanted().items()})
    )
    assert resident.timed.join() == []


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="compile and prepack"):
        make_objective("latency", {"compile": True, "prepack": True})
    with pytest.raises(InputError, match="must be true or false"):
        make_objective("latency", {"prepack": 1})
    with pytest.raises(InputError, match="latency_prefill, latency_decode differ in prepack"):
        timed_objectives({"latency_prefill": {"prepack": True}, "latency_decode": {}})


def test_a_weight_stays_as_it_is_where_that_is_faster(monkeypatch):
    """By its size: on some processors small ones are."""
    monkeypatch.setattr("rankfront.methods.prepacked.faster", lambda rows, columns, dtype: rows > 32)
    small, large = nn.Linear(64, 32, bias=False), nn.Linear(64, 48, bias=False)
    assert prepack(nn.Sequential(small, large)) == large.weight.nbytes
    assert type(small.weight) is nn.Parameter
    assert type(large.weight) is Prepacked


def test_both_layouts_are_timed_once_for_a_size():
    first = prepacked_module._measured(24, 40, torch.float32, torch.get_num_threads())
    assert isinstance(first, bool)
    before = prepacked_module._measured.cache_info().hits
    assert prepacked_module._measured(24, 40, torch.float32, torch.get_num_threads()) == first
    assert prepacked_module._measured.cache_info().hits == before + 1
