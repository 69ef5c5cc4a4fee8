"""The attention implementation that a study names: what the model runs by, or one line that says why not."""

import common
import pytest
import torch
from launching import small_data
from test_figures import JOINT, disjoint_plan

from rankfront.methods import InputError
from rankfront.search.inputs.model import use_attention
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.study import Study


def resident_with(attention, folder, text_file):
    data = small_data(folder, text_file)
    data["space"] = {"methods": JOINT, "keep": [0.4, 0.7], "rank_multiple": 2}
    data["model"]["attention"] = attention
    return JobRunner(Study(data).setup())


def test_a_study_runs_by_the_one_it_names(model_folder, text_file):
    """Joint treatments of attentions among its plans, whose results are the same by each."""
    said = {}
    for attention in (None, "sdpa", "eager"):
        resident = resident_with(attention, model_folder, text_file)
        assert resident.compressed.model.config._attn_implementation == (attention or "sdpa")
        resident.compressed.apply(disjoint_plan(resident, 5))
        with torch.inference_mode():
            said[attention] = resident.compressed.model(common.tokens(2, 9)).logits
    torch.testing.assert_close(said["eager"], said["sdpa"])
    assert torch.equal(said[None], said["sdpa"])


@pytest.mark.parametrize("attention", ["egaer", "flash_attention_2"])
def test_another_is_refused_in_one_line(attention, model_folder, text_file):
    data = small_data(model_folder, text_file)
    data["model"]["attention"] = attention
    with pytest.raises(InputError, match=f"model.attention is '{attention}'") as refused:
        make_space(Study(data).setup())
    assert "\n" not in str(refused.value)


def test_a_model_without_a_choice_is_refused(monkeypatch):
    model = common.architecture("llama").build()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(InputError, match="has no choice of"):
        use_attention(model, "eager")
