"""Whole studies of a tiny model with our sampler: the menu, slopes, proposals, and what goes wrong."""

import itertools
import math

import numpy as np
import optuna
import pytest
from launching import again, check_whole, launch_stopped, make_run, optuna_study, quiet, small_data, values_of
from optuna.trial import TrialState

from rankfront.methods import InputError
from rankfront.objectives import make_objective
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.choices import OURS
from rankfront.search.measure.runner import MEASURES, JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.optimise.goal import make_goal
from rankfront.search.optimise.opening import anchors_to_beat
from rankfront.search.optimise.rankfront_sampler import RankfrontSampler
from rankfront.search.plans.job import PASSES
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.plans.menu_jobs import menu_jobs, menu_record
from rankfront.search.run.scheduler import Scheduler
from rankfront.search.study import Study
from rankfront.search.tuning import TUNING


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, sampler=OURS, trials=14)


def record_of(study):
    """The menu's record, as the storage has it."""
    return menu_record(optuna_study(study).user_attrs)


def slope_trials(study):
    """The trials that measured slopes, as the storage has them."""
    return [trial for trial in optuna_study(study).get_trials() if "slopes_of" in trial.user_attrs]


def test_limits_that_allow_no_round_size_are_searched_between(model_folder, text_file, tmp_path):
    where = ["parameters<=0.78", "parameters>=0.72"]
    study = make_run(small_data(model_folder, text_file, sampler=OURS, trials=6, where=where), tmp_path / "run")
    proposed = [row for row in study.rows() if row.origin == OURS]
    assert proposed
    assert all(0.72 <= row.values["parameters"] <= 0.78 for row in proposed)


def test_a_study_measures_the_menu_then_its_front_then_proposals(data, tmp_path):
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 14)
    record, rows = record_of(study), study.rows()
    assert record["predictions"].keys() == {site.name for site in make_space(study.setup()).choices}
    spent = [row.attributes["tokens"] for row in rows if row.state == "complete"]
    spent += [trial.user_attrs["tokens"] for trial in slope_trials(study)]
    assert study.tokens() == record["tokens"] + sum(spent)
    menu = [row for row in rows if row.origin.startswith("menu")]
    first, *others = menu
    assert first.origin == "menu: centre"
    assert first.attributes["block_parameters"] <= TUNING.reference_fraction
    assert all(row.origin.startswith("menu: keep=") for row in others)
    assert len(others) >= 2
    for row in others:  # the budget is kept
        assert row.attributes["block_parameters"] <= float(row.origin.rpartition("=")[2]) + 0.0005
    assert first.number < slope_trials(study)[0].number < others[0].number  # slopes decide what the others are
    assert slope_trials(study)[0].user_attrs["slopes_of"] == first.number
    proposed = [row for row in rows if row.origin == OURS]
    assert len(proposed) >= 2
    assert all(row.attributes["predicted"] >= 0 for row in menu + proposed)


def check_slopes(study):
    """The laws of slopes: around different complete plans, of every site and option, and no rows of their own."""
    trials = slope_trials(study)
    done = [trial for trial in trials if trial.user_attrs.get("failure") != INTERRUPTED]
    assert {trial.state for trial in done} == {TrialState.PRUNED}
    assert not {trial.number for trial in done} & {row.number for row in study.rows()}
    rows = {row.number: row for row in study.rows()}
    references = [rows[trial.user_attrs["slopes_of"]] for trial in done]
    assert {row.state for row in references} == {"complete"}
    assert len({row.plan_key for row in references}) == len(references)
    everything = {trial.number: trial for trial in optuna_study(study).get_trials()}
    options = make_space(study.setup()).options
    for trial in done:
        assert trial.params == everything[trial.user_attrs["slopes_of"]].params
        assert trial.user_attrs["slopes"].keys() == options.keys()
        for site, (a, b) in trial.user_attrs["slopes"].items():
            assert len(a) == len(b) == len(options[site])
            assert a[trial.params[site]] == b[trial.params[site]] == 0
            assert all(math.isfinite(value) for value in (*a, *b))
            assert min(b) >= 0
    return done


@pytest.mark.parametrize("objectives", [{"perplexity": {}, "parameters": {}}, {"divergence": {}, "bytes": {}}])
def test_a_study_measures_slopes_around_its_front(data, tmp_path, objectives):
    """Never twice around one plan, and neither as trials of the limit nor as rows."""
    data["objectives"] = objectives
    study = make_run(again_with(data, trials=17), tmp_path / "run")
    check_whole(study, {}, 17)
    done = check_slopes(study)
    assert len(done) >= 2
    windows = study.setup().tokens["search"].numel()
    assert {trial.user_attrs["tokens"] for trial in done} == {PASSES[next(iter(objectives))] * windows}
    before = values_of(study)
    longer = again(study, trials=30)
    longer.launch(quiet())
    check_whole(longer, before, 30)
    assert len(check_slopes(longer)) > len(done)


def again_with(data, **search):
    return data | {"search": data["search"] | search}


def test_interrupted_slopes_are_measured_again(data, tmp_path):
    study = Study(again_with(data, trials=17), tmp_path / "run")
    launch_stopped(study, "slopes")
    before = values_of(study)
    study.launch(quiet())
    check_whole(study, before, 17)
    first, second = slope_trials(study)[:2]
    assert first.user_attrs["failure"] == INTERRUPTED
    assert first.state == TrialState.FAIL
    assert second.user_attrs["slopes_of"] == first.user_attrs["slopes_of"]
    check_slopes(study)


def test_slopes_that_fail_cost_no_trial(data, tmp_path, monkeypatch):
    """The study goes on without them, and does not try again around the same plan."""

    def failing(self, job):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(MEASURES, "slopes", failing)
    study = make_run(again_with(data, trials=14), tmp_path / "run")
    check_whole(study, {}, 14)
    trials = slope_trials(study)
    assert trials
    assert {trial.user_attrs["failure"] for trial in trials} == {"RuntimeError: out of memory"}
    assert len({trial.user_attrs["slopes_of"] for trial in trials}) == len(trials)
    assert len(values_of(study)) == 14


def test_predictions_made_before_a_trial_hold(data, tmp_path):
    """Of divergence: a random model's perplexity says little of what was compressed."""
    data["objectives"] = {"divergence": {}, "block_parameters": {}}
    data["search"]["trials"] = 20
    calibration = make_run(data, tmp_path / "run").calibration()
    assert calibration.trials >= 10
    assert calibration.spearman > 0.8


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("grouped", lambda sites, methods: 3 + 1 + sites),  # two blocks: every site is a group
        ("gradient", lambda sites, methods: 3),  # a backward pass counts as two forward ones
        ("spectrum", lambda sites, methods: 0),
        ("probe", lambda sites, methods: menu_jobs("probe", sites) + sites * methods),  # each job has a teacher
        ("probes", lambda sites, methods: menu_jobs("probes", sites) + 3 * sites * methods),
    ],
)
def test_every_source_of_the_menu_works_and_its_tokens_count(data, tmp_path, source, passes):
    data["search"] |= {"menu": source, "trials": 5}
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 5)
    wanted, record = make_space(study.setup()).wanted(), record_of(study)
    assert {site: set(found) for site, found in record["predictions"].items()} == {
        site.name: {option.label for option in options} for site, options in wanted.items()
    }
    assert all(value >= 0 for found in record["predictions"].values() for value in found.values())
    assert record["tokens"] == passes(len(wanted), 2) * study.setup().tokens["search"].numel()
    assert record["seconds"]["menu"] >= 0


def test_the_menu_is_made_once(data, tmp_path, monkeypatch):
    """Neither a longer launch nor one after a kill makes it again, and nothing is measured twice."""
    calls, study = itertools.count(), Study(data, tmp_path / "run")
    launch_stopped(study, "trial", lambda job: next(calls) == 7)
    record, before = record_of(study), values_of(study)
    assert len(before) == 7

    def refused(self, job):
        raise AssertionError("the menu was there")

    monkeypatch.setitem(MEASURES, "menu", refused)
    study.launch(quiet())
    check_whole(study, before, 14)
    before = values_of(study)
    longer = again(study, trials=17)
    longer.launch(quiet())
    check_whole(longer, before, 17)
    assert record_of(longer) == record


def test_several_workers_measure_different_plans(data, resident):
    """Four jobs at a time: the dense model beside the menu, then whatever is due."""
    scheduler = make_scheduler(Study(data))
    kinds, origins = [], []
    while not scheduler.done:
        jobs = [job for job in (scheduler.next() for _ in range(4)) if job is not None]
        kinds.append([job.kind for job in jobs])
        assert jobs
        for job in jobs:
            scheduler.finish(job, resident.run(job))
    rows = scheduler.state().rows
    origins = [row.origin for row in rows if row.state == "complete"]
    assert kinds[0] == ["menu", "trial"]
    parts = scheduler.study.user_attrs["menu 0"]["jobs"]
    assert sum(kind == "menu" for group in kinds for kind in group) == parts > 1
    assert origins.count(OURS) >= 2
    keys = [row.plan_key for row in rows if row.state == "complete"]
    assert len(set(keys)) == len(keys) == 14


def make_scheduler(study):
    """A scheduler over a study in memory."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setup = study.setup()
    memory = optuna.create_study(directions=["minimize"] * len(study.config.objectives))
    return Scheduler(memory, study.config, make_space(setup), setup.origin(), lambda status: None)


def test_nothing_is_guessed_before_the_menu(data):
    """While a worker makes the menu, another measures the dense model, and the others wait."""
    scheduler = make_scheduler(Study(data))
    for _ in range(6):
        scheduler.next()
    rows = [row for row in scheduler.state().rows if row.state == "running"]
    assert [row.origin for row in rows] == ["anchor: dense"]
    assert scheduler.next() is None
    assert not scheduler.done


def test_two_anchors_that_are_one_plan_are_measured_once(data, resident):
    sites = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    rules = [{"match": sites[0], "methods": ["svd"]}, {"match": sites[1], "methods": ["svd-llm"]}]
    data["space"] |= {"include": sites, "rule": rules}
    scheduler = make_scheduler(Study(data))
    while not scheduler.done:
        job = scheduler.next()
        if job is not None:
            scheduler.finish(job, resident.run(job))
    keys = [row.plan_key for row in scheduler.state().rows if row.state == "complete"]
    assert len(set(keys)) == len(keys)


def test_of_the_anchors_those_are_measured_that_no_other_is_predicted_to_beat(data):
    """At the same size the worse predicted one is left out, after the menu's own front; unknown ones are measured."""
    data["space"]["keep"], data["search"]["anchors"] = [0.3, 0.5], [0.3, 0.5]
    scheduler, resident = make_scheduler(Study(data)), JobRunner(Study(data).setup())
    while not isinstance(scheduler.study.sampler, RankfrontSampler):
        job = scheduler.next()
        scheduler.finish(job, resident.run(job))
    menu, space = scheduler.study.sampler.menu, scheduler.strategy.space
    anchors = space.anchors(scheduler.config.search.anchors)
    wanted = anchors_to_beat(menu, space, scheduler.config.search.anchors)
    assert anchors[0] in wanted
    predicted, expected = {}, []
    for anchor in anchors[1:]:
        places = menu.encode(space.decode(space.anchor_parameters(anchor)))
        if places is None:
            expected.append(anchor)
        else:
            found = (menu.size(places), menu.divergence(places))
            predicted.setdefault(found, anchor)
    for (size, divergence), anchor in predicted.items():
        others = predicted.keys() - {(size, divergence)}
        if not any(small <= size and better <= divergence for small, better in others):
            expected.append(anchor)
    assert set(wanted[1:]) == set(expected)
    assert 0 < len(expected) < len(anchors[1:])
    waiting = scheduler.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    assert [trial.user_attrs["anchor"] for trial in waiting][-len(wanted) + 1 :] == [a.label for a in wanted[1:]]
    lines = tuple(Line(line.site, line.options[:1], line.sizes[:1], line.divergence[:1]) for line in menu.lines)
    assert anchors_to_beat(Menu(lines), space, scheduler.config.search.anchors) == anchors


@pytest.mark.parametrize("sampler", [OURS, "random"])
def test_a_space_that_is_exhausted_ends_the_study(data, tmp_path, sampler):
    data["space"] |= {"include": ["*.0.self_attn.q_proj"], "methods": ["svd"], "keep": [0.4, 0.6]}
    data["search"] |= {"sampler": sampler, "groups": 0}
    study = make_run(data, tmp_path / "run")
    assert len(values_of(study)) == 3


# -- what goes wrong


def test_a_study_without_quality_is_refused_in_one_line(data, tmp_path):
    data["objectives"] = {"parameters": {}, "bytes": {}}
    study = Study(data, tmp_path / "run")
    with pytest.raises(InputError, match="perplexity") as caught:
        study.launch(quiet())
    assert "\n" not in str(caught.value)
    assert not study.rows()


def test_a_menu_that_fails_is_refused_in_one_line(data, tmp_path, monkeypatch):
    def broken(self, job):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(MEASURES, "menu", broken)
    with pytest.raises(InputError, match=r"search\.menu") as caught:
        make_run(data, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "out of memory" in str(caught.value)


def test_a_menu_without_any_prediction_is_refused_in_one_line(data, tmp_path, monkeypatch):
    run = JobRunner.run

    def knowing_nothing(self, job):
        return run(self, job) | ({"predictions": {}} if job.kind == "menu" else {})

    monkeypatch.setattr(JobRunner, "run", knowing_nothing)
    with pytest.raises(InputError, match=r"search\.menu") as caught:
        make_run(data, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_dense_model_that_cannot_be_measured_ends_the_study(data, tmp_path, monkeypatch):
    """Without it there is no sampler: no launch may wait for ever, the first or a later one."""
    rounds, following, run = itertools.count(), Scheduler.next, JobRunner.run

    def counted(self):
        assert next(rounds) < 100, "it waits for what never comes"
        return following(self)

    def failing(self, job):
        return run(self, job) if job.kind == "menu" or job.plan.choices else {"failure": "not finite: perplexity"}

    monkeypatch.setattr(Scheduler, "next", counted)
    monkeypatch.setattr(JobRunner, "run", failing)
    for _ in range(2):
        with pytest.raises(InputError, match="dense model could not be measured") as caught:
            make_run(data, tmp_path / "run")
        assert "not finite: perplexity" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quality", ["perplexity", "divergence"])
def test_a_goal_reads_values_as_divergence(data, tmp_path, quality):
    """Back and forth between values and log-divergence, and costs that are the objectives' own."""
    data["objectives"] = {"block_parameters": {}, quality: {}, "bytes": {}}
    data["search"]["trials"] = 5
    study = make_run(data, tmp_path / "run")
    rows, setup = [row for row in study.rows() if row.state == "complete"], study.setup()
    dense = rows[0]
    goal = make_goal(study.config, make_space(setup), dense, {})
    assert goal.quality == 1
    assert goal.loss(-math.inf) == pytest.approx(dense.values[quality], abs=1e-6)
    for row in rows:
        value = row.values[quality]
        if value > dense.values[quality] * 1.001 + 1e-3:
            assert goal.loss(goal.log_divergence(value)) == pytest.approx(value)
        exact = {0: row.values["block_parameters"], 2: row.values["bytes"]}
        assert goal.costs(row.plan) == pytest.approx(exact)
    boxes = [make_objective(name, {}).box(dense.values[name]) for name in data["objectives"]]
    assert goal.unit(np.array(boxes).T) == pytest.approx(np.array([[0, 0, 0], [1, 1, 1]]))
    assert math.isfinite(goal.loss(1000.0))


def test_slopes_lost_with_their_worker_count_for_nothing(data):
    study = Study(data)
    scheduler, resident = make_scheduler(study), JobRunner(study.setup())
    while (job := scheduler.next()).kind != "slopes":
        scheduler.finish(job, resident.run(job))
    spent, rows = scheduler.state().spent, len([row for row in scheduler.state().rows if row.plan_key])
    scheduler.lost(job, "the worker died")
    assert scheduler.state().spent == spent
    assert len(scheduler.state().rows) == rows
