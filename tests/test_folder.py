"""What a factored export is to those who have nothing of ours: it runs right, or it says in a sentence what to do."""

import ast
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from common import plan_with, save_folder, tokens
from launching import measured, small_data, tree, verify_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rankfront.methods import InputError, whole_name
from rankfront.methods.folder_code import Base, folder_code
from rankfront.methods.layers import RENAMED, layers
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export
from rankfront.search.study import Study

IDS = tokens(2, 24, seed=3)
SINGLE = (
    "rtn-int8", "rtn-int4", "lqer-int4", "svd-llm-int8", "rocket", "dsformer", "oats", "sltrain", "cp", "tensor-train",
    "tensor-ring", "tucker", "block-term", "wara-db2", "wara-ordered", "svd-llm",
)  # fmt: skip
FOLDERS = {  # name of a folder -> architecture, and the methods that its plan has, a site each
    "single": ("llama", SINGLE),
    "joint": ("llama", ("lama", "vo-svd", "nystrom", "drop-block")),
    "tied": ("llama-tied", ("rtn-int8", "shared-basis", "kronecker")),
    "conv": ("gpt2", ("svd", "rtn-int4", "tucker", "oats")),
    "hola": ("qwen2", ("svd", "hola", "vo-svd")),
    "bits": ("llama", ("svd-int4", "sltrain-int8", "cospadi-int4", "lama-int8", "vo-svd-int4", "nystrom-int8")),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, text_file):
    """Name -> an export of that name, and the logits (2, 24, vocabulary) of the model that it was made of."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankfront.search.measure.joining.faster", lambda *_: True)
        verify_here(patch)
        root = tmp_path_factory.mktemp("exports")
        for name, (architecture, methods) in FOLDERS.items():
            data = small_data(save_folder(architecture, root / f"{name} model"), text_file)
            bits = [16, 8, 4] if name == "bits" else [16]
            whole = list(dict.fromkeys(map(whole_name, methods)))
            data["space"] |= {"methods": whole, "bits": bits, "include": ["*", "lm_head", "*embed_tokens", "*wte"]}
            resident = JobRunner(Study(data).setup())
            plan = plan_with(resident, methods)
            row = measured(resident, plan)
            export(resident.setup, row, root / name, "factored")
            with torch.no_grad():
                found[name] = root / name, resident.compressed.model(input_ids=IDS, use_cache=False).logits
    return found


def kinds(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {spec["kind"] for spec in config["rankfront"]["modules"].values()}


def test_the_folders_hold_every_kind_of_layer(exports):
    """But the one that healing alone makes, and that of mixtures, of which test_experts has folders."""
    others = {"low-rank-adapted", "router", *RENAMED}
    assert set().union(*(kinds(folder) for folder, _ in exports.values())) == layers().keys() - others


# -- without us


OTHERS = list(filter(None, os.environ.get("RANKFRONT_OTHER_PYTHONS", "").split(os.pathsep)))


@pytest.fixture(
    scope="module",
    params=[sys.executable, *(OTHERS or [None])],
    ids=lambda python: python.split(os.sep)[-3] if python in OTHERS else "this" if python else "others",
)
def outside(request, exports, tmp_path_factory):
    """What a process without rankfront made of the exports, and the folder that it wrote to.

    In this environment, and by each interpreter that ``RANKFRONT_OTHER_PYTHONS`` names, as in a ``PATH``: those of
    environments with torch and another transformers.
    """
    if request.param is None:
        pytest.skip("RANKFRONT_OTHER_PYTHONS names no interpreter of another environment")
    work = tmp_path_factory.mktemp("outside")
    save_file({"ids": IDS}, work / "ids.safetensors")
    command = [request.param, str(Path(__file__).parent / "outsider.py"), str(work)]
    environment = os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, *(str(folder) for folder, _ in exports.values())],
        capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work / "found.json").read_text(encoding="utf-8")), work


def test_it_runs_right_for_whoever_trusts_its_code(outside, exports):
    """By every automatic class, as a pipeline, as lm-eval opens it, saved again, and by a link."""
    found, work = outside
    assert found["ours"] == []
    for name, (_, expected) in exports.items():
        said, tensors = found[name], load_file(work / f"{name}.safetensors")
        assert said["info"] == {}, name
        for way in {"logits", "again", "linked", "placed"} & tensors.keys():
            torch.testing.assert_close(tensors[way], expected, rtol=1e-4, atol=1e-4, msg=f"{name} {way}")
        assert torch.equal(tensors["hidden"], tensors["inner"]), name
        assert said["class"].startswith("Rankfront")
        assert said["headless"].startswith("Rankfront")
        assert tensors["generated"].shape == (1, 10)
        assert said["said"].startswith("the people")
        assert said["plain tokenizer"]
        assert (said["dtype"], said["half"]) == ("torch.bfloat16", "torch.float16")
        assert {"config.json", "modeling_rankfront.py", "model.safetensors"} <= set(said["files"])


def test_it_is_refused_with_what_to_do_by_whoever_does_not(outside, exports):
    found, _ = outside
    for name in exports:
        assert all("trust_remote_code=True" in refusal for refusal in found[name]["refused"]), found[name]["refused"]


def test_a_tensor_that_is_missing_is_named(outside, exports):
    found, _ = outside
    for name in exports:
        assert found[name]["missing"] in found[name]["spoiled"]
        assert "restore its files" in found[name]["spoiled"]


# -- with us


@torch.no_grad()
def check_same(model, expected):
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_with_rankfront_it_needs_no_trust(exports, name, tmp_path):
    """And runs the code that is installed, trusted or not; what it saves loads as well, with the code beside."""
    folder, expected = exports[name]
    code = (folder / "modeling_rankfront.py").read_text(encoding="utf-8")
    for trusted in ({}, {"trust_remote_code": True}):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trusted)
        assert not any(info.values())
        check_same(model, expected)
        assert type(model).__module__.startswith("rankfront.")
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    inner = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = [each(input_ids=IDS, use_cache=False).last_hidden_state for each in (inner, model.base_model)]
    assert torch.equal(*hidden)
    untrained = AutoModelForCausalLM.from_config(model.config)
    assert {name: each.shape for name, each in untrained.named_parameters()} == {
        name: each.shape for name, each in model.named_parameters()
    }
    assert all(parameter.isfinite().all() for parameter in untrained.parameters())
    model.save_pretrained(tmp_path / "again")
    before, after = (
        json.loads((each / "config.json").read_text(encoding="utf-8")) for each in (folder, tmp_path / "again")
    )
    assert after == before
    assert (tmp_path / "again" / "modeling_rankfront.py").read_text(encoding="utf-8") == code
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)
    check_same(pickle.loads(pickle.dumps(model)), expected)
    check_same(copy.deepcopy(model), expected)


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"conv"}))  # GPT-2 was not taken apart then
def test_exports_of_the_format_before_load_as_they_did(exports, name, tmp_path):
    """A quantiser made the layers, and the folder had no code."""
    folder, expected = exports[name]
    older = as_format_2(folder, tmp_path / "older")
    loaded = AutoModelForCausalLM.from_pretrained(older)
    check_same(loaded, expected)
    loaded.save_pretrained(tmp_path / "again")
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)
    assert AutoModel.from_pretrained(older).eval()(input_ids=IDS).last_hidden_state.isfinite().all()


def as_format_2(folder, to):
    shutil.copytree(folder, to)
    (to / "modeling_rankfront.py").unlink()
    file = to / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["auto_map"]
    described = config.pop("rankfront")
    config["model_type"] = described.pop("base")
    config["architectures"] = [config["architectures"][0].removeprefix("Rankfront")]
    config["quantization_config"] = described | {"quant_method": "rankfront", "version": 2}
    file.write_text(json.dumps(config), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 5}, "format version=5, this code reads 4: upgrade rankfront"),
        ({"version": "3"}, "export it again"),
        ({"base": "nonsuch"}, "'nonsuch', of which this transformers has no causal language model: upgrade"),
        ({"base": None}, "upgrade transformers"),
        ({"modules": []}, "no such 'modules'"),
    ],
    ids=str,
)
def test_what_it_says_of_itself_is_checked(exports, change, said, tmp_path):
    shutil.copytree(exports["conv"][0], tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["rankfront"] |= change
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(exports, tmp_path):
    folder, marker = shutil.copytree(exports["conv"][0], tmp_path / "out"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touching(marker)))
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not marker.exists()


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# -- the code


def code_of(*kinds):
    base = Base("llama", transformers.LlamaConfig, transformers.LlamaForCausalLM, transformers.LlamaModel)
    return folder_code(base, {kind: {"kind": kind} for kind in kinds})


def test_the_code_imports_what_comes_with_torch_and_transformers():
    """And no two files of it use one name for two things, or it would not be made."""
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy"}
    imported = set()
    for node in ast.walk(ast.parse(code_of(*layers()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported <= allowed
    assert "class Network" not in code_of("low-rank")


def test_a_transformers_that_is_too_old_is_told_so(monkeypatch):
    code = compile(code_of("low-rank"), "modeling_rankfront.py", "exec")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.3"))
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or newer and 4\.57\.3 is installed: pip install"):
        exec(code, {})


# -- the card


@pytest.mark.parametrize("name", FOLDERS)
def test_every_weight_is_rebuilt_from_the_card_alone(exports, name):
    """Its tables and its Python, torch and safetensors; against what the loaded layers say."""
    folder, _ = exports[name]
    rebuilt = weights_by_card(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert rebuilt.keys() == model.config.rankfront["modules"].keys()
    for path, weight in rebuilt.items():
        expected = model.get_submodule(path).matrix()
        rows, columns = expected.shape
        torch.testing.assert_close(weight[:rows, :columns], expected, rtol=1e-4, atol=1e-5, msg=path)
        assert not weight[rows:].any()
        assert not weight[:, columns:].any()


def weights_by_card(folder):
    """Path -> W (m, n), by the card."""
    card = (folder / "README.md").read_text(encoding="utf-8").partition("## Tensors\n")[2]
    tensors = load_file(folder / "model.safetensors")
    functions = {}
    exec(card.partition("```python\n")[2].partition("```")[0] or "import torch", functions)
    rows = [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in card.splitlines() if "|" in line]
    formulas = {row[0]: row[1] for row in rows if row[0].isdigit()}
    tensors |= {row[0]: tensors[row[1]] for row in rows if row[1] in tensors}
    found = {}
    for row in (row for row in rows if len(row) > 2 and row[-1] in formulas):
        path, m, n = row[0], *map(int, row[2].split(" x "))
        settings = dict(pair.split("=") for pair in row[4].split(", ") if pair)
        names = {name: ast.literal_eval(value) for name, value in settings.items()} | {"m": m, "n": n}
        for name, tensor in tensors.items():
            if name.startswith(f"{path}."):
                own, _, part = name.removeprefix(f"{path}.").partition(".")
                if part:
                    setattr(names.setdefault(own, SimpleNamespace()), part, tensor)
                else:
                    names[own] = tensor
        found[path] = eval(formulas[row[-1]], functions | names)
    return found


def test_the_card_has_a_header_and_no_path_of_this_machine(exports):
    for name, (folder, _) in exports.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(card.split("---\n")[1])
        assert header["base_model"] == f"{name} model"
        assert header["library_name"] == "transformers"
        assert header["license"]
        assert "trust_remote_code=True" in card
        assert "import rankfront.methods" in card
        held = tree(folder)
        assert {"plan.json", "config.json", "modeling_rankfront.py", "tokenizer_config.json"} <= held.keys()
        assert not [file for file, content in held.items() if str(folder.parent.parent).encode() in content]
