"""OpenVINO: the graph says what the compressed model says, and stores what the plan does."""

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from common import architecture
from launching import measured, tree, verify_here
from serving import PLANS, World

from rankfront.methods import InputError
from rankfront.search.inputs.model import count_parameters
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.output.served import convert_folder, export_served
from rankfront.search.plans.plan import Plan
from rankfront.search.serve import openvino_graph
from rankfront.search.serve.writing import write

installed = pytest.mark.skipif(
    not openvino_graph.available() or importlib.util.find_spec("openvino_genai") is None,
    reason="needs openvino, openvino-tokenizers and openvino-genai",
)
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
OTHERS = ("shared-basis", "oats", "rtn-int8", "rocket")
SITES = ("0-1.mlp.up_proj", "0.self_attn.q_proj", "1.mlp.down_proj", "2.mlp.up_proj")
SAID = 8


def engine(folder):
    from rankfront.search.serve.openvino_engine import OpenVino

    return OpenVino(folder, 1)


def logits_in_parts(folder):
    """Those of prompts of two sequences, one token, and several more, on the cache of what came before."""
    runs = engine(folder)
    return torch.cat([runs.read(IDS[:, first:last]) for first, last in ((0, 10), (10, 11), (11, 24))], 1)


def in_genai(folder, ids):
    """What openvino_genai says next."""
    genai, openvino = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
    exact = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline, settings = genai.LLMPipeline(str(folder), "CPU", **exact), genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos = SAID, True
    mask = openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
    given = genai.TokenizedInputs(openvino.Tensor(np.array([ids])), mask)
    return pipeline.generate(given, settings).tokens[0]


@torch.no_grad()
def check(model, folder):
    torch.testing.assert_close(logits_in_parts(folder), model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    said = model.generate(IDS[:1, :6], max_new_tokens=SAID, min_new_tokens=SAID, do_sample=False)[0, 6:].tolist()
    assert engine(folder).greedy(IDS[0, :6].tolist(), SAID) == said
    assert in_genai(folder, IDS[0, :6].tolist()) == said


@installed
@pytest.mark.parametrize(
    ("name", "plan"), [("llama-tied", "halves gone"), ("qwen2", "one width, a block gone"), ("llama", "widths")]
)
def test_the_graph_says_what_the_compressed_model_says(worlds, tmp_path, name, plan):
    world = worlds(name)
    model = world.run(plan)
    said = write(model, "openvino", tmp_path, tokenizer=world.tokenizer)
    gone = sum(option.method == "drop-block" for option in PLANS[plan].values())
    assert 0 <= count_parameters(model) - said.values <= gone * model.config.hidden_size
    check(model, tmp_path)


@installed
def test_what_has_no_graph_of_its_own_is_multiplied_out(tmp_path, text_file):
    world = World("llama-tied", tmp_path / "model", text_file, OTHERS)
    wanted = world.compressed.space.wanted()
    options = {}
    for method, site in zip(
        OTHERS, ("0-1.mlp.up_proj", "0.self_attn.q_proj", "1.mlp.down_proj", "2.mlp.up_proj"), strict=True
    ):
        own = next(each for each in wanted if each.name == f"model.layers.{site}")
        options[own.name] = next(option for option in wanted[own] if option.method == method)
    model = world.runs(options)
    values = write(model, "openvino", tmp_path / "out", tokenizer=world.tokenizer).values
    assert values < world.compressed.dense_values
    check(model, tmp_path / "out")


@installed
def test_trials_and_folders_are_exported_and_verified(worlds, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    setup = worlds("llama-tied").setup
    resident = JobRunner(setup)
    row = measured(resident, Plan.of(PLANS["halves gone"], setup.origin()))
    verified = export_served(setup, row, tmp_path / "out", "openvino", "F16", "none")
    assert verified.notes[-1].startswith("OpenVINO (openvino 20")
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"openvino_model.xml", "openvino_tokenizer.xml", "config.json", "plan.json", "README.md"} <= held
    assert "LLMPipeline" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    export(setup, row, tmp_path / "factored", "factored", "none")
    again = convert_folder(tmp_path / "factored", "openvino", tmp_path / "again")
    assert again.parameters == verified.parameters
    root = str(tmp_path.parent).encode()
    assert not [file for file, content in tree(tmp_path).items() if root in content]
    pipeline = importlib.import_module("openvino_genai").LLMPipeline(str(tmp_path / "again"), "CPU")
    assert isinstance(pipeline.generate("the people", max_new_tokens=4), str)


def test_without_openvino_an_export_says_what_to_install(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_graph, "available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'rankfront\[openvino\]'"):
        write(worlds("llama").run("dense"), "openvino", tmp_path)


@installed
def test_models_whose_attention_has_windows_are_refused(tmp_path):
    with pytest.raises(InputError, match="without sliding windows and this model's attention sees 8 of 64"):
        write(architecture("mistral").build(), "openvino", tmp_path)
