"""Healing inside a search by successive halving: entrants, rungs, windows, survivors, stops, and what is refused."""

import copy
import shutil
from itertools import pairwise

import pytest
import torch
from healing import healing, healing_data, interrupt, launch, spoilt, too_large, wrong_shapes
from hypothesis import given
from hypothesis import strategies as st
from launching import make_run, quiet, started, verify_here, wait_for, write_study
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.objectives import score, teach
from rankfront.search.__main__ import run as command_line
from rankfront.search.config import make_config
from rankfront.search.errors import Interrupted
from rankfront.search.heal import fit
from rankfront.search.heal.healing import split_held_out
from rankfront.search.output import front_healing
from rankfront.search.output.halving import check_healing
from rankfront.search.storage.halving import family_of, rungs
from rankfront.search.study import Study

pytestmark = pytest.mark.usefixtures("verified_here")

TOKENS, SIZE = 27_000, "parameters<=0.99"
HALVING = {"tokens": TOKENS, "stages": ["logits"], "sizes": [SIZE], "entrants": 4, "eta": 2}
PLANS = (4, 2, 1)  # that go through each rung


@pytest.fixture(scope="module")
def searched(model_folder, text_file, tmp_path_factory):
    """A run whose search is over, of plans of two families, none of them healed."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    data = healing_data(model_folder, text_file, **HALVING)
    data["search"] |= {"heal": "none", "trials": 20, "anchors": [0.6]}
    make_run(data, folder)
    return folder


@pytest.fixture(scope="module")
def halved(searched, tmp_path_factory):
    """The same, halved by another launch; and every healing that this took: plan, windows, settings, start, and for one
    that has a start the divergence of that on the windows that are held out."""
    folder = tmp_path_factory.mktemp("halved") / "run"
    shutil.copytree(searched, folder)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        watch(patch, made)
        healing(folder, "halving").launch(quiet())
    return folder, made


@pytest.fixture
def unhealed(searched, tmp_path):
    """A copy of `searched`, the test's own."""
    return shutil.copytree(searched, tmp_path / "run")


def watch(patch, made, stop=None):
    """Keep what every healing is asked for and gives; Ctrl-C arrives before the one of number ``stop``."""
    write = front_healing.export_healed

    def watched(setup, row, out, windows, settings, dense, show, say, start):
        if len(made) == stop:
            interrupt()
        before = None if start is None else divergence(setup, start, split_held_out(windows, settings.held_out)[1])
        results = write(setup, row, out, windows, settings, dense, show, say, start)
        made.append((row.plan_key, windows, settings, start, before, results))
        return results

    patch.setattr(front_healing, "export_healed", watched)


def divergence(setup, folder, windows):
    """Of an export from the dense model."""
    dense, healed = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (setup.source.location, folder))
    return score(healed, windows, teach(dense, windows, 10**6)).divergence


def only(found):
    """The one member that a study has healed."""
    (member,) = found.healed.members.values()
    return member


# -- rungs


@given(st.integers(1, 60), st.integers(2, 6), st.integers(10**4, 10**7))
def test_rungs_spend_the_tokens_and_grow(entrants, eta, tokens):
    found = rungs(tokens, entrants, eta, None)
    assert sum(rung.plans * rung.tokens for rung in found) == tokens
    assert found[0].plans == entrants
    assert found[-1].plans == 1
    for before, after in pairwise(found):
        assert after.plans == max(1, before.plans // eta)
        assert after.tokens >= before.tokens


def test_the_first_rung_may_be_chosen_and_the_last_gets_the_rest():
    assert [(rung.plans, rung.tokens) for rung in rungs(1000, 9, 3, 20)] == [(9, 20), (3, 60), (1, 640)]
    assert [(rung.plans, rung.tokens) for rung in rungs(1000, 1, 3, 20)] == [(1, 1000)]
    with pytest.raises(InputError, match="each leave 55 for the last rung"):
        rungs(1000, 9, 9, 105)


# -- what halving does


def test_tokens_of_all_rungs_are_those_of_the_study(halved):
    folder, made = halved
    assert sum(settings.tokens for _, _, settings, *_ in made) == TOKENS
    assert sum(stage.tokens for *_, results in made for stage in results) == TOKENS
    assert len(made) == sum(PLANS)
    own = [settings.tokens for plan, _, settings, *_ in made if plan == made[-1][0]]
    record = only(Study.open(folder).read()).record
    assert record["tokens"] == sum(own)
    assert [stage["tokens"] for stage in record["stages"]] == own


def test_entrants_are_of_every_family_and_of_one_size(halved):
    folder, made = halved
    found = Study.open(folder).read()
    weights = {site.name: sum(w.out_features * w.in_features for w in site.weights) for site in found.sites}
    rows = {row.plan_key: row for row in found.rows if row.state == "complete"}
    entered = [rows[plan] for plan, *_ in made[: PLANS[0]]]
    assert {family_of(row, weights) for row in entered} == {"subspace", "weighted subspace"}
    sizes = [row.values["parameters"] for row in entered]
    largest = max(row.values["parameters"] for row in rows.values() if row.values["parameters"] <= 0.99)
    assert min(sizes) >= 0.9 * largest
    assert max(sizes) <= 0.99


def test_the_best_go_on_and_no_other(halved):
    folder, made = halved
    after = {}
    for number, count in enumerate(PLANS):
        ours, made = made[:count], made[count:]
        plans = {plan for plan, *_ in ours}
        if number:
            assert plans == set(sorted(after, key=after.get)[:count])
        after = {plan: results[-1].after for plan, *_, results in ours}
    assert only(Study.open(folder).read()).row.plan_key in after


def test_survivors_go_on_from_their_state(halved):
    """The loss at the start of a rung is that of what the rung before left, on the same windows."""
    _, made = halved
    starts = [(before, results[0].before) for *_, start, before, results in made if start is not None]
    assert len(starts) == sum(PLANS[1:])
    for before, now in starts:
        assert now == pytest.approx(before, rel=0.02)  # products are of bfloat16 where the processor has them


def test_no_rung_reads_a_window_of_another_and_all_plans_of_a_rung_read_the_same(halved):
    _, made = halved
    rung = {}
    for _, windows, settings, *_ in made:
        assert torch.equal(rung.setdefault(settings.tokens, windows), windows)
    every = torch.cat(list(rung.values()))
    assert len(rung) == len(PLANS)
    assert len(every) == len(every.unique(dim=0)) == 300


def test_the_survivor_is_a_healed_plan_like_any_other(halved, searched, tmp_path, capsys):
    folder, _ = halved
    before, found = Study.open(searched).read(), Study.open(folder).read()
    assert [row.values for row in found.rows] == [row.values for row in before.rows]
    assert found.front() == before.front()
    member = only(found)
    assert [row.number for row in found.healed_front()] == [member.row.number]
    assert [path.name for path in (folder / "healed").iterdir()] == [member.record["folder"]]
    assert [len(rung["scores"]) for rung in member.record["halving"]["rungs"]] == list(PLANS[:-1])
    assert command_line(["export", str(folder), "--healed", "--out", str(tmp_path / "small")]) == 0
    stored = folder / "healed" / member.record["folder"] / "model.safetensors"
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == stored.read_bytes()
    assert command_line(["front", str(folder)]) == 0
    assert "Pareto front of healed plans" in capsys.readouterr().out


def test_one_entrant_is_healed_as_a_member_of_the_front_is(unhealed, tmp_path):
    other = shutil.copytree(unhealed, tmp_path / "other")
    best = min((row for row in Study.open(other).front() if row.plan.choices), key=lambda row: row.values["divergence"])
    size = f"parameters<={best.values['parameters']!r}"
    healing(unhealed, "halving", entrants=1, sizes=[size]).launch(quiet())
    healing(other, members=1, where=[f"parameters>={best.values['parameters']!r}"]).launch(quiet())
    halved, healed = only(Study.open(unhealed).read()), only(Study.open(other).read())
    assert halved.row == healed.row
    assert halved.record["weights"] == healed.record["weights"]
    assert halved.record["tokens"] == TOKENS


def test_a_plan_enters_one_size(unhealed, monkeypatch):
    made = []
    watch(monkeypatch, made)
    sizes = ["parameters<=0.99", "parameters<=0.98", "parameters<=0.01"]
    healing(unhealed, "halving", tokens=12_000, entrants=2, sizes=sizes).launch(quiet())
    found = Study.open(unhealed).read()
    assert len(found.healed.members) == 2
    entered = [plan for plan, *_, start, _, _ in made if start is None]
    assert len(entered) == len(set(entered)) == 4


# -- stops


def test_a_halving_that_is_stopped_ends_as_one_that_was_not(halved, unhealed):
    """Ctrl-C in the first rung, before the second, and after everything but the scores."""
    folder, made = halved
    again = []
    for stop in (2, 4, "scoring"):
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, again, stop)
            if stop == "scoring":
                patch.setattr(front_healing.FrontHealing, "_scored", interrupt)
            with pytest.raises(Interrupted):
                healing(unhealed, "halving").launch(quiet())
        assert not Study.open(unhealed).read().healed.members
        assert len(again) == (len(made) if stop == "scoring" else stop)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, again)
        healing(unhealed, "halving").launch(quiet())
    assert [plan for plan, *_ in again] == [plan for plan, *_ in made]  # nothing twice
    assert only(Study.open(unhealed).read()).row.plan_key == only(Study.open(folder).read()).row.plan_key
    assert len(list((unhealed / "healed").iterdir())) == 1


def test_killed_in_a_rung_it_goes_on(halved, unhealed):
    """SIGKILL after the first state, in a process of its own."""
    file = write_study(healing(unhealed, "halving").config.model_dump(mode="json"), unhealed / "study.toml")
    with started("launch", file, "--run", unhealed, VERIFY_HERE="1") as process:
        there = wait_for(lambda: bool(list((unhealed / "healed").glob(".*.rung0"))), lambda: process.poll() is None)
        process.kill()
        process.communicate()
    assert there
    healing(unhealed, "halving").launch(quiet())
    ours, theirs = (only(Study.open(folder).read()) for folder in (unhealed, halved[0]))
    assert ours.row.plan_key == theirs.row.plan_key
    assert ours.record["tokens"] == theirs.record["tokens"]
    assert len(list((unhealed / "healed").iterdir())) == 1


def test_what_is_halved_is_not_halved_again_and_a_folder_that_is_gone_is_made_again(halved, tmp_path, monkeypatch):
    run = shutil.copytree(halved[0], tmp_path / "run")
    member = only(Study.open(run).read())
    with monkeypatch.context() as patch:
        patch.setattr(front_healing, "export_healed", None)  # which would fail
        healing(run, "halving").launch(quiet())
    assert only(Study.open(run).read()) == member
    shutil.rmtree(run / "healed" / member.record["folder"])
    made = []
    watch(monkeypatch, made)
    healing(run, "halving").launch(quiet())
    assert [plan for plan, *_ in made] == [member.row.plan_key] * len(PLANS)  # none of the others
    assert only(Study.open(run).read()).record["folder"] == member.record["folder"]


# -- what fails


def test_an_entrant_that_fails_is_out_and_the_others_go_on(unhealed, monkeypatch, capsys):
    begun = spoilt(monkeypatch, wrong_shapes, fit.Fit, "step")
    assert launch(unhealed, capsys, "halving")[0] == 0
    found = Study.open(unhealed).read()
    ((number, record),) = found.healed.failed.items()
    assert record["failure"].startswith("RuntimeError")
    assert record["place"].startswith("tests/")
    rungs = only(found).record["halving"]["rungs"]
    assert rungs[0]["scores"][str(number)] is None
    assert [len(rung["scores"]) for rung in rungs] == list(PLANS[:-1])
    assert len(begun) == sum(PLANS)
    assert len(list((unhealed / "healed").iterdir())) == 1


def test_a_rung_that_memory_was_short_for_is_tried_again_by_the_next_launch(unhealed, monkeypatch, capsys):
    """And so is the last one, of the plan that is left."""
    with monkeypatch.context() as patch:
        begun = spoilt(patch, too_large, fit.Fit, "step", plans=PLANS[0])
        assert launch(unhealed, capsys, "halving")[0] == 0
    assert len(begun) == PLANS[0]
    found = Study.open(unhealed).read()
    assert all(record["lost"] for record in found.healed.failed.values())
    assert not found.healed.members
    with monkeypatch.context() as patch:
        patch.setattr(front_healing.FrontHealing, "_scored", too_large)
        assert launch(unhealed, capsys, "halving")[0] == 0
    assert not Study.open(unhealed).read().healed.members
    monkeypatch.setattr(front_healing, "export_healed", None)  # which would fail
    assert launch(unhealed, capsys, "halving")[0] == 0
    assert only(Study.open(unhealed).read()).record["halving"]["size"] == SIZE


# -- what cannot be


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": []}, "one or more upper limits"),
        ({"sizes": ["parameters>=0.7"]}, "one or more upper limits"),
        ({"sizes": ["seconds<=1"]}, "figure in heal.sizes"),
        ({"eta": 1}, "heal.eta"),
        ({"entrants": 0}, "heal.entrants"),
        ({"first_rung": 10_000}, "each leave 0"),
        ({"method": "trp"}, "starts from the dense weights"),
        ({"tokens": 5_000}, "less than a step"),
        ({"entrants": 6, "windows": 5}, "read 2 or more each"),
    ],
    ids=str,
)
def test_what_cannot_halve_is_refused_in_one_line(changed, said):
    changed = copy.deepcopy(changed)
    data = {
        "search": {"heal": "halving"},
        "data": {"heal": {"text": "pydoc", "windows": changed.pop("windows", 300)}},
        "heal": HALVING | changed,
    }
    with pytest.raises(InputError, match=said) as caught:
        check_healing(make_config(data))
    assert "\n" not in str(caught.value)


def test_plans_of_nothing_trainable_are_reported_unhealed(model_folder, text_file, tmp_path):
    data = healing_data(model_folder, text_file, **HALVING)
    data["space"] = {"methods": ["drop-block"]}
    data["search"] |= {"heal": "halving", "trials": 4, "anchors": []}
    make_run(data, tmp_path / "run")
    found = Study.open(tmp_path / "run").read()
    assert not found.healed.members
    assert len(found.healed.failures) == 2
    assert not list((tmp_path / "run" / "healed").glob("*"))
