"""Modules whose class has a forward of its own: what it does is kept, or the module is refused by name."""

import common
import pytest
import torch
import transformers
from common import restore, study_data
from launching import measured, verify_here
from test_architectures import TOLERANCE, factor, logits
from torch import nn

from rankfront.methods import InputError
from rankfront.methods.layers import row_scale
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

ENCODER_DECODER = {
    "vocab_size": common.VOCABULARY, "d_model": common.HIDDEN, "max_position_embeddings": common.POSITIONS,
    "decoder_layers": common.BLOCKS, "decoder_attention_heads": common.HEADS, "decoder_ffn_dim": common.INNER,
    "encoder_layers": 1, "encoder_attention_heads": common.HEADS, "encoder_ffn_dim": common.INNER,
    "scale_embedding": True, "is_decoder": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SCALED = {
    "xglm": ("XGLMConfig", {
        "vocab_size": common.VOCABULARY, "d_model": common.HIDDEN, "ffn_dim": common.INNER, "num_layers": common.BLOCKS,
        "attention_heads": common.HEADS, "max_position_embeddings": common.POSITIONS, "scale_embedding": True,
    }),
    "biogpt": ("BioGptConfig", {
        "vocab_size": common.VOCABULARY, "hidden_size": common.HIDDEN, "intermediate_size": common.INNER,
        "num_hidden_layers": common.BLOCKS, "num_attention_heads": common.HEADS,
        "max_position_embeddings": common.POSITIONS, "scale_embedding": True,
    }),
    "mbart": ("MBartConfig", ENCODER_DECODER),
    "xglm-untied": ("XGLMConfig", {
        "vocab_size": common.VOCABULARY, "d_model": common.HIDDEN, "ffn_dim": common.INNER, "num_layers": common.BLOCKS,
        "attention_heads": common.HEADS, "max_position_embeddings": common.POSITIONS, "scale_embedding": True,
        "tie_word_embeddings": False,
    }),
}  # fmt: skip


def build(name, dtype=torch.float32):
    config, settings = SCALED[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    common.randomise(model)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("name", SCALED)
def test_full_rank_in_the_place_of_every_module_leaves_the_logits_alone(name):
    """What `test_architectures` shows of the others."""
    model = build(name)
    before = logits(model)
    for site in common.single_sites(model):
        factor(model, site)
    torch.testing.assert_close(logits(model), before, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_of_a_table_is_read_off_what_it_does(name, dtype):
    assert row_scale(build(name, dtype).get_input_embeddings()) == common.HIDDEN**0.5


def test_a_plain_table_has_no_scale():
    assert row_scale(nn.Embedding(20, 6)) is None


class Buffered(nn.Embedding):
    """A scale that no attribute tells."""

    def forward(self, ids):
        return super().forward(ids) * torch.tensor(2.5)


def test_a_scale_that_no_attribute_tells_is_measured():
    assert row_scale(Buffered(20, 6)) == pytest.approx(2.5)


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class Neighbour(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings)


@pytest.mark.parametrize("table", [Normed, Shifted, Neighbour])
def test_a_table_that_does_anything_else_is_refused_by_name(table):
    with pytest.raises(InputError, match=table.__name__):
        row_scale(table(20, 6))


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


@pytest.mark.parametrize("how", ["class", "instance", "name"])
def test_a_linear_with_a_forward_of_its_own_is_no_site(how):
    model = common.architecture("llama").build()
    dense = model.model.layers[0].mlp.up_proj
    if how == "instance":
        dense.forward = lambda x: nn.functional.linear(x, dense.weight) ** 2
    else:
        dense.__class__ = Squared if how == "class" else type("Linear", (Squared,), {})
    treated = {weight.path for site in find_sites(model) for weight in site.weights}
    assert "model.layers.0.mlp.up_proj" not in treated
    assert "model.layers.1.mlp.up_proj" in treated


@pytest.fixture(params=["xglm", "xglm-untied"])
def scaled(request, tmp_path, text_file):
    """A resident model whose embedding table scales its rows, with the table and head in its space."""
    folder = tmp_path / "model"
    build(request.param).save_pretrained(folder)
    common.tiny_tokenizer().save_pretrained(folder)
    data = study_data(folder, text_file)
    data["space"] |= {"include": ["*", "lm_head", "*embed_tokens"], "methods": ["svd", "rtn-int8"]}
    return JobRunner(Study(data).setup())


def test_rounding_a_scaled_table_is_nearly_lossless_and_its_export_is_the_same(scaled, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    outside = [site for site, place in scaled.compressed.sites.items() if place.block is None]
    chosen = {s.name: o for s in outside for o in scaled.compressed.space.wanted().get(s, []) if o.method == "rtn-int8"}
    assert any("embed" in path for s in outside if s.name in chosen for w in s.weights for path in (w.path, *w.tied))
    dense = measured(scaled, Plan(())).attributes["perplexity"]
    row = measured(scaled, Plan.of(chosen))
    assert row.attributes["perplexity"] == pytest.approx(dense, rel=0.01)
    assert export(scaled.setup, row, tmp_path / "out", "factored").perplexity == pytest.approx(
        row.attributes["perplexity"], rel=1e-4
    )
    restore(scaled)
