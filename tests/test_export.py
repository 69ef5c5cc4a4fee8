"""Exports: what is written loads as what was measured, or is not written at all."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from common import ARCHITECTURES, random_plan, save_folder, tokens
from launching import contents, make_run, measured, small_data, tree, verify_here
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankfront.methods import InputError
from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear
from rankfront.search.__main__ import run
from rankfront.search.errors import ExportError
from rankfront.search.inputs.model import count_parameters
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output import export as module
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

IDS = tokens(2, 24, seed=3)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@pytest.fixture(scope="session")
def residents(tmp_path_factory, text_file):
    """Name of an architecture -> its resident model, with every site and the head in its space."""
    found = {}
    for row in ARCHITECTURES:
        folder = save_folder(row.name, tmp_path_factory.mktemp(row.name) / "model")
        data = small_data(folder, text_file)
        data["space"]["include"] = ["*", row.head, row.table]
        found[row.name] = JobRunner(Study(data).setup())
    return found


def plan_of(resident, part):
    """A plan that treats every linear in the blocks, or the embedding and head as well, each at its own level."""
    plan, wanted = random_plan(resident, 11), resident.compressed.space.wanted()
    choices = {site.name: plan.option(site.name) for site in wanted}
    outer = [site.name for site in wanted if resident.compressed.sites[site].block is None]
    for site, options in wanted.items():
        if site.name in outer:
            choices[site.name] = options[-1]
    if part == "blocks":
        choices = {name: option for name, option in choices.items() if name not in outer}
    else:
        assert outer
    return Plan.of(choices, resident.setup.origin())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def same_matrix(model, architecture):
    """Whether the embedding table and the head read the same numbers from the same memory."""
    table, head = model.get_submodule(architecture.table), model.get_submodule(architecture.head)
    ours, theirs = ({parameter.data_ptr() for parameter in module.parameters()} for module in (table, head))
    return ours == theirs


@pytest.mark.parametrize("part", ["blocks", "whole"])
def test_factored_loads_as_it_was_measured(residents, architecture, part, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    resident = residents[architecture.name]
    row = measured(resident, plan_of(resident, part))
    expected, biases = logits(resident.compressed.model), _biases(resident.compressed.model)
    out = tmp_path / "out"
    verified = export(resident.setup, row, out, "factored")
    assert verified.parameters == row.attributes["parameter_count"] == count_parameters(resident.compressed.model)

    files = {path.name for path in out.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "plan.json", "README.md"} <= files
    assert not [name for name in files if name.endswith(PICKLES)]
    assert os.listdir(tmp_path) == ["out"]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "rankfront"
    assert Plan.from_json((out / "plan.json").read_text(encoding="utf-8")) == row.plan

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), expected)
    assert count_parameters(loaded) == row.attributes["parameter_count"]
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    assert same_matrix(loaded, architecture) == architecture.tied
    assert _biases(loaded).keys() == biases.keys()
    assert all(torch.equal(bias, biases[path]) for path, bias in _biases(loaded).items())
    assert bool(biases) == architecture.biases or architecture.name.startswith("llama")
    generated = loaded.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2
    assert 4 < generated.shape[1] <= 7

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)
    assert same_matrix(again, architecture) == architecture.tied
    assert count_parameters(again) == row.attributes["parameter_count"]


def _biases(model):
    """Path of every linear with a bias -> the bias; norms have biases of their own and are left out."""
    kinds = (nn.Linear, LowRankLinear, transformers.pytorch_utils.Conv1D)
    return {
        path: module.bias
        for path, module in model.named_modules()
        if isinstance(module, kinds) and module.bias is not None
    }


@pytest.mark.parametrize("part", ["blocks", "whole"])
def test_dense_loads_as_a_plain_model(residents, architecture, part, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    resident = residents[architecture.name]
    row = measured(resident, plan_of(resident, part))
    expected = logits(resident.compressed.model)
    out = tmp_path / "out"
    assert export(resident.setup, row, out, "dense").parameters == resident.compressed.dense_values
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert not {"rankfront", "auto_map", "quantization_config"} & config.keys()
    assert not list(out.glob("*.py"))
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not [module for module in loaded.modules() if isinstance(module, LowRankLinear | LowRankEmbedding)]
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert same_matrix(loaded, architecture) == architecture.tied
    assert not [path for path in out.rglob("*") if path.name.endswith(PICKLES)]


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
def load(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the people", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    figures = model(input_ids=ids).logits[0, -1].double().square().sum()
    return [tokenizer.decode(ids[0]), out.shape[1] - ids.shape[1], float(figures)]
def ours():
    return [name for name in sys.modules if name.partition(".")[0] in OURS]
dense = [load(folder) for folder in sys.argv[1:] if folder.endswith("dense")]
before = ours()
import rankfront.methods
factored = [load(folder) for folder in sys.argv[1:] if folder.endswith("factored")]
print(json.dumps([dense, before, factored, ours()]))
"""


def test_a_fresh_process_loads_it(residents, tmp_path, monkeypatch):
    """With nothing of ours where it is dense; with one import where it is factored."""
    names, figures = ["llama-tied", "gpt2"], {"dense": [], "factored": []}
    folders = [tmp_path / f"{name}-{form}" for name in names for form in figures]
    with monkeypatch.context() as patch:
        verify_here(patch)
        for folder in folders:
            name, _, form = folder.name.rpartition("-")
            resident = residents[name]
            export(resident.setup, measured(resident, plan_of(resident, "whole")), folder, form)
            ids = AutoTokenizer.from_pretrained(folder)("the people", return_tensors="pt").input_ids
            with torch.no_grad():
                found = resident.compressed.model(input_ids=ids).logits
            figures[form].append(float(found[0, -1].double().square().sum()))
    code = f"OURS = {{'rankfront', 'search', 'methods', 'objectives'}}{LOAD}"
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    dense, before, factored, after = json.loads(done.stdout.splitlines()[-1])
    assert [figure for _, _, figure in dense] == pytest.approx(figures["dense"], rel=1e-3)
    assert [figure for _, _, figure in factored] == pytest.approx(figures["factored"], rel=1e-3)
    assert all(1 <= new <= 2 for _, new, _ in dense + factored)
    assert before == []
    assert "rankfront.methods" in after
    assert not [name for name in after if not name.startswith("rankfront")]
    assert not [name for name in after if name.startswith("rankfront.search")]


# -- verification and refusals, on a launched run


@pytest.fixture(scope="session")
def exportable(model_folder, text_file, tmp_path_factory):
    """A finished run, to read only."""
    return make_run(small_data(model_folder, text_file, trials=5), tmp_path_factory.mktemp("exportable") / "run")


@pytest.fixture
def compressed(exportable):
    return exportable.best("parameters<=0.99")


def test_what_is_exported_was_verified(exportable, compressed, tmp_path, verified_here):
    """In this process: test_end_to_end.py exports as users do, and what does not load fails in a fresh one below."""
    verified = exportable.export(tmp_path / "out", compressed)
    assert verified.perplexity == pytest.approx(compressed.attributes["perplexity"], rel=1e-4)
    assert verified.parameters == compressed.attributes["parameter_count"]
    assert verified.bytes == compressed.attributes["bytes"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{verified.parameters:,}" in card
    assert f"{compressed.report['perplexity']:.6g}" in card if compressed.report else True


def test_foreign_names_are_no_markup_in_the_card(exportable, compressed, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    export(exportable.setup(), replace(compressed, origin="a|b [c](d)\n# e"), tmp_path / "out", "factored")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "(a\\|b \\[c\\](d)\\\\n\\# e) of a rankfront" in card


def test_the_knee_is_the_default(exportable, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    exportable.export(tmp_path / "out")
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")) == exportable.knee().plan


@pytest.mark.parametrize("figure", ["perplexity", "parameter_count"])
def test_what_does_not_verify_is_not_kept(exportable, compressed, tmp_path, monkeypatch, figure):
    verify_here(monkeypatch)
    other = {figure: int(compressed.figure(figure) * 1.01) + 1}
    row = replace(compressed, attributes=compressed.attributes | other, values=compressed.values | other)
    before = contents(exportable)
    with pytest.raises(ExportError, match="not kept"):
        exportable.export(tmp_path / "out", row)
    assert os.listdir(tmp_path) == []
    assert contents(exportable) == before


def test_what_does_not_load_is_not_kept(exportable, compressed, tmp_path, monkeypatch):
    """The fresh process fails: its last line is the reason."""
    write = module._write

    def spoiling(resident, row, folder, form):
        write(resident, row, folder, form)
        (folder / "model.safetensors").write_bytes(b"spoiled")

    monkeypatch.setattr(module, "_write", spoiling)
    with pytest.raises(ExportError, match="does not load in a fresh process") as caught:
        exportable.export(tmp_path / "out", compressed)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_not_touched(exportable, compressed, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for taken in ("out", "file"):
        with pytest.raises(InputError, match="exists and is not empty"):
            exportable.export(tmp_path / taken, compressed)
    assert tree(tmp_path) == {"out/mine.txt": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    exportable.export(tmp_path / "empty", compressed)
    assert (tmp_path / "empty" / "config.json").is_file()


# -- a disk that fills


def refused_export(study, out, capsys):
    """Export through the command line where it cannot work: exit code 1, one line, the run as it was."""
    before = contents(study)
    code = run(["export", str(study.run.path), "--out", str(out), "--max-parameters", "0.99"])
    captured = capsys.readouterr()
    assert code == 1, captured.err
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "exporting trial" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("rankfront: ")
    assert contents(study) == before
    return lines[0]


@pytest.mark.parametrize("limit", [100, 2_000, 4_000, 20_000, 60_000])
def test_a_file_that_cannot_grow_leaves_nothing(exportable, tmp_path, monkeypatch, capsys, limit):
    """RLIMIT_FSIZE while the folder is written: a write beyond ``limit`` bytes fails, in whichever file it is."""
    verify_here(monkeypatch)
    write = module._write_verified

    def limited(*arguments):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ, so writes fail
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(module, "_write_verified", limited)
    line = refused_export(exportable, tmp_path / "out", capsys)
    assert "free some space" in line
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """Make file systems of so many kilobytes, where this user may mount some."""
    mounted: list[Path] = []

    def make(kilobytes):
        folder = tmp_path / f"disk{kilobytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], capture_output=True, check=True)


def test_a_full_disk_leaves_nothing(exportable, compressed, small_disk, tmp_path, monkeypatch, capsys):
    """On disks of every size below what an export takes, so that each of its files is the one that fails once."""
    verify_here(monkeypatch)
    exportable.export(tmp_path / "whole", compressed)
    pages = [-(-len(content) // 4096) for content in tree(tmp_path / "whole").values()]
    for used in sorted({*range(1, sum(pages), 6), *range(sum(pages) - 8, sum(pages))}):
        disk = small_disk(4 * used)
        line = refused_export(exportable, disk / "out", capsys)
        assert "No space left" in line or "os error 28" in line, used
        assert os.listdir(disk) == []


def test_a_link_as_the_folder_is_followed(exportable, compressed, tmp_path, monkeypatch, capsys):
    """To an empty folder or to none yet; the link stays, and what it names is said."""
    verify_here(monkeypatch)
    (tmp_path / "far").mkdir()
    for target in ("far", "new"):
        out = tmp_path / f"to {target}"
        out.symlink_to(tmp_path / target)
        assert run(["export", str(exportable.run.path), "--out", str(out), "--trial", str(compressed.number)]) == 0
        assert out.is_symlink()
        assert (tmp_path / target / "plan.json").is_file()
        assert str(tmp_path / target) in " ".join(capsys.readouterr().err.split())
        with pytest.raises(InputError, match="not empty"):
            exportable.export(out, compressed)
    out = tmp_path / "loop"
    out.symlink_to(out)
    with pytest.raises(InputError, match="not empty"):
        exportable.export(out, compressed)
    assert sorted(os.listdir(tmp_path)) == ["far", "loop", "new", "to far", "to new"]


def test_of_two_exports_to_one_folder_the_later_is_told_and_the_earlier_kept(
    exportable, compressed, tmp_path, monkeypatch
):
    verify_here(monkeypatch)
    verify, out = module.verify_folder, tmp_path / "out"

    def late(*arguments):
        monkeypatch.setattr(module, "verify_folder", verify)
        exportable.export(out, compressed)
        return verify(*arguments)

    monkeypatch.setattr(module, "verify_folder", late)
    with pytest.raises(InputError, match="another process meanwhile"):
        exportable.export(out, compressed)
    assert os.listdir(tmp_path) == ["out"]
    assert "plan.json" in os.listdir(out)
