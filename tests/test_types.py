"""A sample of transformers' types, of every kind of structure: sites by numbers, and two of them from study to reload.

`studies/architectures.py` takes all types the whole way.
"""

import common
import pytest
import torch
from architecture_laws import CLOSE, Examined, apart, full_rank, logits
from tiny import BESIDE, tiny_model
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.methods.layers import replacement, set_module
from rankfront.methods.unfused import fuse
from rankfront.search.inputs.acceptance import refused
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.coverage import coverage_of
from rankfront.search.inputs.model import dense_skeleton
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import blocks, find_sites
from rankfront.search.measure.streams import calls_of, first_hidden

TYPES = (
    "opt", "xglm", "olmo2", "modernbert-decoder",  # learned positions; norms after; alternating attention
    "qwen3_moe", "gpt_oss", "qwen2_moe", "granitemoe",  # experts
    "deepseek_v3", "deepseek_v32", "zamba",  # latent attention, an indexer, shared weights
    "mamba2", "falcon_mamba", "rwkv",  # states
    "jamba", "lfm2", "recurrent_gemma", "nemotron_h", "qwen3_next",  # several kinds of block
    "gemma4_text", "git", "gemma3", "gemma3n",  # shared keys and values; towers
    "hrm_text", "xlm",  # two lists of blocks
)  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_sites_of_every_kind_of_structure(name):
    """Taken apart a type computes the same; so it does with factors of full rank everywhere; what is left is named;
    and put together again it is what it was."""
    if name in BESIDE:
        pytest.importorskip(BESIDE[name], reason=f"{name} wants {BESIDE[name]}")
    model = tiny_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = logits(model)
    take_apart(model)
    assert apart(logits(model), wanted) <= CLOSE
    sites = find_sites(model)
    assert not [left for left in coverage_of(model, sites).left if "experts" in left.name]
    reasons = refused(model, sites, common.tokens(1, 24))
    assert reasons.keys() <= {site.name for site in sites if len(site.weights) > 1}
    dense = {}
    for site in sites:
        if len(site.weights) == 1:
            factors = full_rank(model, site)["weight"]
            for path in site.anchor.paths:
                dense[path] = model.get_submodule(path)
                set_module(model, path, replacement(dense[path], factors.kind, factors.tensors, factors.settings))
    assert apart(logits(model), wanted) <= CLOSE
    for path, module in dense.items():
        set_module(model, path, module)
    fuse(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["falcon_h1", "zamba2"])
def test_from_a_study_to_a_reloaded_export(name, monkeypatch):
    row = Examined(name, monkeypatch).row()
    assert row["failed"] == {}


def test_a_model_of_a_part_of_the_configuration(monkeypatch, tmp_path):
    """Emu3 is known to transformers by a configuration whose part for text the model has. Its exports load as any, the
    dense one too, and the skeleton that a factored one is healed or sliced by is there."""
    emu = Examined("emu3", monkeypatch)
    emu.model, emu.folder = tiny_model("emu3"), tmp_path
    emu.dense = logits(emu.model)
    assert emu.study() is None
    assert emu.export() is None
    skeleton = dense_skeleton(resolve(str(tmp_path / "out")))
    assert skeleton.state_dict().keys() == emu.model.state_dict().keys()
    row = next(row for row in emu.study_run.rows() if row.plan.choices)
    emu.resident.apply(row.plan)
    expected = logits(emu.resident.model)
    emu.study_run.export(tmp_path / "dense", row, "dense")
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), expected) <= CLOSE


@pytest.mark.parametrize("name", ["hrm_text", "mllama", "xlm", "openai-gpt"])
def test_hidden_states_go_from_block_to_block_or_are_refused(name):
    """HRM calls a block again, text passes by Mllama's blocks for images, XLM's attentions run between: a refit and
    healing by blocks would read what the model never does. OpenAI's first GPT gives a list of what the next reads."""
    model = tiny_model(name)
    _, found = blocks(model)
    ids = common.tokens(1, 12)
    if name != "openai-gpt":
        with pytest.raises(InputError, match="are no chain"):
            calls_of(model, found, ids)
        return
    hidden = first_hidden(model, found[0], ids)
    for block, call in zip(found, calls_of(model, found, ids), strict=True):
        hidden = call.run(block, hidden)
    assert apart(model.lm_head(hidden), model(input_ids=ids).logits) <= CLOSE
