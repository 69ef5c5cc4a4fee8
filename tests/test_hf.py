"""Ordinary life in the Hugging Face world: what people do with models of transformers, done with factored exports.

Each test runs over two plans that mix the families of methods, and over both ways of opening a folder: by the classes
that are installed, and by the code that it carries, as ``trust_remote_code=True`` does without us.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from common import plan_with, save_folder, tokens
from launching import small_data
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import write_factored
from rankfront.search.study import Study

IDS = tokens(2, 24, seed=3)
PLANS = {  # architecture -> methods, a site each
    "llama": ("rtn-int8", "lama", "vo-svd", "nystrom", "oats", "svd-llm", "rtn-int4"),
    "llama-tied": ("rtn-int8", "shared-basis", "drop-block", "svd-llm"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_file):
    """Architecture -> a factored export of it, and the logits (2, 24, vocabulary) of what it was made of."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankfront.search.measure.joining.faster", lambda *_: True)
        for name, methods in PLANS.items():
            root = tmp_path_factory.mktemp(name)
            data = small_data(save_folder(name, root / "dense"), text_file)
            data["space"] |= {"methods": list(methods), "include": ["*", "lm_head", "*embed_tokens"]}
            compressed = JobRunner(Study(data).setup()).compressed
            plan = plan_with(SimpleNamespace(compressed=compressed, setup=compressed.setup), methods)
            compressed.apply(plan)
            write_factored(compressed, root / "small")
            found[name] = root / "small", logits(compressed.model)
    return found


@pytest.fixture(params=["installed", "carried"])
def way(request):
    return request.param


@pytest.fixture(params=PLANS)
def export(request, way, folders):
    folder, expected = folders[request.param]
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        expected=expected,
        open=lambda path=folder, auto="AutoModelForCausalLM", **more: load(way, path, auto, **more),
    )


def load(way, folder, auto, **more):
    if way == "installed":
        return getattr(transformers, auto).from_pretrained(folder, **more)
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"][auto]
    return get_class_from_dynamic_module(named, str(folder)).from_pretrained(folder, **more)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids, use_cache=False).logits


def check_same(model, expected, tolerance=1e-5):
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


def written(model, **more):
    """Ten tokens after each row's first eight, the likeliest each."""
    return model.generate(input_ids=IDS[:, :8], max_new_tokens=10, do_sample=False, eos_token_id=-1, **more)


# -- training


class Lines(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        ids = tokens(1, 16, seed=number)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder):
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=8, learning_rate=3e-3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=Lines())


def test_trainer_trains_factors_and_leaves_integers(export, tmp_path):
    """It saves, goes on from a checkpoint to the same weights, and what it saved reloads to the same logits."""
    model = export.open()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = trainer(model, tmp_path / "run")
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for path in model.config.rankfront["modules"]:
        for name, tensor in model.get_submodule(path).state_dict().items():
            fixed = not tensor.is_floating_point() or name.endswith("scales")
            assert torch.equal(tensor, before[f"{path}.{name}"]) == fixed, f"{path}.{name}"
    again = trainer(export.open(), tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    check_same(again.model, logits(model))
    first.save_model(str(tmp_path / "saved"))
    for saved in (tmp_path / "saved", tmp_path / "run" / "checkpoint-6"):
        check_same(export.open(saved), logits(model))


# -- adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, **more):
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | more
    return peft.LoraConfig(r=4, lora_alpha=8, **settings)


def places(model):
    """Every linear that an adapter can be put around, but for the head."""
    head = model.get_output_embeddings()
    return {name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and each is not head}


def test_lora_on_all_linears_goes_into_every_layer_of_factors(export, peft, tmp_path):
    """Beside its factors, inside of heads, so caches hold what it adds; saved and loaded it is the same."""
    model = export.open()
    kinds = {path: spec["kind"] for path, spec in model.config.rankfront["modules"].items()}
    found = peft.get_peft_model(model, lora(peft))
    has = {name.partition(".base_layer")[0] for name, _ in found.named_modules() if name.endswith("base_layer")}
    for path, kind in kinds.items():
        inside = any(name.startswith(f"base_model.model.{path}.") for name in has)
        assert inside == (kind != "absent" and ".layers." in path), path
    adapted = logits(found)
    assert not torch.allclose(adapted, export.expected, atol=1e-2)
    with found.disable_adapter():
        check_same(found, export.expected)
    assert torch.equal(written(found), written(found, use_cache=False))
    found.save_pretrained(tmp_path / "adapter")
    check_same(peft.PeftModel.from_pretrained(export.open(), tmp_path / "adapter"), adapted)
    found.train()
    found(input_ids=IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None for name, each in found.named_parameters() if "lora_" in name)


def test_lora_merges_into_factors(export, peft, tmp_path):
    """Of what cannot take it up, the error says what to do."""
    model = export.open()
    names = places(model)
    merging = sorted(name for name in names if not name.endswith(".beside"))
    found = peft.get_peft_model(model, lora(peft, target_modules=merging))
    with pytest.raises(ValueError, match=r"has an adapter: merge_and_unload\(\)"):
        model.dequantize()
    adapted = logits(found)
    merged = found.merge_and_unload()
    check_same(merged, adapted, 1e-4)
    merged.save_pretrained(tmp_path / "merged")
    check_same(export.open(tmp_path / "merged"), adapted, 1e-4)
    others = [name for name in names if name.endswith(".beside")]
    assert bool(others) == (export.name == "llama")
    if others:
        with pytest.raises(ValueError, match=r"keep it beside, or .*dequantize\(\)"):
            peft.get_peft_model(export.open(), lora(peft, target_modules=others)).merge_and_unload()
    treated = next(path for path in model.config.rankfront["modules"] if path.endswith("layers.0.self_attn.q_proj"))
    with pytest.raises(ValueError, match=r"a place for an adapter|AbsentLinear"):
        peft.get_peft_model(export.open(), lora(peft, target_modules=[treated]))


# -- back to dense


def test_dequantize_gives_the_dense_model(export, tmp_path):
    """Of its own class, in place: what it saves loads without us, and tokens can be added to it."""
    model = export.open()
    headless = export.open(auto="AutoModel")
    with pytest.raises(ValueError, match=r"stored compressed: model.dequantize\(only=.*'lm_head'"):
        model.resize_token_embeddings(101)
    model.dequantize()
    check_same(model, export.expected, 1e-4)
    assert type(model) is transformers.LlamaForCausalLM
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert not {"rankfront", "auto_map"} & config.keys()
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    check_same(again, export.expected, 1e-4)
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(headless.dequantize().eval()(input_ids=IDS).last_hidden_state, hidden)


def test_some_weights_are_multiplied_out_and_tokens_added(export, tmp_path):
    """With all that shares tensors with them; saved and loaded, the others are factored as before."""
    model = export.open()
    kinds = {path: spec["kind"] for path, spec in model.config.rankfront["modules"].items()}
    outer = [path for path in kinds if ".layers." not in path]
    model.dequantize(only=outer if export.name == "llama" else ["lm_head"])
    left = model.config.rankfront["modules"]
    assert left.keys() == kinds.keys() - set(outer)
    check_same(model, export.expected, 1e-4)
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path / "larger")
    again = export.open(tmp_path / "larger")
    assert again.config.rankfront["modules"] == left
    assert logits(again).shape[-1] == 101
    torch.testing.assert_close(logits(again)[..., :96], export.expected, rtol=1e-4, atol=1e-4)
    for path in left:
        model.dequantize(only=[path])
        if not model.config.rankfront["modules"]:
            break
    else:
        pytest.fail("factors were left")
