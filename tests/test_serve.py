"""Formats of engines: what is written runs as the compressed model does, or is refused in a line."""

import ast
import json
from pathlib import Path

import pytest
import torch
import transformers
from common import architecture
from safetensors.torch import load_file
from serving import PAIRS, PLAIN, PLANS, SETTINGS
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.inputs.model import count_parameters
from rankfront.search.serve import modeling_nemotron_nas
from rankfront.search.serve.writing import multiplied_out, write

IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def loaded(folder):
    """What transformers makes of a folder, without rankfront."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("plan", PLAIN)
def test_plain_is_the_models_own_class_and_gives_the_same_logits(worlds, tmp_path, name, plan):
    model = worlds(name).run(plan)
    values = write(model, "plain", tmp_path).values
    ours = loaded(tmp_path)
    assert type(ours) is type(model)
    assert count_parameters(ours) == values <= worlds(name).compressed.dense_values
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)


@pytest.mark.parametrize(("name", "plan"), PAIRS)
def test_nemotron_nas_gives_the_same_logits(worlds, tmp_path, name, plan):
    model = worlds(name).run(plan)
    values = write(model, "nemotron-nas", tmp_path).values
    ours = loaded(tmp_path)
    assert count_parameters(ours) == values
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)


@pytest.mark.parametrize("name", SETTINGS)
def test_dense_multiplies_everything_out(worlds, tmp_path, name):
    model = worlds(name).run("halves gone")
    assert write(model, "dense", tmp_path).values == worlds(name).compressed.dense_values
    ours = loaded(tmp_path)
    assert type(ours) is type(model)
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma3", "qwen3"])
def test_plain_is_for_other_classes_too(tmp_path, name):
    model = architecture(name).build()
    write(model, "plain", tmp_path)
    ids = IDS % 96
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits, **CLOSE)


@pytest.mark.parametrize(
    ("plan", "refusal"),
    [
        ("widths", r"has 24 to 48 neurons, fewer at model.layers.0.mlp.gate_proj\+up_proj\+down_proj, model.layers.2"),
        ("halves gone", r"leaves out model.layers.1.self_attn.q_proj\+.*, model.layers.2.mlp.gate_proj.*nemotron-nas"),
    ],
)
def test_what_plain_cannot_hold_is_refused_by_the_names_of_sites(worlds, tmp_path, plan, refusal):
    with pytest.raises(InputError, match=refusal) as error:
        write(worlds("llama").run(plan), "plain", tmp_path)
    assert "\n" not in str(error.value)


def test_widths_in_steps_of_256_are_written_as_every_engine_reads_them(tmp_path):
    """As ``ffn_mult``; SGLang and others round 2/3 of it, times the hidden size, up to a multiple of 256."""
    row = architecture("llama")
    config = transformers.LlamaConfig(**row.settings | {"intermediate_size": 768})
    model = transformers.LlamaForCausalLM(config).eval()
    write(model, "nemotron-nas", tmp_path)
    ffn = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["block_configs"][0]["ffn"]
    assert ffn.keys() == {"no_op", "replace_with_linear", "ffn_mult"}
    rounded = int(2 * ffn["ffn_mult"] * config.hidden_size / 3)
    assert 512 < rounded <= 768
    assert loaded(tmp_path).model.layers[0].mlp.up_proj.out_features == 768


@pytest.mark.parametrize("name", SETTINGS)
def test_the_configuration_is_in_the_form_that_engines_read(worlds, tmp_path, name):
    model = worlds(name).run("a block and halves gone")
    write(model, "nemotron-nas", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 3
    assert config["rope_theta"] == 10000.0
    heads = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2}
    assert [block["attention"] for block in config["block_configs"]] == [heads] * 3
    assert [block["ffn"].get("intermediate_size") for block in config["block_configs"]] == [48, 16, None]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, False, True]
    assert config.get("qkv_bias", False) == (name == "qwen2")
    kept = load_file(tmp_path / "model.safetensors")
    assert not [key for key in kept if "layers.2" in key and ("mlp" in key or "post_att" in key)]


def test_what_loads_by_attributes_and_dicts_saves_and_loads_again(worlds, tmp_path):
    model = worlds("qwen2").run("halves gone")
    write(model, "nemotron-nas", tmp_path / "a")
    ours = loaded(tmp_path / "a")
    block = ours.config.block_configs[1]
    assert block.attention.no_op is block["attention"]["no_op"] is True
    assert not hasattr(block.ffn, "ffn_mult")  # by which vLLM tells the forms apart
    ours.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(loaded(tmp_path / "b")), logits(model), **CLOSE)


@pytest.mark.parametrize("named", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}])
def test_it_generates_with_every_cache(worlds, tmp_path, named):
    model = worlds("llama").run("halves gone")
    write(model, "nemotron-nas", tmp_path)
    ours = loaded(tmp_path).generate(IDS[:, :6], max_new_tokens=5, do_sample=False, **named)
    assert ours.equal(model.generate(IDS[:, :6], max_new_tokens=5, do_sample=False, **named))


def test_the_folder_needs_transformers_alone():
    """The code that a folder carries imports the standard library, torch and transformers."""
    tree = ast.parse(Path(modeling_nemotron_nas.__file__).read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in found}
    assert roots == {"__future__", "collections", "copy", "typing", "torch", "transformers"}


def test_what_is_multiplied_out_is_said():
    plan = PLANS["halves gone"]
    assert multiplied_out(plan, "nemotron-nas") == (
        "multiplied out to dense weights, heads whole: lama at 1 sites, svd-llm at 3 sites, vo-svd at 1 sites"
    )
    assert multiplied_out(plan, "factored") is None
    assert multiplied_out(PLANS["one width"], "gguf") is None
