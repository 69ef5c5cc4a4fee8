"""Models whose weights have no room: they stay in files, and what a process holds of them is little."""

import ctypes
import multiprocessing
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import common
import launching
import pytest
import torch
from forking import IMPORTED
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from rankfront.methods import InputError
from rankfront.search.config import make_config, overridden
from rankfront.search.inputs import memory
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.resolve import resolve
from rankfront.search.measure import footprint
from rankfront.search.measure.runner import JobRunner
from rankfront.search.study import Study

BLOCKS = 20
M_MMAP_THRESHOLD = -3  # of <malloc.h>
OPTION = {"methods": ["svd-llm"], "keep": [0.5], "exclude": ["*.down_proj"], "allow_partial": True}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A Llama of 126 MB in fp32: wide, so that factoring it takes little."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=common.tiny_tokenizer().vocab_size, hidden_size=128, intermediate_size=4096,
        num_hidden_layers=BLOCKS, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    common.tiny_tokenizer().save_pretrained(folder)
    return folder


class Anonymous:
    """Bytes that this process holds beside what it has mapped from files: the most, since it began."""

    def __init__(self):
        self.start = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def now(self):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch(self):
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    @property
    def grown(self):
        return self.peak - self.start


def study_and_export(folder, text, home):
    """Bytes that a study of a model without room and an export of it take, and perplexities of the trial and of it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(memory, "AMPLE", 0.0)
    patch.setenv("RANKFRONT_CACHE", str(home / "cache"))
    launching.verify_here(patch)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)  # what is freed is given back, and not counted
    data = common.study_data(folder, text)
    data["data"]["control"] = {"text": str(text), "windows": 4}
    data["space"] = OPTION
    data["search"] |= {"sampler": "random", "trials": 2}
    with Anonymous() as held:
        study = Study(data, home / "run")
        study.launch(launching.quiet())
        found = study.export(home / "out", study.trial(1))
    return held.grown, study.trial(1).values["perplexity"], found.perplexity


def test_a_study_and_an_export_hold_little_of_a_model_that_has_no_room(wide_folder, text_file, tmp_path):
    """Calibration, factors, a trial, the report, the export and its reload, in a process of its own."""
    weights = sum(file.stat().st_size for file in wide_folder.glob("*.safetensors"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        grown, measured, exported = pool.submit(study_and_export, wide_folder, text_file, tmp_path).result()
    assert grown < 0.75 * weights, f"{grown / 1e6:.0f} of {weights / 1e6:.0f} MB"
    assert exported == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe"])
def test_weights_in_another_dtype_are_mapped_from_a_copy_and_the_same(name, tmp_path, monkeypatch):
    """Also where the model keeps some in a dtype of its own, as mixtures do."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    tiny_model(name).save_pretrained(tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    held = load_model(source, torch.bfloat16, "cpu")
    monkeypatch.setattr(memory, "AMPLE", 0.0)
    mapped = load_model(source, torch.bfloat16, "cpu")
    assert held.state_dict().keys() == mapped.state_dict().keys()
    for key, tensor in held.state_dict().items():
        assert tensor.dtype == mapped.state_dict()[key].dtype
        assert torch.equal(tensor, mapped.state_dict()[key]), key
    (folder,) = (tmp_path / "cache").glob("weights-*-bfloat16")
    assert not is_held(mapped.get_input_embeddings().weight)
    assert is_held(held.get_input_embeddings().weight)
    assert load_model(source, torch.float32, "cpu").dtype == torch.float32  # as it is
    assert len(list((tmp_path / "cache").glob("weights-*.lock"))) == 1
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"which .* was unpacked or converted to, is damaged"):
        load_model(source, torch.bfloat16, "cpu")


def is_held(tensor):
    """Whether the memory of ``tensor`` is this process's own, and not a file's."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return inode == "0"
    raise AssertionError("no part of the process")


def test_a_plan_runs_from_mapped_factors_as_from_copies(setup, monkeypatch):
    resident = JobRunner(setup)
    monkeypatch.setattr(memory, "AMPLE", 0.0)
    lean = JobRunner(setup)
    plan = common.random_plan(resident, 3)
    logits = []
    for each in (resident, lean):
        each.compressed.apply(plan)
        with torch.no_grad():
            logits.append(each.compressed.model(input_ids=setup.tokens["search"]).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for modules, owned in ((resident.compressed.modules, True), (lean.compressed.modules, False)):
        tensors = [tensor for module in modules.values() for tensor in (module.left, module.right)]
        assert {is_held(tensor) for tensor in tensors} == {owned}


def test_a_launch_says_what_it_takes_and_is_refused_where_that_is_not_there(
    model_folder, text_file, tmp_path, monkeypatch
):
    study, console = Study(launching.small_data(model_folder, text_file, trials=1), tmp_path / "run"), launching.quiet()
    with monkeypatch.context() as patch:
        patch.setattr(footprint, "free_bytes", lambda device: 10_000_000)
        with pytest.raises(InputError, match=r"takes about \d+ MB of memory and cpu has 10 MB free: "):
            study.launch(console)
    assert not study.run.resolved()
    study.launch(console)
    assert re.search(r"about \d+ MB of memory of .* free, most of it while \w+", console.file.getvalue())


def test_the_footprint_follows_what_is_asked_for(setup):
    def of(**more):
        config = make_config(overridden(setup.config.model_dump(mode="json"), [f"{k}={v}" for k, v in more.items()]))
        return {phase.name: phase.bytes for phase in footprint.footprint_of(replace(setup, config=config)).phases()}

    before = of()
    gradients = of(**{"space.methods": '["svd"]'})
    assert gradients["calibrating and factoring"] < before["calibrating and factoring"]
    assert gradients["measuring trials"] == before["measuring trials"]
    named = of(**{"data.control.text": setup.config.data.search.label})
    assert named["sampling text"] < before["sampling text"]  # the control text is sampled by default
    longer = of(**{"data.length": 4096})
    assert longer["predicting"] > before["predicting"]
