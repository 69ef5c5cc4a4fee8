"""Ordinary life in the Hugging Face world: what people do with models of transformers, done with factored exports.

Each test runs over two plans that mix the families of methods, and over both ways of opening a folder: by the classes
that are installed, and by the code that it carries, as ``trust_remote_code=True`` does without us.
"""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from common import plan_with, save_folder, tiny_tokenizer, tokens
from launching import small_data
from torch.utils.data import Dataset
from transformers import GenerationConfig, StaticCache, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import write_factored
from rankfront.search.study import Study

pytestmark = pytest.mark.filterwarnings(  # of libraries, about each other
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:While compiling, we found:UserWarning"
)
IDS = tokens(2, 24, seed=3)
PLANS = {  # architecture -> methods, a site each
    "llama": (
        "rtn-int8", "rtn-int4", "lama", "vo-svd", "nystrom", "oats", "svd-llm", "lqer-int4", "sltrain", "dsformer",
        "tucker", "wara-ordered",
    ),
    "llama-tied": ("rtn-int8", "shared-basis", "drop-block", "svd-llm", "rocket", "svd-llm-int8", "rtn-int4"),
}  # fmt: skip


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


def test_trl_trains_factors_on_a_text(worlds, tmp_path):
    """It computes the loss from the weight of the head, which is dense here."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    world = worlds("llama")
    world.run("halves gone")
    write_factored(world.compressed, tmp_path / "small")
    model = load("installed", tmp_path / "small", "AutoModelForCausalLM")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, max_length=32,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    lines = datasets.Dataset.from_list([{"text": "the people of the house"}] * 16)
    sft = trl.SFTTrainer(model, settings, train_dataset=lines, processing_class=tiny_tokenizer())
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    sft.save_model(str(tmp_path / "out"))
    check_same(load("installed", tmp_path / "out", "AutoModelForCausalLM"), logits(model.eval()), 1e-5)


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
    treated = next(path for path in model.config.rankfront["modules"] if path.endswith("layers.0.self_attn.q_proj"))
    with pytest.raises(ValueError, match=r"a place for an adapter|AbsentLinear"):
        peft.get_peft_model(export.open(), lora(peft, target_modules=[treated]))


def test_adapters_of_which_some_cannot_merge_are_refused_before_any_has(export, peft):
    whole = peft.get_peft_model(export.open(), lora(peft, target_modules=places(export.open())))
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for merge in (whole.merge_and_unload, whole.merge_adapter):
        with pytest.raises(ValueError, match=r"'model.layers.*keep it beside, or .*dequantize\(\)"):
            merge()
        after = whole.state_dict()
        assert after.keys() == before.keys()
        assert all(tensor.equal(before[name]) for name, tensor in after.items())
    whole.to("cpu").get_base_model().to("cpu")
    assert whole.unload().dequantize()


# -- generating, with every cache


def test_every_cache_gives_the_same_text(export):
    """One that was allocated before for whole heads too, as recipes for export to devices do."""
    model = export.open().eval()
    expected = written(model, use_cache=False)
    config = model.config
    sizes = {"num_heads": config.num_key_value_heads, "head_dim": config.hidden_size // config.num_attention_heads}
    allocated = StaticCache(config=config, max_cache_len=32)
    allocated.early_initialization(batch_size=2, dtype=torch.float32, device="cpu", **sizes)
    caches = [{"past_key_values": allocated}, {"past_key_values": StaticCache(config=config, max_cache_len=32)}]
    caches += [{"cache_implementation": kind} for kind in ("dynamic", "static", "sliding_window")]
    for settings in ({}, *caches):
        assert torch.equal(written(model, **settings), expected), settings
    assert torch.equal(written(model, num_beams=2), written(model, num_beams=2, use_cache=False))
    short = {"input_ids": IDS[:1, :8], "max_new_tokens": 10, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(**short, prompt_lookup_num_tokens=3), expected[:1])


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_caches_that_want_more_than_torch_on_a_cpu(kind, folders):
    settings = {}
    if kind == "quantized":  # in groups that fit what thin heads leave of a token
        pytest.importorskip("hqq")
        settings = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 4}
    elif not torch.cuda.is_available():
        pytest.skip("offloaded caches need a GPU")
    folder, _ = folders["llama"]
    model = load("installed", folder, "AutoModelForCausalLM").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found = written(model, cache_implementation=kind, cache_config=settings or None)
    assert torch.equal(found.cpu(), written(model).cpu())


# -- number formats, copies, files, devices


def apart(found, expected):
    return (found.float() - expected).norm() / expected.norm()


def test_it_is_converted(export):
    model = export.open()
    for convert in ("half", "bfloat16", "float", "double"):
        found = logits(getattr(model, convert)())
        assert found.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(
            convert, torch.float32
        )
        assert apart(found, export.expected) < 0.05, convert
    narrow = export.open(dtype=torch.bfloat16)
    assert {each.dtype for each in narrow.parameters()} == {torch.bfloat16}
    assert apart(logits(narrow), export.expected) < 0.05


def test_it_is_saved_in_shards_and_put_on_devices(export, tmp_path):
    """Or left on a disk, from where every layer fetches its own tensors when it runs."""
    model = export.open()
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (export.folder, tmp_path / "shards"):
        for devices in (None, "auto", {"": "cpu"}):
            check_same(export.open(folder, device_map=devices), export.expected)
    on_disk = {"device_map": "auto", "max_memory": {"cpu": 30_000}, "offload_folder": str(tmp_path / "disk")}
    offloaded = export.open(**on_disk)
    assert "disk" in offloaded.hf_device_map.values()
    check_same(offloaded, export.expected)
    with pytest.raises(ValueError, match="offloaded"):
        offloaded.dequantize()


def test_copies_are_the_same_and_their_own(export):
    model = export.open()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(copied, export.expected)
        torch.nn.init.zeros_(next(copied.parameters()))
        check_same(model, export.expected)


UNPICKLED = {  # model -> the configuration of its class, where several types have it or a part of it
    "StableLmForCausalLM": "StableLmConfig",
    "StableLmModel": "StableLmConfig",
    "Emu3ForCausalLM": "Emu3TextConfig",
    "Llama4ForCausalLM": "Llama4TextConfig",
    "GPT2LMHeadModel": "GPT2Config",
}


def test_unpickling_finds_the_classes_of_models_that_were_not_loaded():
    for names in UNPICKLED.items():
        lines = (f"crankfront.methods.checkpoint\nRankfront{name}\n." for name in names)
        model, config = (pickle.loads(line.encode()) for line in lines)
        assert model.config_class is config
        assert config.__name__ == f"Rankfront{names[1]}"


def test_a_model_of_the_configuration_alone_runs(export):
    """Its values are drawn."""
    model = export.open()
    assert logits(type(model)(model.config)).isfinite().all()


# -- graphs


@pytest.mark.parametrize("way", ["installed"], indirect=True)
def test_it_is_exported_by_torch(export):
    """Strictly: the whole text at once, and where heads are thinner token by token, with a static cache."""
    model = export.open().eval()
    if export.name == "llama-tied":
        graph = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=True)
        torch.testing.assert_close(graph.module()(input_ids=IDS, use_cache=False).logits, export.expected)
        return
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 32}
    )
    one = {"input_ids": IDS[:1, :1], "cache_position": torch.tensor([0])}
    step = torch.export.export(TorchExportableModuleWithStaticCache(model), (), one, strict=True).module()
    for place in range(4):
        found = step(input_ids=IDS[:1, place : place + 1], cache_position=torch.tensor([place]))
    torch.testing.assert_close(found[:, -1], export.expected[:1, 3], rtol=1e-4, atol=1e-4)


def test_products_are_written_as_onnx(worlds, tmp_path):
    """Low ranks, heads, smaller MLPs; what unpacks bits has no form there."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    world = worlds("llama")
    world.run("halves gone")
    write_factored(world.compressed, tmp_path / "small")
    model = load("installed", tmp_path / "small", "AutoModelForCausalLM").eval()
    torch.onnx.export(
        model, (), str(tmp_path / "model.onnx"), kwargs={"input_ids": IDS, "use_cache": False}, dynamo=True
    )
    found = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"input_ids": IDS.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(model), rtol=1e-3, atol=1e-3)


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


# -- lm-eval

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_opens_the_folder_by_its_path(folders, tmp_path):
    """A task of its own, without a hub."""
    lm_eval = pytest.importorskip("lm_eval")
    folder, _ = folders["llama"]
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"question": "the people", "choices": [" of", " zq"], "answer": 0}] * 2
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "data.json"), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "device": "cpu"},
        tasks=["words"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["words"]["acc,none"] <= 1
