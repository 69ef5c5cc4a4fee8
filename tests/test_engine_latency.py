"""Latency in the engine that will serve: written and run there, in turns with dense."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from common import study_data
from launching import make_run, small_data

from rankfront.methods import Cost, InputError
from rankfront.objectives import make_objective
from rankfront.objectives._clock import Clock
from rankfront.objectives._subject import Subject
from rankfront.objectives.latency import Run
from rankfront.search.choices import OURS
from rankfront.search.commands.compressing import compress_command
from rankfront.search.measure.engine_runs import EngineRuns
from rankfront.search.serve import llama_cpp, openvino_graph
from rankfront.search.study import Study

SHORT = {"prompt": 8, "decode": 4, "rounds": 2, "seconds": 0.0}
INSTALLED = {"openvino": openvino_graph.available, "xllamacpp": llama_cpp.available}


class Clocked:
    """Engines whose seconds are known."""

    def __init__(self):
        self.asked = []

    def ours(self, engine, length):
        return lambda ids, decode: self._run("ours", Run(4.0, 0.5), engine, length, ids, decode)

    def dense(self, engine, length):
        return lambda ids, decode: self._run("dense", Run(8.0, 2.0), engine, length, ids, decode)

    def _run(self, whose, taken, engine, length, ids, decode):
        self.asked.append((whose, engine, length, tuple(ids.shape), decode))
        return taken


def subject(engines, dense=nullcontext):
    model, cost = torch.nn.Linear(2, 2), Cost(1, 1, 1, 1, 1)
    return Subject(model, dense, torch.zeros(2, 8, dtype=torch.long), None, cost, Clock(), engines=engines)


def test_ratios_are_those_of_the_engine():
    engines = Clocked()
    ours = subject(engines)
    assert make_objective("latency_decode", SHORT | {"engine": "openvino"}).value(ours) == 0.25
    assert make_objective("latency_prefill", SHORT | {"engine": "openvino"}).value(ours) == 0.5  # of the same rounds
    assert [whose for whose, *_ in engines.asked] == ["ours", "dense", "ours", "dense", "dense", "ours"]
    assert {tuple(rest) for _, *rest in engines.asked} == {("openvino", 12, (1, 8), 4)}
    assert make_objective("latency", SHORT | {"engine": "xllamacpp"}).value(subject(engines, dense=None)) == 1.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "vllm"}, "engine.*'vllm'"),
        ({"engine": "openvino", "compile": True}, "leave out compile and prepack"),
        ({"engine": "xllamacpp", "batch": 2}, "batch is 2 and xllamacpp runs one"),
    ],
)
def test_settings_that_no_engine_has_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        make_objective("latency", SHORT | settings)


def test_a_study_wants_its_engine_installed(model_folder, text_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = study_data(model_folder, text_file)
    data["objectives"] = {"perplexity": {}, "latency": {"engine": "openvino"}}
    with pytest.raises(InputError, match=r"pip install 'rankfront\[openvino\]'"):
        Study(data).setup()
    with pytest.raises(InputError, match=r"pip install 'rankfront\[openvino\]'"):
        compress_command(str(model_folder), Path("out"), keep=0.7, serve="openvino")


@pytest.mark.parametrize("engine", INSTALLED)
def test_models_are_written_for_the_engine_and_run_there(worlds, engine):
    if not INSTALLED[engine]():
        pytest.skip(f"needs {engine}")
    world = worlds("llama-tied")
    world.run("one width")
    engines = EngineRuns(world.compressed)
    ids = torch.randint(3, 300, (1, 8))
    for run in (engines.ours(engine, 12), engines.dense(engine, 12), engines.ours(engine, 12)):
        found = run(ids, 4)
        assert found.prefill > 0
        assert found.decode > 0
    assert engines.dense(engine, 12) is engines.dense(engine, 12)


@pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp")
def test_a_search_reads_latency_off_its_trials(worlds, text_file, tmp_path):
    data = small_data(worlds("llama-tied").setup.source.location, text_file, sampler=OURS, trials=6)
    data["space"] = {"servable": "gguf", "keep": [0.5, 0.7], "rank_multiple": 2}
    data["objectives"] = {"perplexity": {}, "parameters": {}, "latency_decode": SHORT | {"engine": "xllamacpp"}}
    study = make_run(data, tmp_path / "run")
    rows = [row for row in study.rows() if row.state != "waiting"]
    assert {row.state for row in rows} == {"complete"}
    dense, *others = (row.values["latency_decode"] for row in rows)
    assert dense == 1.0
    assert all(ratio > 0 for ratio in others)
    assert study.read().latency() == {}  # no table


def test_a_plan_that_an_engine_cannot_run_fails_its_trial_alone(worlds, monkeypatch):
    def refused(*_):
        raise InputError("gguf needs a block that does something")

    monkeypatch.setattr("rankfront.search.measure.engine_runs.write", refused)
    engines = EngineRuns(worlds("llama-tied").compressed)
    with pytest.raises(RuntimeError, match="a block that does something"):
        engines.ours("xllamacpp", 12)
    with pytest.raises(InputError):
        engines.dense("xllamacpp", 12)
