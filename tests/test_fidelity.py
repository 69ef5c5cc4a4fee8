"""Several fidelities: which windows a rung reads, the order of promotion, and whole studies of a tiny model."""

import itertools

import numpy as np
import pytest
from launching import again, launch_stopped, make_run, make_scheduler, optuna_study, quiet, small_data, verify_here

from rankfront.methods import InputError
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.choices import OURS
from rankfront.search.inputs.text import hash_tokens
from rankfront.search.measure.runner import MEASURES
from rankfront.search.optimise.halving import pareto_order
from rankfront.search.plans.plan import Plan
from rankfront.search.splits import rung_windows
from rankfront.search.study import Study

LENGTH, WINDOWS, RUNGS, REDUCTION, TRIALS = 32, 10, (32, 64, 128), 3, 25  # the rungs read 7 windows, 3 are spare
DENSE = Plan(()).key
SAMPLERS = ("random", "tpe", OURS)


# -- which windows


def test_one_fidelity_reads_everything():
    assert rung_windows([], 7, 32) == [slice(0, 7)]


@pytest.mark.parametrize("seed", range(5))
def test_no_window_serves_two_rungs(seed):
    random = np.random.default_rng(seed)
    rungs = sorted(map(int, random.integers(1, 2000, 4)))
    found = rung_windows(rungs, 1000, 32)
    read = [set(range(1000)[part]) for part in found]
    assert not any(a & b for a, b in itertools.combinations(read, 2))
    assert [len(own) for own in read] == [max(1, tokens // 32) for tokens in rungs]
    assert set.union(*read) == set(range(sum(map(len, read))))


def test_a_rung_reads_one_window_at_least():
    assert rung_windows([1, 31, 33], 3, 32) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize("rungs", [(32, 64, 128), (1, 2, 161), (400,)])
def test_as_many_windows_as_the_rungs_need_are_enough(rungs):
    needed = sum(max(1, tokens // LENGTH) for tokens in rungs)
    assert rung_windows(rungs, needed, LENGTH)[-1].stop == needed
    with pytest.raises(InputError) as caught:
        rung_windows(rungs, needed - 1, LENGTH)
    assert "\n" not in str(caught.value)
    assert f"to {needed} or more" in str(caught.value)


# -- the order


def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


def slow_ranks(values):
    """0 for what nothing dominates, 1 for what is left once those are gone, and so on."""
    ranks, left, rank = np.full(len(values), -1), set(range(len(values))), 0
    while left:
        front = [i for i in left if not any(dominates(values[j], values[i]) for j in left)]
        ranks[front], rank = rank, rank + 1
        left -= set(front)
    return ranks


def slow_crowding(values):
    """NSGA-II's distance by loops, for values without ties: infinite at the ends of any objective."""
    distance = np.zeros(len(values))
    for i, objective in itertools.product(range(len(values)), range(values.shape[1])):
        column = values[:, objective]
        below, above = column[column < column[i]], column[column > column[i]]
        if len(below) and len(above):
            distance[i] += (above.min() - below.max()) / (column.max() - column.min())
        else:
            distance[i] = np.inf
    return distance


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_by_rank_then_by_crowding(seed, objectives):
    values = np.random.default_rng(seed).normal(size=(25, objectives))
    order = pareto_order(values)
    assert sorted(order) == list(range(25))
    ranks = slow_ranks(values)
    assert list(ranks[order]) == sorted(ranks)
    for rank in np.unique(ranks):
        members = [i for i in order if ranks[i] == rank]
        distance = dict(zip(sorted(members), slow_crowding(values[sorted(members)]), strict=True))
        assert [distance[i] for i in members] == pytest.approx(sorted(distance.values(), reverse=True))


def test_of_one_objective_it_is_a_sort():
    values = np.random.default_rng(0).normal(size=(20, 1))
    assert pareto_order(values) == list(np.argsort(values[:, 0]))


def test_equal_rows_and_few_rows_have_an_order():
    """The same row twice is of one rank, and earlier trials come first among equals."""
    assert pareto_order(np.array([[1.0, 2.0]])) == [0]
    assert pareto_order(np.array([[2.0, 2.0], [1.0, 1.0], [1.0, 1.0], [3.0, 3.0]])) == [1, 2, 0, 3]
    assert pareto_order(np.zeros((4, 2))) == [0, 1, 2, 3]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_units_do_not_matter(factor):
    values = np.random.default_rng(1).normal(size=(20, 2))
    assert pareto_order(values * np.array([factor, 1.0])) == pareto_order(values)


# -- whole studies


def make_data(model_folder, text_file, sampler, **search):
    settings = {"trials": TRIALS, "rungs": list(RUNGS), "reduction": REDUCTION, "groups": 0, **search}
    data = small_data(model_folder, text_file, sampler=sampler, **settings)
    data["data"]["search"]["windows"] = WINDOWS
    return data


@pytest.fixture(scope="module", params=SAMPLERS)
def run(request, tmp_path_factory, model_folder, text_file):
    """A finished run of every sampler, to read."""
    return make_run(make_data(model_folder, text_file, request.param), tmp_path_factory.mktemp("rungs") / "run")


@pytest.fixture(scope="module")
def rows(run):
    """Its complete rows in the order in which they were finished."""
    return complete(run)


@pytest.fixture
def data(model_folder, text_file):
    return make_data(model_folder, text_file, "random")


def complete(study):
    """Complete rows in the order in which they were finished: queued ones have numbers from when they were queued."""
    ended = {trial.number: trial.datetime_complete for trial in optuna_study(study).get_trials()}
    return sorted((row for row in study.rows() if row.state == "complete"), key=lambda row: ended[row.number])


def values_of(rows):
    return np.array([list(row.values.values()) for row in rows])


def sent(study):
    """(rung, number) of the trials that went on, interrupted ones left out, as often as they did."""
    trials = [trial for trial in optuna_study(study).get_trials() if "promoted" in trial.user_attrs]
    kept = [trial for trial in trials if trial.user_attrs.get("failure") != INTERRUPTED]
    return [(trial.user_attrs["rung"] - 1, trial.user_attrs["promoted"]) for trial in kept]


def promoted(study):
    """Those of compressed plans."""
    dense = {row.number for row in study.rows() if row.plan_key == DENSE}
    return [(rung, number) for rung, number in sent(study) if number not in dense]


def best_share(rows):
    """(rung, number) of what the rows known at some time send on: the best of each rung that meet the limits."""
    found = set()
    for rung in range(len(RUNGS) - 1):
        here = [row for row in rows if row.rung == rung and row.plan_key != DENSE and row.within]
        due = len(here) // REDUCTION
        found |= {(rung, here[i].number) for i in (pareto_order(values_of(here))[:due] if due else [])}
    return found


def members(rows, rung):
    """Keys of the compressed plans that no other dominates at a rung, of those that meet the limits."""
    here = [row for row in rows if row.rung == rung and row.state == "complete"]
    found = [row for row in here if not any(dominates(*values_of([other, row])) for other in here)]
    found = [row for row in found if row.plan_key != DENSE]
    return {row.plan_key for row in found if row.within} or {row.plan_key for row in found}


def check_promotions(study, spare=2):
    """Laws for any history: each went on once, as many as the share asks for, and only those that were among the best
    of their rung or on its front, but for a few trials at the end."""
    found = sent(study)
    assert len(set(found)) == len(found)
    rows = complete(study)
    for rung in range(len(RUNGS) - 1):
        here = [row for row in rows if row.rung == rung and row.plan_key != DENSE and row.within]
        assert sum((rung, row.number) in found for row in here) >= len(here) // REDUCTION
    known = [rows[:place] for place in range(1, len(rows) + 1)]
    shares = set().union(*map(best_share, known))
    fronts = {(rung, key) for past in known for rung in range(len(RUNGS)) for key in members(past, rung)}
    others = [pair for pair in set(promoted(study)) - shares if (pair[0], study.trial(pair[1]).plan_key) not in fronts]
    assert len(others) <= spare
    assert all(study.trial(number).within for _, number in promoted(study))


def check_front(study, rung):
    """It stands at ``rung``: every member of the fronts below was measured there, or failed by itself."""
    rows = study.rows()
    assert {row.rung for row in study.front()} == {rung}
    for height in range(1, rung + 1):
        known = {row.plan_key: row.state for row in rows if row.rung == height and row.counts}
        assert members(rows, height - 1) <= known.keys()
        assert known[DENSE] == "complete"


def test_plans_climb_rung_by_rung(run, rows):
    rungs = {}
    for row in rows:
        rungs.setdefault(row.plan_key, []).append(row.rung)
    assert all(found == list(range(len(found))) for found in rungs.values())
    assert max(map(len, rungs.values())) == len(RUNGS)
    assert TRIALS - len(RUNGS) < len(rows) <= TRIALS


def test_one_in_so_many_goes_on(run):
    """Each as soon as it is among the best and its rung's share leaves room, and in the end the front."""
    check_promotions(run)


def test_nothing_better_was_left_behind(run, rows):
    """At the moment of a promotion: whatever dominated it had gone on, or went on with it."""
    ended = {row.number: place for place, row in enumerate(rows)}
    by_number = {row.number: row for row in rows}
    sent = set(promoted(run))
    for rung, number in sent:
        values = np.array(list(by_number[number].values.values()))
        for other in rows:
            better = dominates(np.array(list(other.values.values())), values)
            if other.rung == rung and other.plan_key != DENSE and better and ended[other.number] < ended[number]:
                assert (rung, other.number) in sent


def test_promotions_keep_the_plan_and_name_their_source(run, rows):
    by_number = {row.number: row for row in rows}
    for row in rows:
        if row.rung:
            source = by_number[row.attributes["promoted"]]
            assert source.plan_key == row.plan_key
            assert source.origin == row.origin
            assert source.rung == row.rung - 1 or row.plan_key == DENSE
            assert row.attributes["parameters"] == source.attributes["parameters"]


def test_each_rung_reads_windows_of_its_own(run, rows):
    windows = run.setup().tokens["search"]
    parts = rung_windows(RUNGS, WINDOWS, LENGTH)
    for row in rows:
        assert row.attributes["fidelity"] == RUNGS[row.rung]
        assert row.attributes["tokens"] == RUNGS[row.rung]
        assert row.attributes["split"] == hash_tokens(windows[parts[row.rung]])
    splits = {row.rung: row.attributes["split"] for row in rows}
    assert len(set(splits.values())) == len(splits) == len(RUNGS)


def test_the_dense_model_is_measured_at_each_rung(run, rows):
    """Before any compressed plan there: something to compare with."""
    for rung in range(len(RUNGS)):
        here = [row for row in rows if row.rung == rung]
        assert here[0].plan_key == DENSE
        assert [row.plan_key for row in here].count(DENSE) == 1


def test_the_front_is_of_the_highest_rung(run, rows):
    """Like is compared with like: no plan of a lower rung, whatever its values."""
    front = run.front()
    check_front(run, len(RUNGS) - 1)
    top = [row for row in rows if row.rung == len(RUNGS) - 1]
    expected = {
        row.number for row in top if not any(dominates(*values_of([other, row])) for other in top if other is not row)
    }
    assert {row.number for row in front} == expected
    assert all(row.report is not None for row in front)
    compared = next(row.number for row in top if row.is_dense)
    assert {row.number for row in run.rows() if row.report is not None} == expected | {compared}
    assert run.best().rung == run.knee().rung == len(RUNGS) - 1
    assert 0 <= run.hypervolume() <= 1


@pytest.mark.parametrize("run", ["tpe", OURS], indirect=True)
def test_a_seed_gives_the_same_study(run, tmp_path):
    other = Study(run.config, tmp_path / "again")
    other.launch(quiet())
    assert [(row.plan_key, row.rung, row.values) for row in other.rows()] == [
        (row.plan_key, row.rung, row.values) for row in run.rows()
    ]


# -- going on


@pytest.mark.parametrize("sampler", ["random", OURS])
def test_a_longer_launch_promotes_nothing_twice(model_folder, text_file, tmp_path, sampler):
    study = make_run(make_data(model_folder, text_file, sampler, trials=13), tmp_path / "run")
    for trials in (14, TRIALS):
        before = {row.number: (row.plan_key, row.rung, row.values) for row in complete(study)}
        study = again(study, trials=trials)
        study.launch(quiet())
        rows = complete(study)
        after = {row.number: (row.plan_key, row.rung, row.values) for row in rows}
        assert {number: after[number] for number in before} == before
        assert trials - len(RUNGS) < len(after) <= trials
        pairs = [(row.plan_key, row.rung) for row in rows]
        assert len(set(pairs)) == len(pairs)
        check_promotions(study, spare=6)


def test_an_interrupted_promotion_is_measured_again(data, tmp_path):
    """Ctrl-C while a promoted plan is measured: it goes on after all, once, while it is among the best."""
    study = Study(data, tmp_path / "run")
    stopped = launch_stopped(study, "trial", lambda job: job.rung == 1 and job.plan.choices)
    study.launch(quiet())
    assert [row.failure for row in study.rows() if row.state == "failed"] == [INTERRUPTED]
    check_promotions(study)
    assert [row.rung for row in complete(study) if row.plan_key == stopped.plan.key][:2] == [0, 1]


def test_an_interrupted_dense_model_is_measured_again(data, tmp_path):
    """At a later rung too."""
    study = Study(data, tmp_path / "run")
    launch_stopped(study, "trial", lambda job: job.rung == 1 and not job.plan.choices)
    study.launch(quiet())
    dense = [row.rung for row in complete(study) if row.plan_key == DENSE]
    assert dense == list(range(len(RUNGS)))
    check_promotions(study)


def test_nothing_goes_on_before_the_dense_model_is_measured(data, tmp_path):
    """Of several workers the one with the dense model may be the last."""
    scheduler, resident = make_scheduler(data, tmp_path / "run")
    jobs = [scheduler.next() for _ in range(REDUCTION + 1)]
    assert not jobs[0].plan.choices
    for job in jobs[1:]:
        scheduler.finish(job, resident.run(job))
    assert not [row for row in scheduler.state().rows if row.rung]
    scheduler.finish(jobs[0], resident.run(jobs[0]))
    assert [row.state for row in scheduler.state().rows if row.rung == 1] == ["waiting"] * 2  # dense, and one of three


def test_a_failed_trial_does_not_go_on(data, tmp_path, monkeypatch):
    """And one that fails at a higher rung is not tried there again."""
    trial = MEASURES["trial"]

    def failing(self, job):
        return {"failure": "not finite: perplexity is inf"} if job.rung == 1 and job.plan.choices else trial(self, job)

    monkeypatch.setitem(MEASURES, "trial", failing)
    study = make_run(data, tmp_path / "run")
    failed = [row for row in study.rows() if row.state == "failed"]
    assert failed
    assert {row.rung for row in failed} == {1}
    assert len({row.plan_key for row in failed}) == len(failed)
    assert TRIALS - len(RUNGS) < len(failed) + len(complete(study)) <= TRIALS
    check_promotions(study)
    assert {row.rung for row in study.front()} == {0}


def test_a_study_without_rungs_has_one(model_folder, text_file, tmp_path):
    study = make_run(make_data(model_folder, text_file, "random", rungs=[], trials=8), tmp_path / "run")
    assert {row.rung for row in study.rows()} == {0}
    assert {row.attributes["fidelity"] for row in study.rows()} == {WINDOWS * LENGTH}
    assert not promoted(study)


def test_a_promoted_trial_exports_as_it_was_measured(run, tmp_path, monkeypatch):
    """On the windows of its own rung: others would give another perplexity."""
    verify_here(monkeypatch)
    row = next(row for row in run.front() if row.plan.choices)
    verified = run.export(tmp_path / "out", row)
    assert verified.perplexity == pytest.approx(row.attributes["perplexity"], rel=1e-4)
    assert verified.parameters == row.attributes["parameter_count"]


# -- settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rungs": [64, 64]}, r"rungs.*cheapest first"),
        ({"rungs": [128, 64]}, r"rungs.*cheapest first"),
        ({"rungs": [0, 64]}, r"rungs"),
        ({"rungs": [32, 64, 256]}, r"data\.search\.windows to 11 or more"),
        ({"reduction": 1}, r"reduction"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(data, change, named):
    data["search"] |= change
    with pytest.raises(InputError, match=named) as caught:
        Study(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"rungs": [32, 64]}, {"reduction": 4}])
def test_fidelities_define_a_run(data, tmp_path, change):
    """They may not change between launches: values would not compare."""
    data["search"]["trials"] = 3
    study = make_run(data, tmp_path / "run")
    with pytest.raises(InputError, match="would not compare") as caught:
        again(study, **change).launch(quiet())
    assert "\n" not in str(caught.value)
