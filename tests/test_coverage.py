"""How much of a model a search can treat: all of it, or said, weight by weight; and refused where it is little."""

import common
import pytest
import torch
from launching import again, make_run, quiet, small_data
from tiny import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.config import SpaceConfig
from rankfront.search.inputs import apart
from rankfront.search.inputs.coverage import coverage_of
from rankfront.search.inputs.sites import find_sites, is_linear, is_plain
from rankfront.search.study import Study

EXPERTS = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": common.VOCABULARY, "decoder_sparse_step": 1,
}  # fmt: skip


def covered(model):
    return coverage_of(model, find_sites(model))


def test_every_weight_of_the_blocks_is_a_site_or_left_for_a_reason(model):
    """Matrices are counted one by one: of each architecture, what is no linear layer is named."""
    found = covered(model)
    sites = {id(model.get_submodule(weight.path).weight) for site in find_sites(model) for weight in site.weights}
    prefix = next(site.name for site, place in find_sites(model).items() if place.block == 0).split(".0.")[0]
    matrices = {
        id(parameter): parameter.numel()
        for name, parameter in model.get_submodule(prefix).named_parameters()
        if parameter.ndim > 1
    }
    assert found.values == sum(matrices.values())
    assert sum(left.values for left in found.left) == sum(n for key, n in matrices.items() if key not in sites)
    assert (found.share == 1) == (list(found.lines()) == [])
    found.check(SpaceConfig())


@pytest.fixture
def experts(tmp_path, tokenizer):
    """A folder of a mixture of experts, whose experts are one tensor a layer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **EXPERTS)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_experts_that_cannot_be_taken_apart_are_searched_around_only_where_that_is_allowed(
    experts, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(apart, "how_apart", lambda module: None)
    data = small_data(experts, text_file, trials=3)
    with pytest.raises(
        InputError, match=r"only \d+\.\d% of the blocks' weights .* mlp\.experts\.gate_up_proj \(one tensor"
    ):
        Study(data, tmp_path / "run").launch(quiet())
    assert not (tmp_path / "run" / "study.json").exists()
    data["space"]["allow_partial"] = True
    study, console = make_run(data, tmp_path / "run"), quiet()
    again(study, trials=4).launch(console)
    said = console.file.getvalue()
    assert "of the blocks' weights can be treated; the rest stays dense:" in said
    assert "mlp.experts.down_proj" in said
    check_block_parameters(study, AutoModelForCausalLM.from_pretrained(experts))


def check_block_parameters(study, model):
    """They are of all matrices of the blocks, experts too: what a trial saves there is saved of all of them."""
    whole = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim > 1)
    for row in study.rows():
        saved = model.num_parameters() - row.figure("parameter_count")
        assert row.figure("block_parameter_count") == whole - saved
        assert row.figure("block_parameters") == (whole - saved) / whole


def test_linears_that_are_not_plain_are_named():
    model = next(row for row in common.ARCHITECTURES if row.name == "llama").build()
    block = model.model.layers[0]

    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block.mlp.up_proj.__class__ = Odd
    block.mlp.down_proj.forward = block.mlp.down_proj.forward
    found = covered(model)
    assert {left.name: left.why for left in found.left} == {
        "mlp.up_proj.weight": "of class Odd, which is no plain linear",
        "mlp.down_proj.weight": "a linear with a forward of its own",
    }


# -- what is not made of plain linears and a cache of keys and values

OTHERS = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "jamba": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False,
    },
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=common.VOCABULARY, **OTHERS[name]))


def test_what_code_reads_itself_is_no_site():
    """Factors would never be called there."""
    found = covered(built("jamba"))
    assert {left.name for left in found.left if left.why == "read by other code than its own"} == {
        "mamba.dt_proj.weight"
    }


@pytest.mark.parametrize("name", ["mamba", "falcon"])
def test_state_spaces_and_linears_of_other_classes_go_from_study_to_export(
    name, tokenizer, text_file, tmp_path, verified_here
):
    """Their own text is sampled with the cache that they have."""
    built(name).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    data = small_data(tmp_path / name, text_file, trials=3)
    data["data"]["search"] = {"text": "self", "windows": 4}
    data["objectives"] |= {"kv_bytes": {}}
    study = make_run(data, tmp_path / "run")
    assert {row.state for row in study.rows()} == {"complete"}
    assert (study.front()[0].values["kv_bytes"] == 0) == (name == "mamba")
    study.export(tmp_path / "small", next(row for row in study.rows() if row.plan.choices))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_subclass_of_a_linear_is_known_by_what_it_gives():
    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Sized(nn.Linear):
        def __init__(self, size):
            super().__init__(size, size)

    assert [is_plain(kind) for kind in (nn.Linear, Same, Doubled, Sized, nn.Conv1d)] == [
        True,
        True,
        False,
        False,
        False,
    ]


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("bert", SMALL, "an encoder, whose tokens see those after them"),
        ("t5", {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}, "an encoder and a decoder"),
        ("vit", SMALL, "no language model that predicts the next token"),
    ],
)
def test_what_is_no_causal_language_model_is_said_to_be_none(name, sizes, said, tmp_path, text_file):
    AutoModel.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=rf"is {said} \({name}\): rankfront takes causal language models") as caught:
        Study(small_data(tmp_path / name, text_file), tmp_path / "run").launch(quiet())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "beside"), [("hrm_text", "model.H_module.layers"), ("xlm", "transformer.attentions")])
def test_blocks_of_another_list_are_sites(name, beside):
    """HRM has two stacks, XLM its attentions beside its neurons: weights of both are treated, each once."""
    model = tiny_model(name)
    assert covered(model).share == 1
    found = {site.name: place for site, place in find_sites(model).items() if site.name.startswith(beside)}
    linears = {path for path, module in model.named_modules() if path.startswith(beside) and is_linear(module)}
    assert found.keys() == linears
    assert all(place.kind.startswith(beside) for place in found.values())
