"""What trials read of the search split; runs of several fidelities or of continuation, which 0.1 began, are read."""

import json

import numpy as np
import pytest
from launching import again, make_run, optuna_study, quiet, small_data
from optuna.trial import TrialState

from rankfront.methods import InputError
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.choices import OURS
from rankfront.search.config import make_config
from rankfront.search.constraint import Constraint
from rankfront.search.optimise.accuracy import calibration
from rankfront.search.plans.plan import Plan
from rankfront.search.splits import trial_windows
from rankfront.search.storage.front import Row, comparable, dense_row, front_of
from rankfront.search.storage.picking import best_meeting
from rankfront.search.study import Study

LENGTH, WINDOWS = 32, 10
DENSE = Plan(()).key


@pytest.fixture
def data(model_folder, text_file):
    data = small_data(model_folder, text_file, trials=8, groups=0)
    data["data"]["search"]["windows"] = WINDOWS
    return data


@pytest.mark.parametrize(("tokens", "count"), [(None, 7), (1, 1), (31, 1), (64, 2), (223, 6), (224, 7)])
def test_a_trial_reads_as_many_whole_windows_as_it_may_and_one_at_least(tokens, count):
    assert trial_windows(tokens, 7, LENGTH) == count


def test_a_split_of_fewer_windows_than_a_trial_reads_is_refused():
    with pytest.raises(InputError, match=r"data\.search\.windows to 8 or more") as caught:
        trial_windows(256, 7, LENGTH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [None, 64])
def test_trials_read_what_they_are_told_to(data, tmp_path, tokens):
    data["search"] |= {"trial_tokens": tokens, "trials": 3}
    study = make_run(data, tmp_path / "run")
    assert {row.attributes["fidelity"] for row in study.rows()} == {tokens or WINDOWS * LENGTH}


def test_what_trials_read_defines_a_run(data, tmp_path):
    study = make_run(data, tmp_path / "run")
    with pytest.raises(InputError, match="would not compare"):
        again(study, trial_tokens=64).launch(quiet())


@pytest.mark.parametrize(
    ("key", "value", "advice"), [("rungs", [64, 128], "search.trial_tokens"), ("reduction", 3, "remove it")]
)
def test_keys_that_are_gone_are_named_with_what_to_do(data, key, value, advice):
    with pytest.raises(InputError, match=rf"search\.{key} is no key.*{advice}") as caught:
        make_config(data | {"search": data["search"] | {key: value}})
    assert "\n" not in str(caught.value)


# -- rows of several fidelities


def table(*known, **attributes):
    """Rows of (plan, rung, value, size); without a value the trial failed, and a size may be a reason."""
    rows = []
    for number, (plan, rung, value, size) in enumerate(known):
        key = DENSE if plan == "dense" else plan
        state = "failed" if value is None else "complete"
        values = {} if value is None else {"perplexity": value, "parameters": size}
        failure = size if value is None else None
        rows.append(Row(number, state, "", None, key, values, {"rung": rung, **attributes}, failure=failure))
    return rows


FIRST = [("dense", 0, 10, 1.0), ("a", 0, 12, 0.8), ("b", 0, 15, 0.5), ("worse", 0, 16, 0.9)]
ABOVE = [("dense", 1, 20, 1.0), ("a", 1, 24, 0.8)]


@pytest.mark.parametrize(
    ("more", "rung"),
    [
        ([], 0),
        (ABOVE, 0),  # b is missing
        ([*ABOVE, ("b", 1, 30, 0.5)], 1),
        ([*ABOVE, ("b", 1, None, "not finite")], 1),
        ([*ABOVE, ("b", 1, None, INTERRUPTED)], 0),
        ([*ABOVE[1:], ("b", 1, 30, 0.5)], 0),  # nothing to compare with
        ([("dense", 1, None, "not finite"), *ABOVE[1:], ("b", 1, 30, 0.5)], 0),
        ([ABOVE[0], ("a", 1, None, "not finite"), ("b", 1, None, "not finite")], 0),
        ([*ABOVE, ("b", 1, 30, 0.5), ("dense", 2, 20, 1.0), ("b", 2, 30, 0.5)], 1),
        ([*ABOVE, ("b", 1, 30, 0.5), ("dense", 2, 20, 1.0), ("b", 2, 30, 0.5), ("a", 2, 31, 0.8)], 2),
    ],
)
def test_the_front_stands_at_the_highest_rung_that_covers_it(more, rung):
    rows = table(*FIRST, *more)
    assert {row.rung for row in comparable(rows)} == {rung}
    assert {row.rung for row in front_of(rows)} == {rung}
    assert dense_row(rows).rung == rung


def test_members_beyond_the_limits_need_not_have_gone_up():
    rows = [Row(**(vars(row) | {"within": row.plan_key == "b"})) for row in table(*FIRST, ABOVE[0], ("b", 1, 30, 0.5))]
    assert {row.rung for row in comparable(rows)} == {1}


def test_what_only_a_lower_rung_meets_is_found_there():
    rows = table(*FIRST, ("small", 0, 15.5, 0.4), *ABOVE, ("b", 1, 30, 0.5), ("small", 1, None, "not finite"))
    found = {bound: best_meeting(rows, [Constraint.parse(f"parameters<={bound}")]) for bound in (0.4, 0.5, 0.8)}
    assert {bound: (row.plan_key, row.rung) for bound, row in found.items()} == {
        0.4: ("small", 0),
        0.5: ("b", 1),
        0.8: ("a", 1),
    }


def test_predictions_are_compared_at_the_first_rung():
    """Whatever a plan is worth on other windows, and once for each."""
    rows = table(*FIRST, *ABOVE, ("b", 1, 30, 0.5))
    predicted = [Row(**(vars(row) | {"attributes": row.attributes | {"predicted": 11.0 + row.number}})) for row in rows]
    found = calibration(predicted, "perplexity")
    assert found.trials == len(FIRST)
    errors = [abs((11 + number) / FIRST[number][2] - 1) for number in range(3)]  # the fourth is not on the front
    assert found.front_error == pytest.approx(float(np.median(errors)))


# -- runs of several fidelities


def promote(storage, trial):
    """Measure the plan of a trial at the second fidelity, as 0.1 did: there the first objective is worse by one."""
    storage.enqueue_trial(trial.params, user_attrs={"rung": 1, "promoted": trial.number})
    asked = storage.ask()
    for name, distribution in trial.distributions.items():
        asked._suggest(name, distribution)
    for key, value in trial.user_attrs.items():
        if key != "predicted":
            asked.set_user_attr(key, value)
    storage.tell(asked, [trial.values[0] + 1, *trial.values[1:]])


@pytest.fixture(params=["random", OURS])
def earlier(request, data, tmp_path):
    """A run whose front was measured at two fidelities, with one more promotion in the queue; its front's trials."""
    data["search"] |= {"trial_tokens": 64, "sampler": request.param, "trials": 12}
    study = make_run(data, tmp_path / "run")
    storage = optuna_study(study, write=True)
    trials = [storage.trials[row.number] for row in study.front()]
    dense = next(row.number for row in study.rows() if row.plan_key == DENSE)
    for number in {dense, *(trial.number for trial in trials)}:
        promote(storage, storage.trials[number])
    storage.enqueue_trial(trials[-1].params, user_attrs={"rung": 1, "promoted": trials[-1].number})
    file = study.run.file
    stored = json.loads(file.read_text(encoding="utf-8"))
    del stored["config"]["search"]["trial_tokens"]
    stored["config"]["search"] |= {"rungs": [64, 128], "reduction": 3}
    file.write_text(json.dumps(stored), encoding="utf-8")
    return Study.open(study.run.path), trials


def test_a_run_of_several_fidelities_is_read(earlier):
    study, below = earlier
    front = study.front()
    assert {row.rung for row in front} == {1}
    found = [row.values["perplexity"] for row in front]
    assert found == pytest.approx([trial.values[0] + 1 for trial in below])
    assert study.hypervolume() > 0
    assert study.trial(front[0].number).plan.key == front[0].plan_key


def test_it_goes_on_at_the_first(earlier):
    study, _ = earlier
    before = study.rows()
    longer = again(study, trials=len(before) + 3)
    longer.launch(quiet())
    more = longer.rows()[len(before) :]
    assert len([row for row in more if row.state == "complete"]) >= 2
    assert {row.attributes["fidelity"] for row in more if row.state == "complete"} == {64}
    assert not {row.plan_key for row in more} & {row.plan_key for row in before if row.state == "complete"}


# -- runs of continuation


def test_a_run_that_went_a_path_is_read_and_goes_on(data, tmp_path):
    """Slopes at its stops are of no trial; one stop was measured, one interrupted, and one waits."""
    data["search"] |= {"trial_tokens": 64, "sampler": OURS, "trials": 8}
    study = make_run(data, tmp_path / "run")
    front, storage = [row.number for row in study.front()], optuna_study(study, write=True)
    measured = next(trial for trial in storage.trials if "slopes" in trial.user_attrs)
    stop = {"origin": "slopes", "slopes_of": None, "path": 1, "slope_tokens": 64}
    for attribute, value, state in (
        ("slopes", measured.user_attrs["slopes"], TrialState.PRUNED),
        ("failure", INTERRUPTED, TrialState.FAIL),
    ):
        storage.enqueue_trial(measured.params, user_attrs=stop)
        asked = storage.ask()
        for name, distribution in measured.distributions.items():
            asked._suggest(name, distribution)
        asked.set_user_attr(attribute, value)
        storage.tell(asked, state=state)
    storage.enqueue_trial(measured.params, user_attrs=stop)
    assert [row.number for row in Study.open(study.run.path).front()] == front
    longer = again(study, trials=12)
    longer.launch(quiet())
    assert sum(row.state == "complete" for row in longer.rows()) == 12
