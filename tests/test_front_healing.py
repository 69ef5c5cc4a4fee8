"""Healing inside a search: members of the front are healed, scored, kept, shown by themselves and exported."""

import errno
import json
import math
import shutil
from dataclasses import fields
from inspect import signature

import pytest
from healing import TOKENS, healing, healing_data, interrupt, launch, spoilt, too_large, wrong_shapes
from launching import make_run, quiet, started, tree, verify_here, wait_for, write_study
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.objectives import Scores, score
from rankfront.search.__main__ import run as command_line
from rankfront.search.commands import training
from rankfront.search.config import make_config
from rankfront.search.errors import ExportError, Interrupted
from rankfront.search.heal import fit, keeper, logits
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.settings import HealSettings
from rankfront.search.output import derived, front_healing
from rankfront.search.output.healed import settings_of
from rankfront.search.study import Study

pytestmark = pytest.mark.usefixtures("verified_here")


@pytest.fixture(scope="module")
def searched(model_folder, text_file, tmp_path_factory):
    """A run whose search is over, and of which nothing is healed yet."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    data = healing_data(model_folder, text_file)
    data["search"]["heal"] = "none"
    make_run(data, folder)
    return folder


@pytest.fixture(scope="module")
def launched(searched, tmp_path_factory):
    """The same, healed by another launch."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    shutil.copytree(searched, folder)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        healing(folder).launch(quiet())
    return folder


@pytest.fixture
def unhealed(searched, tmp_path):
    """A copy of `searched`, the test's own."""
    return shutil.copytree(searched, tmp_path / "run")


def test_members_are_healed_and_their_trials_stay_as_they_were(searched, launched):
    before, found = Study.open(searched).read(), Study.open(launched).read()
    assert [row.values for row in found.rows] == [row.values for row in before.rows]
    assert found.front() == before.front()
    assert len(found.healed.members) == 2
    for number, healed in found.healed.members.items():
        row = found.trial(number)
        assert healed.row.values["parameters"] == row.values["parameters"]
        assert healed.row.attributes["bytes"] == row.attributes["bytes"]
        assert healed.row.values["divergence"] < row.values["divergence"]
        assert healed.row.attributes["perplexity"] != row.attributes["perplexity"]
        assert healed.row.report["perplexity"] != row.report["perplexity"]
        assert healed.record["tokens"] == TOKENS


def test_what_is_healed_is_not_healed_again(launched, monkeypatch):
    monkeypatch.setattr(front_healing, "export_healed", None)  # which would fail
    before, records = tree(launched / "healed"), Study.open(launched).read().healed
    healing(launched).launch(quiet())
    assert tree(launched / "healed") == before
    assert Study.open(launched).read().healed == records


def test_the_smallest_is_healed_first_and_then_what_is_farthest_from_those(launched):
    found = Study.open(launched).read()
    sizes = sorted(row.values["parameters"] for row in found.front() if row.plan.choices)
    assert sorted(h.row.values["parameters"] for h in found.healed.members.values()) == [sizes[0], sizes[-1]]


def test_more_members_are_healed_when_more_are_asked_for(launched, tmp_path):
    run = shutil.copytree(launched, tmp_path / "run")
    before = Study.open(run).read().healed.members
    healing(run, members=3).launch(quiet())
    after = Study.open(run).read().healed.members
    assert len(after) == 3
    assert {number: after[number] for number in before} == before


def test_healed_and_unhealed_plans_never_share_a_front(launched):
    found = Study.open(launched).read()
    assert {row.number for row in found.healed.front} <= found.healed.members.keys()
    assert all(row.values == found.trial(row.number).values for row in found.front())
    assert all(row.values == found.healed.members[row.number].row.values for row in found.healed_front())
    assert found.hypervolume() == Study.open(launched).hypervolume()


def test_limits_say_which_members_are_healed(unhealed):
    largest = max(row.values["parameters"] for row in Study.open(unhealed).front() if row.plan.choices)
    healing(unhealed, members=1, where=[f"parameters>={largest!r}"]).launch(quiet())
    members = Study.open(unhealed).read().healed.members.values()
    assert [healed.row.values["parameters"] for healed in members] == [largest]


@pytest.mark.parametrize("stage", ["blocks", "logits", "scoring", "recording"])
def test_a_launch_that_is_stopped_goes_on_where_it_was(unhealed, monkeypatch, stage):
    """Ctrl-C in a stage, after its end, and after everything but the record was written."""
    run, steps = unhealed, []
    with monkeypatch.context() as patch:
        stop_at(patch, stage)
        with pytest.raises(Interrupted):
            healing(run, members=1).launch(quiet())
    assert not Study.open(run).read().healed.members
    left = {path.name.rsplit(".", 1)[-1] for path in (run / "healed").glob(".*")}
    if stage in ("blocks", "logits"):
        assert left == {"healing", "exported"}
        state = json.loads(next((run / "healed").glob(".*.healing/state.json")).read_text())["data"]["where"]
        assert state["tokens"] > 0
    else:
        monkeypatch.setattr(front_healing, "export_healed", None)  # which would fail
    step = Healing._tell
    monkeypatch.setattr(Healing, "_tell", lambda *given: steps.append(given[1:3]) or step(*given))
    healing(run, members=1).launch(quiet())
    (member,) = Study.open(run).read().healed.members.values()
    assert member.record["tokens"] == TOKENS
    assert not list((run / "healed").glob(".*"))
    if stage == "blocks":
        assert steps[0] == ("blocks", TOKENS // 2)  # of two blocks the second
    if stage == "logits":
        assert {name for name, _ in steps} == {"logits"}


def test_killed_in_the_middle_it_goes_on(unhealed, text_file):
    """SIGKILL after the first checkpoint, in a process of its own."""
    file = write_study(
        healing(unhealed, members=1, tokens=30_000).config.model_dump(mode="json"), unhealed / "study.toml"
    )
    with started("launch", file, "--run", unhealed, VERIFY_HERE="1") as process:
        there = wait_for(
            lambda: list((unhealed / "healed").glob(".*.healing/state.json")), lambda: process.poll() is None
        )
        process.kill()
        process.communicate()
    assert there
    healing(unhealed, members=1, tokens=30_000).launch(quiet())
    (member,) = Study.open(unhealed).read().healed.members.values()
    assert member.record["tokens"] == 30_000
    assert not list((unhealed / "healed").glob(".*"))


def stop_at(patch, stage):
    """Let Ctrl-C arrive in a stage of healing, before the scoring or before the record is written."""
    if stage == "scoring":
        return patch.setattr(front_healing.FrontHealing, "_scored", interrupt)
    if stage == "recording":
        keep = front_healing.FrontHealing._keep
        return patch.setattr(
            front_healing.FrontHealing,
            "_keep",
            lambda self, name, record: interrupt() if name.startswith("healed") else keep(self, name, record),
        )
    tell = Healing._tell

    def stopping(self, where, done, loss):
        tell(self, where, done, loss)
        if where == stage:
            interrupt()

    return patch.setattr(Healing, "_tell", stopping)


# -- settings


def test_other_settings_heal_anew_and_what_was_healed_before_is_kept(launched, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(launched, tmp_path / "run")
    before = Study.open(run).read().healed.members
    files = tree(run / "healed")
    healing(run, members=1, tokens=1_000).launch(quiet())
    found = Study.open(run).read().healed
    assert [member.record["tokens"] for member in found.members.values()] == [1_000]
    assert found.others == 1
    assert tree(run / "healed").items() >= files.items()
    assert command_line(["front", str(run)]) == 0
    assert "not shown: 1 that other settings" in capsys.readouterr().out
    monkeypatch.setattr(front_healing, "export_healed", None)  # which would fail
    healing(run, members=2, tokens=TOKENS).launch(quiet())
    assert Study.open(run).read().healed.members == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": {"heal": None}}, "names no text to heal on"),
        ({"data": {"heal": {"text": "pydoc", "windows": 1}}}, "holds one out"),
        ({"objectives": {"parameters": {}, "bytes": {}}, "search": {"heal": "front"}}, "add divergence or perplexity"),
        ({"heal": {"where": ["seconds<=1"]}}, "figure in heal.where"),
        ({"heal": {"where": ["parameters"]}}, "does not read as"),
        ({"heal": {"members": 0}}, "heal.members"),
        ({"heal": {"batch": 0}}, "heal.batch"),
        ({"heal": {"lasso": -1.0}}, "heal.lasso"),
        ({"heal": {"adapter": 4}}, "larger than what its trial measured"),
        ({"heal": {"from_scratch": True}}, "from_scratch"),
    ],
    ids=str,
)
def test_what_cannot_heal_is_refused_in_one_line(changed, said):
    data = {"search": {"heal": "front"}, "data": {"heal": {"text": "pydoc", "windows": 2}}}
    with pytest.raises(InputError, match=said) as caught:
        make_config(data | changed)
    assert "\n" not in str(caught.value)


def test_too_little_text_is_said_before_anything_is_measured(model_folder, text_file, tmp_path):
    data = healing_data(model_folder, text_file)
    data["data"]["heal"]["windows"] = 100_000
    with pytest.raises(InputError, match=r"data\.heal: part .* has 24,000 tokens .* 100000 windows need 3,200,000"):
        Study(data, tmp_path / "run").launch(quiet())
    assert not (tmp_path / "run" / "study.db").exists()


@pytest.mark.parametrize(
    ("heal", "said"),
    [
        ({"method": "magic"}, "heal method"),
        ({"method": "lod", "stages": ["blocks"]}, "lod"),
        ({"lasso": 0.1}, "heal lasso is 0.1 with method factors"),
    ],
    ids=str,
)
def test_settings_that_heal_nothing_are_refused_before_the_search(model_folder, text_file, tmp_path, heal, said):
    study = Study(healing_data(model_folder, text_file, **heal), tmp_path / "run")
    with pytest.raises(InputError, match=said):
        study.launch(quiet())
    assert not (tmp_path / "run").exists()


def test_every_setting_of_the_command_has_a_key_in_the_study_file():
    """But for training from scratch; and what the key says is what heals."""
    given = {
        "tokens": 5, "stages": ["logits"], "method": "fjord", "loss": "both", "error": "fisher", "window": "half",
        "teacher": "cached", "rate": 0.1, "batch": 32, "lasso": 0.2,
    }  # fmt: skip
    settings, refit = settings_of(make_config({"heal": given}))
    assert refit == "none"
    assert {name: getattr(settings, name) for name in given} == given | {"stages": ("logits",)}
    assert settings_of(make_config({"heal": {"adapter": 3}}))[0].adapter == 3
    asked = {parameter.name for command in training.app.registered_commands for parameter in _options(command)}
    told = {field.name for field in fields(HealSettings)} & asked
    assert told - {"seed", "from_scratch"} == given.keys() | {"adapter"}


def _options(command):
    return signature(command.callback).parameters.values() if command.name == "heal" else ()


# -- what cannot be healed


def test_a_plan_of_nothing_trainable_is_reported_unhealed(model_folder, text_file, tmp_path, capsys):
    data = healing_data(model_folder, text_file)
    data["space"] = {"methods": ["drop-block"]}
    data["search"] |= {"trials": 2}
    make_run(data, tmp_path / "run")
    found = Study.open(tmp_path / "run").read()
    assert not found.healed.members
    assert found.healed.failures
    assert command_line(["front", str(tmp_path / "run"), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert {trial["healed"]["failure"] for trial in trials if trial["healed"]} == set(found.healed.failures.values())
    assert command_line(["front", str(tmp_path / "run")]) == 0
    assert "could not be healed, such as trial" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "healed").iterdir())


def test_a_loss_that_is_no_number_ends_its_stage_at_the_best_state(unhealed, monkeypatch):
    step = fit.Fit.step

    def spoilt(self):
        for parameter in self.parameters:
            if parameter.tensor.grad is not None:
                parameter.tensor.grad.fill_(math.nan)
        step(self)

    monkeypatch.setattr(fit.Fit, "step", spoilt)
    healing(unhealed, members=1).launch(quiet())
    found = Study.open(unhealed).read()
    (member,) = found.healed.members.values()
    assert all("ended at its best state" in stage["note"] for stage in member.record["stages"])
    assert math.isfinite(member.row.values["divergence"])


def test_what_is_not_finite_where_trials_are_scored_is_reported_unhealed(unhealed, monkeypatch):
    monkeypatch.setattr(front_healing, "score", lambda *_, **__: Scores(math.nan, math.nan, 1))
    largest = max(row.values["parameters"] for row in Study.open(unhealed).front() if row.plan.choices)
    healing(unhealed, where=[f"parameters>={largest!r}"]).launch(quiet())
    found = Study.open(unhealed).read().healed
    assert not found.members
    assert all("not finite" in why for why in found.failures.values())
    assert not list((unhealed / "healed").iterdir())


# -- what fails


def refused(*_):
    raise ExportError("the healed folder has perplexity 2 and here 1: not kept")


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fails", "owner", "name", "said"),
    [
        (wrong_shapes, fit.Fit, "step", "RuntimeError: mat1 and mat2 shapes"),
        (refused, derived, "check_same", "ExportError: the healed folder has perplexity 2"),
        (wrong_shapes, front_healing, "reported", "RuntimeError: mat1 and mat2 shapes"),
    ],
    ids=["training", "writing", "scoring"],
)
def test_a_member_that_fails_is_recorded_and_the_next_one_is_healed(
    unhealed, monkeypatch, capsys, fails, owner, name, said
):
    with monkeypatch.context() as patch:
        spoilt(patch, fails, owner, name)
        code, printed = launch(unhealed, capsys, tokens=2_000)
    assert code == 0
    found = Study.open(unhealed).read().healed
    ((number, record),) = found.failed.items()
    assert record["failure"].startswith(said)
    assert record["place"].startswith("tests/")
    assert f"trial {number} was not healed: {said}" in printed
    assert record["place"] in printed
    assert len(found.members) == 2
    assert {path.name for path in (unhealed / "healed").iterdir()} == {
        m.record["folder"] for m in found.members.values()
    }
    assert command_line(["front", str(unhealed), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [t["healed"] for t in trials if t["number"] == number] == [record]
    monkeypatch.setattr(front_healing, "export_healed", None)  # which would fail
    assert launch(unhealed, capsys, tokens=2_000)[0] == 0
    assert Study.open(unhealed).read().healed == found


def test_what_memory_was_short_for_is_healed_by_the_next_launch(unhealed, monkeypatch, capsys):
    """Once in a launch, and from its checkpoint."""
    with monkeypatch.context() as patch:
        begun = spoilt(patch, too_large, logits.EndToEnd, "run")
        code, printed = launch(unhealed, capsys, members=1)
    assert code == 0
    found = Study.open(unhealed).read().healed
    ((number, record),) = found.failed.items()
    assert record["lost"]
    assert f"trial {number} was not healed" in printed
    assert len(found.members) == 1
    assert len(begun) == len(set(begun)) == 2
    left = {path.name.rsplit(".", 1)[-1] for path in (unhealed / "healed").glob(".*")}
    assert left == {"healing", "exported"}
    steps, step = [], Healing._tell
    monkeypatch.setattr(Healing, "_tell", lambda *given: steps.append(given[1]) or step(*given))
    assert launch(unhealed, capsys, members=2)[0] == 0
    found = Study.open(unhealed).read().healed
    assert number in found.members
    assert not found.failed
    assert set(steps) == {"logits"}
    assert not list((unhealed / "healed").glob(".*"))


def test_a_full_disk_ends_the_launch_and_is_of_no_plan(unhealed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoilt(patch, full_disk, keeper.Keeper, "save")
        code, printed = launch(unhealed, capsys, tokens=2_000)
    assert code == 1
    assert "free some space" in printed
    assert not Study.open(unhealed).read().healed.failed
    assert launch(unhealed, capsys, tokens=2_000)[0] == 0
    assert len(Study.open(unhealed).read().healed.members) == 2


# -- what is shown


def test_commands_show_healed_plans_in_a_column_and_on_a_front_of_their_own(launched, tmp_path, capsys):
    found = Study.open(launched).read()
    assert command_line(["front", str(launched)]) == 0
    shown = capsys.readouterr().out
    assert "healed divergence" in shown
    assert "Pareto front of healed plans" in shown
    assert f"{TOKENS:,}" in shown
    number, member = next(iter(found.healed.members.items()))
    assert command_line(["show", str(launched), str(number)]) == 0
    assert f"healed by {TOKENS:,} tokens" in capsys.readouterr().out
    page, csv = tmp_path / "page.html", tmp_path / "trials.csv"
    assert command_line(["front", str(launched), "--csv", str(csv)]) == 0
    assert command_line(["report", str(launched), "--out", str(page)]) == 0
    assert "on a front of their own" in page.read_text()
    assert "healed.divergence" in csv.read_text().splitlines()[0]
    frame = Study.open(launched).frame().set_index("number")
    assert frame["healed.divergence"][number] == member.row.values["divergence"]
    assert frame["healed.tokens"].count() == 2


def test_json_has_what_was_healed_by_trial(launched, searched, capsys):
    found = Study.open(launched).read()
    assert command_line(["front", str(launched), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["healed"]["settings"]["tokens"] == TOKENS
    assert printed["healed"]["hypervolume"] == found.healed_hypervolume()
    trials = {trial["number"]: trial["healed"] for trial in printed["trials"] if trial["healed"]}
    assert trials.keys() == found.healed.members.keys()
    for number, shown in trials.items():
        before, after = found.trial(number).values["divergence"], shown["values"]["divergence"]
        assert shown["closed"] == pytest.approx(1 - after / before)
        assert [stage["stage"] for stage in shown["stages"]] == ["blocks", "logits"]
    assert command_line(["front", str(searched), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["healed"] is None
    assert all(trial["healed"] is None for trial in before["trials"])


# -- exports


def test_what_was_scored_is_exported_bit_for_bit(launched, tmp_path, capsys):
    study, out = Study.open(launched), tmp_path / "small"
    found = study.read()
    assert command_line(["export", str(launched), "--healed", "--max-parameters", "0.99", "--out", str(out)]) == 0
    assert f"healed by {TOKENS:,} tokens" in " ".join(capsys.readouterr().err.split())
    member = found.pick_healed(["parameters<=0.99"])
    assert member.row.values == min(
        (m.row.values for m in found.healed.members.values()), key=lambda v: v["divergence"]
    )
    stored = launched / "healed" / member.record["folder"] / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == stored.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert score(model, study.setup().tokens["search"]).perplexity == member.row.attributes["perplexity"]
    assert "Healed, its perplexity on the search split" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--healed", "--heal", "1k"], "leave --format, --refit and --heal out"),
        (["--healed", "--format", "dense"], "leave --format, --refit and --heal out"),
        (["--healed", "--trial", "0"], "trial 0 was not healed"),
        (["--healed", "--max-parameters", "0.01"], "no trial meets"),
        (["--healed", "--trial", "1", "--knee"], "--trial names one trial"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_one_line(launched, tmp_path, capsys, more, said):
    assert command_line(["export", str(launched), "--out", str(tmp_path / "small"), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_nothing_healed_says_how_to_heal(searched, tmp_path, capsys):
    assert command_line(["export", str(searched), "--healed", "--out", str(tmp_path / "small")]) == 2
    assert 'search.heal = "front"' in capsys.readouterr().err


def test_a_folder_that_changed_is_refused_and_one_that_is_gone_is_healed_again(launched, tmp_path):
    run = shutil.copytree(launched, tmp_path / "run")
    study = Study.open(run)
    member = study.read().pick_healed()
    folder = run / "healed" / member.record["folder"]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="remove it, and launch the study"):
        study.export_stored(tmp_path / "small", member)
    assert not (tmp_path / "small").exists()
    shutil.rmtree(folder)
    healing(run).launch(quiet())
    again = study.read().pick_healed()
    assert again.record["folder"] == member.record["folder"]
    assert again.row.figure("perplexity") == pytest.approx(member.row.figure("perplexity"), rel=0.05)
    study.export_stored(tmp_path / "small")
