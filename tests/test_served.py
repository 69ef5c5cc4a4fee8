"""Exports and conversions in the formats of engines, by the command line: verified, or nothing is kept."""

import copy
import json
import os

import pytest
import torch
from launching import measured, tree, verify_here
from serving import PLANS, decoder
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.__main__ import run
from rankfront.search.errors import ExportError
from rankfront.search.inputs.model import count_parameters
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output import served
from rankfront.search.output.export import export
from rankfront.search.output.served import export_served
from rankfront.search.plans.plan import Plan
from rankfront.search.serve import llama_cpp, openvino_engine
from rankfront.search.serve.doors import DOORS, ENGINES

DENSE = count_parameters(decoder("llama-tied"))
FORMS = ("plain", "nemotron-nas", "gguf")


@pytest.fixture(scope="module")
def trials(worlds):
    """A function from a plan of `PLANS` to (setup, its trial)."""
    setup = worlds("llama-tied").setup
    resident = JobRunner(setup)
    return lambda plan: (setup, measured(resident, Plan.of(PLANS[plan], setup.origin())))


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Folders are verified in this process, and llama.cpp is asked nothing, whatever is installed."""
    verify_here(monkeypatch)
    monkeypatch.setattr(llama_cpp, "available", lambda: False)


@pytest.mark.parametrize("form", FORMS)
def test_a_trial_is_exported_as_engines_read_it(trials, tmp_path, form):
    setup, row = trials("one width, a block gone")
    verified = export_served(setup, row, tmp_path / "out", form, "F16", "none")
    assert os.listdir(tmp_path) == ["out"]
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plan.json", "README.md"} <= held
    assert not [file for file, content in tree(tmp_path / "out").items() if str(tmp_path.parent).encode() in content]
    assert ("model.gguf" in held) == (form == "gguf") == ("config.json" not in held)
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")) == row.plan
    assert verified.perplexity == pytest.approx(row.figure("perplexity"), rel=1e-3)
    assert verified.reloaded == (form != "gguf")
    stored = row.attributes["parameter_count"]
    assert stored < verified.parameters < DENSE
    assert verified.notes[:2] == (
        f"the plan stores {stored:,} values as factors and this folder {verified.parameters:,}",
        "multiplied out to dense weights, heads whole: lama at 1 sites, svd-llm at 2 sites, vo-svd at 1 sites",
    )
    assert all(f"- {note}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8") for note in verified.notes)


def test_a_factored_folder_is_converted(trials, text_file, tmp_path):
    setup, row = trials("halves gone")
    export(setup, row, tmp_path / "small", "factored")
    export(setup, row, tmp_path / "whole", "dense")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    ids = torch.arange(24)[None]
    for form in ("dense", "nemotron-nas", "gguf"):
        out = tmp_path / form
        assert (
            run(["convert", str(tmp_path / "small"), "--format", form, "--out", str(out), "--text", str(text_file)])
            == 0
        )
        if form != "gguf":
            ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
            with torch.no_grad():
                torch.testing.assert_close(ours(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
            assert (count_parameters(ours) == DENSE) == (form == "dense")
    assert sorted(os.listdir(tmp_path)) == ["dense", "gguf", "nemotron-nas", "small", "whole"]
    assert not [file for file, content in tree(tmp_path).items() if str(tmp_path.parent).encode() in content]


def test_what_a_format_cannot_hold_leaves_nothing_behind(trials, tmp_path):
    setup, row = trials("halves gone")
    with pytest.raises(InputError, match="use --format nemotron-nas"):
        export_served(setup, row, tmp_path / "out", "plain", "F16", "none")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("engine", ["llama_cpp", "openvino"])
def test_engines_are_compared_with_the_model_in_fp32(worlds, tmp_path, monkeypatch, engine):
    """Of a plan whose perplexity is 500, bf16 and fp32 may be more than 1% apart over a window."""

    class Engine:
        def __init__(self, *given):
            pass

        def perplexities(self, model, windows):
            assert model.dtype == torch.float32
            return (100.0, 100.0, 20)[: 3 if engine == "llama_cpp" else 2]

    model, ids = copy.deepcopy(worlds("llama-tied").run("widths")).bfloat16(), torch.arange(24)[None]
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(llama_cpp, "installed", lambda: "xllamacpp 1")
    monkeypatch.setattr(llama_cpp, "LlamaCpp", Engine)
    monkeypatch.setattr(openvino_engine, "installed", lambda: "openvino 1")
    monkeypatch.setattr(openvino_engine, "OpenVino", Engine)
    said = served._in_openvino(tmp_path, model, ids) if engine == "openvino" else served._in_llama_cpp(
        tmp_path / "model.gguf", model, ids, "F16"
    )  # fmt: skip
    assert "perplexity 100" in said
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("found", "kept"), [(1.005, True), (1.02, False)])
def test_llama_cpp_has_to_find_the_same_perplexity(trials, tmp_path, monkeypatch, found, kept):
    class Engine:
        def __init__(self, file, length, threads):
            assert file.is_file()

        def perplexities(self, model, windows):
            return 100 * found, 100.0, 20

    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(llama_cpp, "installed", lambda: "xllamacpp 1")
    monkeypatch.setattr(llama_cpp, "LlamaCpp", Engine)
    setup, row = trials("one width")
    if kept:
        verified = export_served(setup, row, tmp_path / "out", "gguf", "F16", "none")
        assert verified.notes[-1] == "llama.cpp (xllamacpp 1) finds perplexity 100.5 on 20 tokens, transformers 100"
    else:
        with pytest.raises(ExportError, match=r"102 and the model has 100 .* more than 1% apart: not kept"):
            export_served(setup, row, tmp_path / "out", "gguf", "F16", "none")
        assert os.listdir(tmp_path) == []
        export_served(setup, row, tmp_path / "out", "gguf", "Q4_0", "none")  # whose rounding is seen


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--format", "plain", "--gguf-type", "Q8_0"], "--gguf-type is about --format gguf"),
        (["--format", "gguf", "--gguf-type", "Q4_K_M"], "llama-quantize"),
        (["--format", "factored"], "is factored already"),
        (["--format", "vllm"], "is factored already"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(tmp_path, capsys, arguments, remedy):
    assert run(["convert", str(tmp_path), *arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert remedy in printed
    assert printed.count("\n") == 1


def test_engines_are_listed_without_being_imported(capsys):
    assert run(["engines", "--json"]) == 0
    found = {each["engine"]: each for each in json.loads(capsys.readouterr().out)}
    assert found.keys() == ENGINES.keys()
    assert found["transformers"]["installed"].startswith("transformers 5.")
    assert found["llama.cpp"]["formats"]["gguf"]["keeps"] == dict(DOORS["gguf"].keeps)
    assert found["SGLang"]["formats"]["nemotron-nas"]["asks_for"] == "MLP widths in multiples of 256"
    assert all(name in ENGINES for door in DOORS.values() for name in door.engines)
    assert run(["engines"]) == 0
    assert "multiplied out" in capsys.readouterr().out
