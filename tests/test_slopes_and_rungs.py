"""Where slopes, rungs, interruptions and failures meet."""

import pytest
from launching import again, make_run, optuna_study, quiet
from synthetic import Problem, measure_slopes, slopes_due
from test_fidelity import DENSE, make_data
from test_rankfront_study import make_scheduler

from rankfront.search.choices import OURS
from rankfront.search.errors import Interrupted
from rankfront.search.measure.runner import MEASURES, JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.run.scheduler import Scheduler
from rankfront.search.study import Study


def test_slopes_are_not_measured_again_around_a_promoted_plan():
    problem = Problem()
    sampler = problem.sampler(0)
    study = problem.study(sampler)
    problem.run(study, 12)
    number = slopes_due(sampler, study)
    measure_slopes(problem, study, number)
    source = study.get_trials()[number]
    for params in (dict.fromkeys(problem.options, 0), source.params):
        study.enqueue_trial(params, user_attrs={"rung": 1, "promoted": number})
        problem.tell(study, *problem.ask(study))
    for _ in range(12):
        problem.run(study, 4)
        due = slopes_due(sampler, study)
        if due is not None:
            assert study.get_trials()[due].params != source.params
            measure_slopes(problem, study, due)


def test_the_goal_is_that_of_the_first_rung_after_a_resume(model_folder, text_file, tmp_path):
    study = make_run(make_data(model_folder, text_file, OURS, rungs=[32, 64], reduction=2, trials=20), tmp_path / "run")
    longer, dense = again(study, trials=30), {}
    dense = {row.rung: row.values["perplexity"] for row in study.rows() if row.plan_key == DENSE}
    setup = longer.setup()
    scheduler = Scheduler(
        optuna_study(longer, write=True), longer.config, make_space(setup), setup.origin(), lambda status: None
    )
    assert scheduler.study.sampler.predictor.goal.dense == dense[0] != dense[1]


@pytest.mark.parametrize("what", ["interrupted", "failed"])
def test_a_run_without_the_dense_model_at_the_highest_rung_goes_on(
    model_folder, text_file, tmp_path, monkeypatch, what
):
    trial, seen = MEASURES["trial"], []

    def spoiled(self, job):
        if job.rung == 1 and not job.plan.choices and not seen:
            seen.append(job)
            if what == "interrupted":
                raise KeyboardInterrupt
            return {"failure": "not finite: perplexity is inf"}
        return trial(self, job)

    monkeypatch.setitem(MEASURES, "trial", spoiled)
    study = Study(make_data(model_folder, text_file, OURS, rungs=[32, 64], reduction=2, trials=16), tmp_path / "run")
    try:
        study.launch(quiet())
    except Interrupted:
        study = again(study, trials=len([row for row in study.rows() if row.state == "complete"]) + 1)
        study.launch(quiet())
    study = again(study, trials=22)
    study.launch(quiet())
    assert study.hypervolume() > 0


def test_slopes_lost_with_their_worker_count_for_nothing(model_folder, text_file, tmp_path):
    study = Study(make_data(model_folder, text_file, OURS, rungs=[]), tmp_path / "run")
    scheduler, resident = make_scheduler(study), JobRunner(study.setup())
    while (job := scheduler.next()).kind != "slopes":
        scheduler.finish(job, resident.run(job))
    spent, rows = scheduler.state().spent, len([row for row in scheduler.state().rows if row.plan_key])
    scheduler.lost(job, "the worker died")
    assert scheduler.state().spent == spent
    assert len(scheduler.state().rows) == rows
