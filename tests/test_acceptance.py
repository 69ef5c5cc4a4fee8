"""What is a site by what modules do: numbers refuse joint sites that are not what they seem, shared weights are one."""

import pytest
import torch
from launching import make_run, quiet, small_data
from tiny import tiny_model
from torch import nn

from rankfront.methods import InputError
from rankfront.methods.unfused import fuse
from rankfront.search.inputs.acceptance import refusals, refused
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.calls import unlike_calls
from rankfront.search.inputs.reached import UNFELT, UNREACHED, check_causal, unreached
from rankfront.search.inputs.sites import blocks, find_sites
from rankfront.search.study import Study

WINDOWS = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(3))
VALUES, NEURONS = "self_attn.v_proj+o_proj", "mlp.gate_proj+up_proj+down_proj"


def kinds_refused(name):
    model = tiny_model(name)
    found = refused(model, find_sites(model), WINDOWS)
    return {site.split(".", 3)[3] for site in found}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", set()),
        ("phi", set()),  # partial rotary positions
        ("gptj", set()),  # the same, neighbours turned together
        ("gemma4_text", {VALUES}),  # values are normalised
        ("bitnet", {VALUES, NEURONS}),  # norms before both projections that write
        ("diffllama", {VALUES}),  # heads are subtracted and normalised
    ],
)
def test_joint_sites_are_accepted_by_numbers(name, kinds):
    assert kinds_refused(name) == kinds


def test_a_refusal_is_said_once_for_all_blocks_and_kept_by_the_run(tmp_path, tokenizer, text_file):
    tiny_model("bitnet").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = small_data(tmp_path / "model", text_file, trials=2)
    data["space"]["methods"] = ["vo-svd", "nystrom", "drop-block"]
    study = make_run(data, tmp_path / "run")
    setup = study.setup()
    assert len(setup.refused) == 4
    assert len(list(refusals(setup.refused))) == 2
    assert not setup.refused.keys() & {site.name for site in setup.outline.sites}
    assert {row.state for row in study.rows()} == {"complete"}


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.fused = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x):
        if self.training and x is not None:
            return self.fused.weight @ x
        return self.fused(self.called(x)) @ self.read.weight


class Ungraded(nn.Module):
    def __init__(self):
        super().__init__()
        self.called = nn.Linear(2, 2)

    @torch.no_grad()
    def forward(self, x):
        return self.called(x)


def test_what_code_reads_or_runs_without_gradients_is_told_from_what_it_calls():
    assert unlike_calls(Reads) == {"read"}
    assert "called" in unlike_calls(Ungraded)


def test_weights_of_several_blocks_are_one_site():
    model = tiny_model("zamba2")
    sites = {weight.path: weight for site in find_sites(model) for weight in site.weights}
    first = "model.layers.1.shared_transformer.feed_forward.down_proj"
    assert sites[first].shared == (first.replace("layers.1", "layers.2"),)
    assert not sites.keys() & set(sites[first].shared)


def test_towers_that_read_images_are_passed_over():
    """GIT's has more layers than its text model."""
    model = tiny_model("git")
    held = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    path, _ = blocks(model)
    assert path == "git.encoder.layer"
    assert any(own != path for own in held)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "falcon", "phi3", "codegen", "mpt", "qwen3_5_text"])
def test_fused_projections_are_cut_where_heads_are_and_put_back(name):
    """Numbers accept what is treated jointly then, but for gated values."""
    model = tiny_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = model(input_ids=WINDOWS).logits
    take_apart(model)
    torch.testing.assert_close(model(input_ids=WINDOWS).logits, wanted)
    sites = find_sites(model)
    values = {site.name for site in sites if site.roles == ("value", "output")}
    assert len(values) == len([site for site in sites if site.roles == ("query", "key", "value", "output")]) > 0
    assert set(refused(model, sites, WINDOWS)) == (values if name == "qwen3_5_text" else set())
    fuse(model)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())


def test_rounding_in_half_precision_refuses_nothing():
    model = tiny_model("llama").bfloat16()
    assert refused(model, find_sites(model), WINDOWS) == {}
    model = tiny_model("diffllama").bfloat16()
    assert {site.split(".", 3)[3] for site in refused(model, find_sites(model), WINDOWS)} == {VALUES}


def test_what_no_text_reaches_is_left_alone_and_said(tmp_path, tokenizer, text_file):
    """The cross-attention of a decoder without its encoder; the rest of the model is treated."""
    model = tiny_model("bart")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = small_data(tmp_path / "model", text_file, trials=2, anchors=[])
    data["space"]["methods"] = ["kfac-svd", "vo-svd", "drop-block"]
    console, study = quiet(), Study(data, tmp_path / "run")
    study.launch(console)
    assert {row.state for row in study.rows()} == {"complete"}
    outline = study.setup().outline
    assert not [site for site in outline.sites if "encoder_attn" in site.name]
    assert {each.why for each in outline.coverage.left} == {UNREACHED}
    crossed = [weight for name, weight in model.named_parameters() if "encoder_attn" in name and weight.ndim > 1]
    assert sum(each.values for each in outline.coverage.left) == sum(weight.numel() for weight in crossed) > 0
    assert outline.coverage.share < outline.coverage.reached_share == 1
    said = console.file.getvalue()
    assert "encoder_attn.k_proj.weight" in said
    assert "is not treated jointly" not in said


def test_what_is_reached_is_told_from_what_only_chooses():
    """An indexer runs, and has no gradient; the compressor beside it has; experts count whatever tokens they get."""
    model = tiny_model("deepseek_v4")
    take_apart(model)
    found = unreached(model, find_sites(model), WINDOWS)
    assert set(found.values()) == {UNFELT}
    assert all(".compressor.indexer." in name for name in found)


def test_text_reaches_through_embeddings_that_are_scaled_in_place():
    model = tiny_model("ctrl")
    assert unreached(model, find_sites(model), WINDOWS) == {}


@pytest.mark.parametrize("name", ["xlnet", "cpmant"])
def test_models_whose_tokens_see_those_after_them_are_refused(name):
    """Though transformers has them among its causal ones."""
    with pytest.raises(InputError, match=r"is not causal, for its logits at a token change"):
        check_causal(tiny_model(name))


def test_whether_a_model_is_causal_goes_by_tokens_that_are_no_padding():
    """XLM leaves out as many tokens at the end as there are padding ones."""
    model = tiny_model("xlm")
    check_causal(model)
    model.transformer.causal = False
    with pytest.raises(InputError, match="is not causal"):
        check_causal(model)


def test_a_model_that_is_not_causal_is_refused_before_its_text_is_sampled(tmp_path, tokenizer, text_file):
    tiny_model("xlnet").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = small_data(tmp_path / "model", text_file)
    for texts in ({}, {"search": {"text": "self", "windows": 4}}):
        study = Study(data | {"data": data["data"] | texts}, tmp_path / "run")
        data["space"]["allow_partial"] = True
        with pytest.raises(InputError, match="is not causal"):
            study.launch(quiet())


def test_a_model_that_lets_no_gradient_through_is_refused():
    model = tiny_model("reformer")
    with pytest.raises(InputError, match=r"lets no gradient through \(AssertionError: "):
        unreached(model, find_sites(model), WINDOWS)


@pytest.mark.parametrize(("name", "treated"), [("inkling_text", False), ("xglm", True), ("gemma3_text", True)])
def test_a_table_that_does_more_than_scale_its_rows_is_no_site(name, treated):
    model = tiny_model(name)
    paths = {path for site in find_sites(model) for weight in site.weights for path in weight.paths}
    table = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    assert (table in paths) == treated
