"""FLOPs against torch's counter; bytes held and bytes cached against the tensors themselves."""

import common
import pytest
import torch
from common import random_plan, save_folder
from launching import small_data
from torch.utils.flop_counter import FlopCounterMode

from rankfront.methods import InputError
from rankfront.objectives import Clock, make_objective
from rankfront.search import Plan, Study
from rankfront.search.constraint import Constraint
from rankfront.search.factors.calibration import calibrate
from rankfront.search.measure import prepare
from rankfront.search.measure.runner import JobRunner
from rankfront.search.plans.job import Job
from rankfront.search.storage.front import Row, box_of, hypervolume
from rankfront.search.storage.picking import holds

CONTEXT = 12
JOINT = ["svd-llm", "lama", "vo-svd", "nystrom", "drop-block"]
NAMES = [row.name for row in common.ARCHITECTURES]


@pytest.fixture(scope="module")
def residents(tmp_path_factory, text_file):
    """Architecture -> a resident model with single and joint methods, made when first asked for."""
    made = {}

    def resident(name, methods=tuple(JOINT), dtype="float32"):
        if (name, methods, dtype) not in made:
            data = small_data(save_folder(name, tmp_path_factory.mktemp(name) / "model"), text_file)
            data["space"] = {"methods": list(methods), "keep": [0.4, 0.7], "rank_multiple": 2}
            data["model"]["dtype"] = dtype
            made[name, methods, dtype] = JobRunner(Study(data).setup())
        return made[name, methods, dtype]

    return resident


def value(resident, plan, name, **settings):
    return make_objective(name, settings).value(resident.subject(plan, Clock()))


def disjoint_plan(resident, seed):
    """Random options, of sites that share weights one."""
    return resident.compressed.space.disjoint(random_plan(resident, seed))


def counted(model, context):
    """FLOPs of the last of ``context`` tokens, the others in the cache."""
    ids = common.tokens(1, context, seed=3)
    model.set_attn_implementation("eager")  # a product of matrices, which the counter knows
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_flops_are_what_a_counter_counts(residents, name, seed):
    """Of the dense model and of plans with joint and single sites, but for the rotary angles, a vector a token."""
    resident = residents(name)
    plan = Plan(()) if seed is None else disjoint_plan(resident, seed)
    found = value(resident, plan, "flops", context=CONTEXT)
    angles = counted(resident.compressed.model, CONTEXT) - found
    assert 0 <= angles <= 2 * 64 * 2  # inverse frequencies times the position, of two kinds of layers at most


def test_flops_of_more_context_are_those_of_attention(residents):
    resident = residents("llama")
    config = resident.compressed.model.config
    near, far = (value(resident, Plan(()), "flops", context=context) for context in (10, 30))
    assert far - near == 20 * 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers


@pytest.mark.parametrize("context", [0, -1, 1.5, "3", None, True])
def test_a_bad_context_is_refused(context):
    with pytest.raises(InputError, match=r"objectives\.flops\.context"):
        make_objective("flops", {"context": context})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_cache_grows_by_what_heads_keep(residents, name):
    """Dense: keys and values of every head. Thinned: what their options say."""
    resident = residents(name)
    config, text = resident.compressed.model.config, resident.compressed.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dense = value(resident, Plan(()), "kv_bytes")
    assert dense == 2 * heads * width * config.num_hidden_layers * 4
    chosen = {
        site.name: options[0]
        for site, options in resident.compressed.space.wanted().items()
        if options[0].method == "vo-svd" and site.name.endswith("v_proj+o_proj")
    }
    if not chosen:
        pytest.skip("its values are fused with queries and keys")
    saved = sum(heads * (width - option["width"]) * 4 for option in chosen.values())
    assert value(resident, Plan.of(chosen), "kv_bytes") == dense - saved


def test_memory_is_what_is_held_and_the_cache_of_so_many_sequences(residents):
    resident = residents("llama")
    held, grows = (value(resident, Plan(()), name) for name in ("resident_bytes", "kv_bytes"))
    assert value(resident, Plan(()), "memory", batch=3, context=50) == held + 3 * 50 * grows
    for settings in ({"batch": 0}, {"context": 1.5}):
        with pytest.raises(InputError, match="must be a whole number of at least 1"):
            make_objective("memory", settings)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_held_is_what_is_stored_where_nothing_is_unpacked(residents, name):
    """Dense models and low ranks hold what they store, beside the same few buffers."""
    resident = residents(name, ("svd-llm",))
    stored, held = [], []
    for seed in (None, 1, 2):
        plan = Plan(()) if seed is None else random_plan(resident, seed)
        stored.append(value(resident, plan, "bytes"))
        held.append(value(resident, plan, "resident_bytes"))
    buffers = [b - a for a, b in zip(stored, held, strict=True)]
    assert buffers[0] == buffers[1] == buffers[2]
    assert 0 <= buffers[0] < 8192


def test_copies_that_layers_run_with_count_as_held(residents):
    """Four bits keep a second copy in the order of their kernel, which takes bf16 alone; a sparse factor its indices,
    or itself made dense."""
    for method, factor, dtype in (("rtn-int4", 0.5, "bfloat16"), ("cospadi", 0.0, "float32"), ("oats", 0.0, "float32")):
        resident = residents("llama", (method,), dtype)
        chosen = {site.name: options[-1] for site, options in resident.compressed.space.wanted().items()}
        plan = Plan.of(chosen)
        dense = value(resident, Plan(()), "resident_bytes") - value(resident, Plan(()), "bytes")
        more = value(resident, plan, "resident_bytes") - value(resident, plan, "bytes") - dense
        integers = sum(b.nbytes for n, b in resident.compressed.model.named_buffers() if n.endswith(".integers"))
        assert more > 0
        if factor:
            assert integers <= more <= 2 * integers  # rows are filled up to what the kernel takes at a time


def test_calibration_runs_the_very_model_that_trials_do(model_folder, text_file, monkeypatch):
    """In bf16 from weights in fp32: what positions are made of stays in fp32, where all else is rounded."""
    data, seen = small_data(model_folder, text_file), {}
    data["space"]["methods"] = ["svd-llm"]
    data["model"]["dtype"] = "bfloat16"

    def watched(model, *rest, **named):
        seen.update(model.state_dict(keep_vars=True) | dict(model.named_buffers()))
        return calibrate(model, *rest, **named)

    monkeypatch.setattr(prepare, "calibrate", watched)
    resident = JobRunner(Study(data).setup())
    model = resident.compressed.model
    expected = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    assert any(tensor.dtype == torch.float32 for tensor in expected.values())
    assert {name: each.dtype for name, each in seen.items()} == {name: each.dtype for name, each in expected.items()}
    assert all(torch.equal(seen[name], each) for name, each in expected.items())


@pytest.mark.parametrize("method", ["oats", "svd"])
def test_a_record_says_how_the_model_runs(residents, method, monkeypatch):
    """What it holds, how many weights are multiplied out, how many right factors are one product with others."""
    resident = residents("llama", (method,))
    plan = Plan.of({site.name: options[0] for site, options in resident.compressed.space.wanted().items()})
    resident.compressed.apply(Plan(()))
    notes = resident.run(Job("trial", 0, plan))["notes"]
    assert notes["resident_bytes"] == value(resident, plan, "resident_bytes")
    assert notes["unpacked"] == (len(plan.choices) if method == "oats" else 0)
    assert notes["joined"] == 0
    monkeypatch.setattr("rankfront.search.measure.joining.faster", lambda *_: True)
    resident.timed.join()
    again = resident.run(Job("trial", 1, plan))["notes"]
    assert again["joined"] == (0 if method == "oats" else 10)  # q/k/v and gate/up, in two blocks
    assert again["resident_bytes"] == notes["resident_bytes"]
    row = Row(0, "complete", "random", plan.to_json(), plan.key, {}, {"notes": notes})
    assert holds(row, Constraint.parse("resident_bytes<=1e9"))


@pytest.mark.parametrize("name", ["parameters", "bytes", "kv_bytes", "resident_bytes", "flops", "latency"])
def test_a_plan_that_leaves_a_figure_as_it_was_still_fills_the_box(name):
    """Low ranks never touch the cache, and integers no parameter: a search that asks for more than that sees them."""
    dense = 1.0 if name in ("parameters", "latency") else 300.0
    row = Row(0, "complete", "anchor", "", "", {"perplexity": 20.0, name: dense}, {})
    assert hypervolume([row], box_of({"perplexity": {}, name: {}}, row)) > 0
