"""`rankfront heal`: from an exported folder to a healed one, killed on the way, and what it refuses."""

import contextlib
import json
import shutil
import socket

import common
import pytest
import torch
from launching import PATIENCE, finish, make_run, small_data, started, tree, verify_here, wait_for
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.__main__ import run as command_line
from rankfront.search.config import make_config
from rankfront.search.errors import ExportError, Interrupted
from rankfront.search.heal.memory import Need, check
from rankfront.search.heal.settings import HealSettings
from rankfront.search.output import derived, healed
from rankfront.search.output.healing_card import HealText
from rankfront.search.run.resolving import heal_windows
from rankfront.search.study import Study

IDS = common.tokens(2, 24, seed=3)
NO_MODEL = ("model", None)  # left out, which an export of a local folder does not take


@pytest.fixture(scope="module")
def exported(model_folder, text_file, tmp_path_factory):
    """A factored export of a tiny Llama, and the same multiplied out."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "model").symlink_to(model_folder)
    data = small_data(model_folder, text_file, trials=2, anchors=[0.6])
    study = make_run(data, folder / "run")
    row = next(row for row in study.rows() if row.plan.choices)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        study.export(folder / "small", row)
        study.export(folder / "plain", row, "dense")
    return folder


def arguments(exported, text_file, out, **more):
    given = {"text": text_file, "tokens": 2_000, "stages": "blocks,logits", "length": 32, "batch": 128, "rate": 3e-3}
    given |= {"model": exported / "model"} | more
    return [
        "heal",
        str(exported / "small"),
        "--out",
        str(out),
        *(f"--{k.replace('_', '-')}" + ("" if v is None else f"={v}") for k, v in given.items() if (k, v) != NO_MODEL),
    ]


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits


def test_a_healed_folder_loads_is_as_large_and_says_what_was_done(exported, text_file, tmp_path, verified_here, capsys):
    out = tmp_path / "healed"
    assert command_line([*arguments(exported, text_file, out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (exported / "small", out))
    shapes = [{name: (x.shape, x.dtype) for name, x in model.state_dict().items()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(logits(out), logits(exported / "small"))
    record = json.loads((out / "healing.json").read_text())
    assert record["stages"] == printed["stages"]
    assert [stage["stage"] for stage in record["stages"]] == ["blocks", "logits"]
    assert record["stages"][-1]["after"] < record["stages"][0]["before"]
    card = (out / "README.md").read_text()
    assert "## Healed" in card
    assert "| logits | 1,000 |" in card
    assert (out / "plan.json").read_text() == (exported / "small" / "plan.json").read_text()
    assert not [file for file, held in tree(out).items() if str(exported.parent).encode() in held]
    assert not list(tmp_path.glob(".*"))


def test_killed_at_any_moment_it_goes_on_from_its_checkpoint(exported, text_file, tmp_path):
    """SIGKILL after the first checkpoint, in a process of its own; then the same command to the end."""
    out, work = tmp_path / "healed", tmp_path / ".healed.healing"
    asked = arguments(exported, text_file, out, tokens=15_000)
    with started(*asked, VERIFY_HERE="1") as process:
        assert wait_for(lambda: (work / "state.json").exists(), lambda: process.poll() is None)
        process.kill()
        process.communicate()
    assert not out.exists()
    where = json.loads((work / "state.json").read_text())["data"]["where"]
    assert where["tokens"] > 0
    done = finish(*asked, "--json", VERIFY_HERE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"][-1]["after"] > 0
    assert out.is_dir()
    assert not work.exists()


def test_from_scratch_a_folder_of_the_same_shapes_is_trained_that_has_nothing_of_the_model(
    exported, text_file, tmp_path, verified_here, capsys
):
    small, out = tmp_path / "small", tmp_path / "healed"
    shutil.copytree(exported / "small", small)
    plan = json.loads((small / "plan.json").read_text())
    (small / "plan.json").write_text(json.dumps(plan | {"origin": {}}))  # no dense model is asked for
    assert command_line([*arguments(tmp_path, text_file, out, stages="logits"), "--from-scratch"]) == 0
    assert "held-out cross-entropy" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small, out))
    shapes = [{name: (x.shape, x.dtype) for name, x in model.state_dict().items()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(*(model.get_input_embeddings().weight for model in (before, after)))
    (stage,) = json.loads((out / "healing.json").read_text())["stages"]
    assert stage["after"] < stage["before"]
    assert "## Trained from scratch" in (out / "README.md").read_text()


def test_two_processes_heal_as_one(exported, text_file, tmp_path, verified_here):
    """Data-parallel: half of every batch each, the same steps, one folder."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert command_line(arguments(exported, text_file, alone, stages="logits")) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    asked = [*arguments(exported, text_file, together, stages="logits"), "--json"]
    with contextlib.ExitStack() as stack:  # as torchrun starts them
        both = [
            stack.enter_context(started(*asked, **group, VERIFY_HERE="1", RANK=rank, LOCAL_RANK=rank)) for rank in "01"
        ]
        said = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[1][0] == ""
    printed = json.loads(said[0][0])["stages"]
    found = json.loads((alone / "healing.json").read_text())["stages"]
    for key in ("before", "after"):
        assert printed[0][key] == pytest.approx(found[0][key], rel=5e-3)  # products in bfloat16
    assert not list(tmp_path.glob(".*"))


def test_what_is_asked_for_again_with_other_settings_is_refused(exported, text_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "healed"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(healed.Healing, "run", stop)
    assert command_line(arguments(exported, text_file, out)) == 1
    assert "run the same command again to go on" in capsys.readouterr().err
    assert command_line(arguments(exported, text_file, out, tokens=3_000)) == 2
    assert "holds checkpoints of another healing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokens": "many"}, "is no number of tokens"),
        ({"text": "nowhere.txt"}, "is no file"),
        ({"length": 20_000}, "healing needs 2 or more"),
        ({"stages": "logits,blocks"}, "name blocks, logits, or blocks and then logits"),
        ({"method": "magic"}, "heal method"),
        ({"method": "lora", "from_scratch": None}, "from scratch there is nothing to heal towards"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": None}, "does not say which model it was made of: name it by --model"),
        ({"device": "cuda:9"}, "torch sees no GPU"),
    ],
    ids=str,
)
def test_what_a_user_may_get_wrong_is_one_line(exported, text_file, tmp_path, capsys, more, said):
    if "device" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line(arguments(exported, text_file, tmp_path / "healed", **more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "healed").exists()


def test_a_folder_that_is_taken_or_no_factored_export_is_refused(exported, text_file, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    assert command_line(arguments(exported, text_file, tmp_path / "taken")) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    dense = ["heal", str(exported / "plain"), "--text", str(text_file), "--out", str(tmp_path / "healed")]
    assert command_line(dense) == 2
    assert "is no factored export" in capsys.readouterr().err


def test_another_dense_model_than_its_own_is_refused(exported, text_file, tmp_path, tied_folder, capsys):
    assert command_line(arguments(exported, text_file, tmp_path / "healed", model=tied_folder)) == 2
    assert "is not the model that" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_nothing_half_written(exported, text_file, tmp_path, monkeypatch, verified_here):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out = tmp_path / "healed"
    monkeypatch.setattr(derived, "verify_folder", full)
    with pytest.raises(ExportError, match="goes on from the last checkpoint"):
        heal_here(exported, text_file, out)
    assert not out.exists()
    before = tree(tmp_path / ".healed.healing")
    assert any(name.startswith("state") for name in before)
    monkeypatch.undo()
    verify_here(monkeypatch)
    results = heal_here(exported, text_file, out)
    assert results[-1].after < results[0].before
    assert out.is_dir()


def test_a_healed_folder_that_does_not_reload_the_same_is_not_kept(
    exported, text_file, tmp_path, monkeypatch, verified_here
):
    real = derived.verify_folder

    def other(*given):
        found = real(*given)
        return type(found)(2 * found.perplexity, found.parameters, found.bytes)

    monkeypatch.setattr(derived, "verify_folder", other)
    with pytest.raises(ExportError, match="not kept"):
        heal_here(exported, text_file, tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


def heal_here(exported, text, out):
    asked = HealSettings(2_000, batch=128, rate=3e-3)
    return healed.heal_folder(exported / "small", HealText(str(text), 32), asked, out, dense=str(exported / "model"))


@pytest.fixture(scope="module")
def healing_run(model_folder, text_file, tmp_path_factory):
    """A run that was launched before anything was said of healing, and again after."""
    data = small_data(model_folder, text_file, trials=2, anchors=[0.6])
    run = tmp_path_factory.mktemp("healing") / "run"
    make_run(data, run)
    before = Study.open(run).rows()
    data["data"]["heal"] = {"text": str(text_file), "windows": 40}
    data["heal"] = {"tokens": 4_000, "rate": 0.003, "batch": 64, "adapter": 2}
    make_run(data, run)
    assert Study.open(run).rows() == before
    return run


def test_export_and_healing_in_one_go(healing_run, tmp_path, verified_here):
    study = Study.open(healing_run)
    number = next(row.number for row in study.rows() if row.plan.choices)
    out = tmp_path / "small"
    assert command_line(["export", str(healing_run), "--trial", str(number), "--heal", "2k", "--out", str(out)]) == 0
    record = json.loads((out / "healing.json").read_text())
    assert [record["settings"][name] for name in ("tokens", "batch", "adapter")] == [2_000, 64, 2]
    assert "AdaptedLinear" in {type(m).__name__ for m in AutoModelForCausalLM.from_pretrained(out).modules()}
    assert record["stages"][-1]["after"] < record["stages"][0]["before"]
    assert not list(tmp_path.glob(".*"))


def test_windows_to_heal_on_are_no_other_splits(healing_run):
    study = Study.open(healing_run)
    setup = study.setup()
    found = heal_windows(study.run, setup.config, setup, lambda phase, done, total: None)
    assert found.shape == (40, 32)
    others = {tuple(window.tolist()) for windows in setup.tokens.values() for window in windows}
    assert others.isdisjoint(tuple(window.tolist()) for window in found)


def test_an_export_interrupted_while_it_heals_is_not_made_again(healing_run, tmp_path, verified_here, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    study = Study.open(healing_run)
    row = next(row for row in study.rows() if row.plan.choices)
    with monkeypatch.context() as patch:
        patch.setattr(healed.Healing, "run", stop)
        with pytest.raises(Interrupted):
            study.export_healed(tmp_path / "small", row)
    monkeypatch.setattr(healed, "export", None)  # which would fail
    study.export_healed(tmp_path / "small", row)
    assert (tmp_path / "small" / "healing.json").exists()


def test_a_study_without_a_text_to_heal_on_says_what_to_write(exported, tmp_path, capsys):
    asked = ["export", str(exported / "run"), "--knee", "--heal", "1M", "--out", str(tmp_path / "small")]
    assert command_line(asked) == 2
    assert "data.heal = {" in capsys.readouterr().err


def test_a_heal_split_of_the_same_own_text_is_refused():
    with pytest.raises(InputError, match="name self:SEED"):
        make_config({"data": {"heal": {"text": "self", "windows": 4}}})
    make_config({"data": {"heal": {"text": "self:1", "windows": 4}}})


def test_too_little_memory_is_said_before_anything_is_trained():
    need = Need(models=2**30, training=6 * 2**30, activations=2**30)
    with pytest.raises(InputError, match=r"8\.0 GiB.*4\.0 GiB are free.*--stages blocks"):
        check(need, 4 * 2**30, HealSettings(1000))
    with pytest.raises(InputError, match="a smaller --batch or --tokens"):
        check(need, 4 * 2**30, HealSettings(1000, stages=("blocks",)))
    assert "8.0 GiB" in check(need, 16 * 2**30, HealSettings(1000))
    assert check(need, None, HealSettings(1000))
