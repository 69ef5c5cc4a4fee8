"""Where the front stands among the rungs, and how a search promotes it in the end."""

import itertools

import numpy as np
import optuna
import pytest
from launching import again, make_run, make_scheduler, quiet
from test_fidelity import DENSE, RUNGS, check_front, complete, make_data, members

from rankfront.search.attributes import INTERRUPTED
from rankfront.search.choices import OURS
from rankfront.search.constraint import Constraint
from rankfront.search.optimise.accuracy import calibration
from rankfront.search.optimise.samplers import OPTUNA_SAMPLERS, make_sampler
from rankfront.search.output.report import front_figure
from rankfront.search.run.launch import Launch
from rankfront.search.run.scheduler import Scheduler
from rankfront.search.storage.front import Row, comparable, dense_row, front_of
from rankfront.search.storage.picking import best_meeting

TOP = len(RUNGS) - 1
LIMIT = "block_parameters<=0.7"


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


def test_members_beyond_the_limits_need_not_go_up():
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


# -- whole studies


def limited(model_folder, text_file, sampler, **search):
    data = make_data(model_folder, text_file, sampler, anchors=[0.9, 0.8, 0.6], **search)
    data["space"]["keep"] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    data["objectives"] = {"divergence": {}, "block_parameters": {}}
    return data


def test_limits_decide_what_goes_up(model_folder, text_file, tmp_path):
    """Plans beyond them stay where they are, and the front is promoted higher as without limits."""
    study = make_run(limited(model_folder, text_file, "random", trials=32, where=[LIMIT]), tmp_path / "run")
    above = [row for row in study.rows() if row.rung and row.plan_key not in (DENSE, None)]
    assert above
    assert all(row.values["block_parameters"] <= 0.7 for row in above)
    assert study.front()
    assert {row.rung for row in study.front()} == {TOP}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [({"trials": 7}, 0), ({"trials": 500, "tokens": 300}, 0), ({"trials": 500, "tokens": 3200}, TOP)],
)
def test_the_limits_hold(model_folder, text_file, tmp_path, limit, expected):
    """Where they are too tight to promote the front it stands lower, but it is whole."""
    study = make_run(limited(model_folder, text_file, "random", **limit), tmp_path / "run")
    assert len(complete(study)) <= limit["trials"]
    assert study.tokens() <= limit.get("tokens", np.inf)
    rung = study.front()[0].rung
    check_front(study, rung)
    assert {row.plan_key for row in study.front()} - {DENSE} == members(study.rows(), rung)
    assert study.hypervolume() > 0
    assert rung == expected


def test_no_closing_after_the_time_has_run_out(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Scheduler, "elapsed", property(lambda self: 100.0 if self.state().spent >= 8 else 0.0))
    data = limited(model_folder, text_file, "random", trials=25, time="60s")
    study = make_run(data, tmp_path / "run")
    assert len(complete(study)) == 8
    check_front(study, 0)
    monkeypatch.undo()
    study.launch(quiet())
    check_front(study, TOP)


def test_an_exhausted_search_is_closed(model_folder, text_file, tmp_path):
    """Every plan of a small space was measured: what is left promotes the front, and then the study is done."""
    data = limited(model_folder, text_file, "random", trials=200, groups=1)
    data["space"] |= {"methods": ["svd"], "keep": [0.5], "include": ["*down_proj", "*up_proj"]}
    study = make_run(data, tmp_path / "run")
    assert len(complete(study)) < 30
    check_front(study, TOP)


@pytest.mark.parametrize("sampler", ["random", OURS])
def test_a_closed_study_goes_on_at_the_first_rung_and_closes_again(model_folder, text_file, tmp_path, sampler):
    study = make_run(limited(model_folder, text_file, sampler, trials=30), tmp_path / "run")
    check_front(study, TOP)
    first = sum(row.rung == 0 for row in complete(study))
    study = again(study, trials=50)
    study.launch(quiet())
    assert sum(row.rung == 0 for row in complete(study)) > first
    check_front(study, TOP)


@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_lift_the_front(model_folder, text_file, tmp_path, workers):
    """The last to start is the first to finish; nobody waits for nothing, and no limit is passed."""
    scheduler, resident = make_scheduler(limited(model_folder, text_file, "random", trials=30), tmp_path / "run")
    jobs, rows = [], []
    while not scheduler.done:
        while len(jobs) < workers and (job := scheduler.next()) is not None:
            jobs.append(job)
        assert jobs
        job = jobs.pop()
        scheduler.finish(job, resident.run(job))
        rows = scheduler.state().rows
        assert sum(row.state in ("complete", "running") for row in rows) <= 30
    assert {row.rung for row in front_of(rows)} == {TOP}


@pytest.fixture(scope="module")
def solved(tmp_path_factory, model_folder, text_file):
    """A finished run of our sampler, for budgets in turn."""
    data = limited(model_folder, text_file, OURS, trials=30)
    return make_run(data, tmp_path_factory.mktemp("closing") / "run")


@pytest.mark.parametrize("bound", [0.45, 0.58, 0.73, 1.0])
def test_a_solved_plan_is_carried_to_where_the_front_stands(solved, bound):
    rung, known = solved.front()[0].rung, {row.number for row in complete(solved)}
    limit = f"block_parameters<={bound}"
    plan = solved.answer(limit).plan.key
    best = solved.solve(limit, console=quiet())
    assert best.rung == rung == solved.front()[0].rung
    assert best.values["block_parameters"] <= bound
    more = [row for row in complete(solved) if row.number not in known]
    assert {row.plan_key for row in more} <= {plan}
    assert [row.rung for row in complete(solved) if row.plan_key == plan] == list(range(rung + 1))
    assert all(row.report for row in solved.front())


def test_a_plan_known_below_the_front_is_carried_too(solved):
    """It is measured where it was not yet, and nothing else is."""
    reached = {row.plan_key: row.rung for row in complete(solved)}
    below = next(row for row in complete(solved) if reached[row.plan_key] == 0)
    count = len(complete(solved))
    longer = again(solved, trials=100)
    Launch(longer.run, longer.config, only=below.number).measure(quiet())
    rungs = [row.rung for row in complete(solved) if row.plan_key == below.plan_key]
    assert rungs == list(range(TOP + 1))
    assert len(complete(solved)) == count + TOP


def test_promotions_carry_no_prediction(solved):
    predicted = [row for row in complete(solved) if row.attributes.get("predicted") is not None]
    assert {row.rung for row in predicted} == {0}
    assert solved.calibration().trials == len(predicted)


def test_the_picture_compares_like_with_like(solved):
    drawn = sum(len(trace.x) for trace in front_figure(solved.read()).data)
    assert drawn <= len(comparable(solved.rows())) < len(complete(solved))


# -- samplers


def proposals(name, promoting):
    """What a sampler proposes for a toy, with or without trials of higher rungs in between."""

    def measure(trial):
        levels = [trial.suggest_int(f"level {i}", 0, 6) for i in range(3)]
        return sum((6 - level) ** 2 for level in levels), sum(levels) / 18

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, found = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(name, 0, 0)), []
    for number in range(40 if name != "gp" else 12):
        trial = study.ask()
        study.tell(trial, measure(trial))
        found.append(trial.params)
        if promoting and number % 3 == 0:
            study.enqueue_trial(trial.params, user_attrs={"rung": 1, "promoted": trial.number})
            again = study.ask()
            assert (again.user_attrs["rung"], measure(again)) == (1, measure(trial))
            study.tell(again, [-100.0 * number, 7.0])
    return found


@pytest.mark.parametrize("name", OPTUNA_SAMPLERS)
def test_samplers_learn_from_first_measurements_alone(name):
    """Values of a higher rung are of other windows: whatever they are, the proposals are the same."""
    alone, beside = proposals(name, False), proposals(name, True)
    assert [a == b for a, b in itertools.zip_longest(alone, beside)] == [True] * len(alone)
