"""On a GPU: every method runs as it does on the CPU, a study from launch to export, clocks. Skipped without one."""

import math

import pytest
import torch
from common import tokens
from launching import make_run, small_data
from transformers import AutoModelForCausalLM

from rankfront.methods import method_names
from rankfront.methods.joined import Joined
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.objectives import Clock, make_objective
from rankfront.search.measure.runner import JobRunner
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what is tested nobody has run")
METHODS = [name for name in method_names() if not name.endswith("-published")]
LENGTHS = {"prompt": 6, "decode": 2, "rounds": 2, "seconds": 0}


@pytest.fixture
def data(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    return small_data(model_folder, text_file, trials=6)


def resident_on(device, data, method, folder):
    data["model"]["device"] = device
    data["space"] |= {"methods": [method], "keep": [0.5, 0.8]}
    data["space"]["include"] = ["*", "*embed_tokens*", "*lm_head*"]
    return JobRunner(Study(data, run=folder).setup())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_there_as_it_does_here(data, tmp_path, method):
    """In fp32, from factors of the same store: a prompt, and one token with the cache."""
    ids, said = tokens(2, 9), {}
    for device in ("cpu", DEVICE):
        resident = resident_on(device, data, method, tmp_path / device)
        plan = {}
        for site, options in resident.compressed.space.wanted().items():
            if not any(set(site.weights) & set(other.weights) for other in plan):
                plan[site] = options[0]
        resident.compressed.apply(Plan.of({site.name: option for site, option in plan.items()}))
        with torch.inference_mode():
            out = resident.compressed.model(input_ids=ids.to(device), use_cache=True)
            step = resident.compressed.model(input_ids=ids[:, :1].to(device), past_key_values=out.past_key_values)
        said[device] = torch.cat([out.logits, step.logits], 1).cpu()
    torch.testing.assert_close(said[DEVICE], said["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_study_from_launch_to_export(data, tmp_path, dtype, compiled):
    data["model"] |= {"device": DEVICE, "dtype": dtype}
    data["space"]["methods"] = ["svd-llm", "nystrom", "vo-svd", "lama", "gptq-int8", "gptq-int4"]
    data["space"]["rank_multiple"] = "device"
    data["objectives"] = {"perplexity": {}, "latency_decode": LENGTHS | {"compile": compiled}, "resident_bytes": {}}
    data["search"] |= {"sampler": "rankfront", "trials": 9}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state == "complete"]
    assert len(rows) == 9
    assert all(math.isfinite(value) and value > 0 for row in rows for value in row.values.values())
    study.export(tmp_path / "out", next(row for row in rows if row.plan.choices))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(DEVICE)
    assert loaded.generate(input_ids=tokens(1, 4).to(DEVICE), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_the_memory_that_is_counted_is_the_devices(data, tmp_path):
    resident = resident_on(DEVICE, data, "svd", tmp_path / "run")
    held = make_objective("resident_bytes", {}).value(resident.subject(Plan(()), Clock()))
    assert held <= torch.cuda.memory_allocated()


def test_joined_factors_that_move_to_the_device_are_joined_there():
    members = [LowRankLinear(torch.randn(6, 2), torch.randn(2, 8)) for _ in range(3)]
    x = torch.randn(4, 8)
    alone = [member(x) for member in members]
    joined = Joined(members)
    for member in members:
        member.to(DEVICE)
    for own, expected in zip(members, alone, strict=True):
        torch.testing.assert_close(own(x.to(DEVICE)).cpu(), expected)
    assert joined._whole.device.type == DEVICE
