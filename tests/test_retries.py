"""What a worker's death or a shortage of memory took: measured again, a few times, then failed, then tried anew."""

import collections
import itertools

import pytest
import torch
from launching import again, check_whole, make_run, make_scheduler, optuna_study, quiet, small_data, values_of

from rankfront.methods import InputError
from rankfront.search.choices import OURS
from rankfront.search.errors import GaveUp
from rankfront.search.measure.runner import MEASURES, JobRunner
from rankfront.search.plans.job import Job
from rankfront.search.run.retries import ATTEMPTS, MAX_LOST
from rankfront.search.study import Study

TRIALS = 6
DEATH = "the worker process died"


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=TRIALS)


def short_of_memory(monkeypatch, which, times):
    """Jobs that ``which`` accepts run out of memory so many times each; how often each was measured."""
    measured, run = collections.Counter(), JobRunner.run

    def short(self, job):
        measured[job.kind, job.number] += 1
        if which(job) and measured[job.kind, job.number] <= times:
            return {"failure": "OutOfMemoryError: no room", "lost": True}
        return run(self, job)

    monkeypatch.setattr(JobRunner, "run", short)
    return measured


@pytest.fixture(scope="module")
def undisturbed(model_folder, text_file, tmp_path_factory):
    """What every trial gave where nothing ran short."""
    data = small_data(model_folder, text_file, trials=TRIALS)
    return values_of(make_run(data, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_a_passing_shortage_of_memory_costs_nothing(data, undisturbed, tmp_path, monkeypatch, error):
    """Of whatever kind: the same trial is measured again, and the study is the one that never ran short."""
    calls, trial = itertools.count(), MEASURES["trial"]

    def short(self, job):
        if next(calls) == 2:
            raise error
        return trial(self, job)

    monkeypatch.setitem(MEASURES, "trial", short)
    study = make_run(data, tmp_path / "run")
    assert values_of(study) == undisturbed
    assert len(study.rows()) == TRIALS


@pytest.mark.parametrize("kind", ["trial", "menu", "slopes", "report"])
def test_every_kind_of_job_is_measured_again(data, tmp_path, monkeypatch, kind):
    data["search"] |= {"sampler": OURS, "trials": 10}
    measured = short_of_memory(monkeypatch, lambda job: job.kind == kind, ATTEMPTS - 1)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 10)
    assert {row.state for row in study.rows()} <= {"complete", "waiting"}
    assert all(row.report["perplexity"] > 1 for row in study.front())
    assert not [t for t in optuna_study(study).trials if "failure" in t.user_attrs]
    assert {count for (own, _), count in measured.items() if own == kind} == {ATTEMPTS}
    assert {count for (own, _), count in measured.items() if own != kind} == {1}


def test_what_is_lost_at_every_attempt_failed_and_the_next_launch_tries_again(data, tmp_path, monkeypatch):
    """It does not count then, and is not forgotten where that launch is killed."""
    with monkeypatch.context() as patch:
        measured = short_of_memory(patch, lambda job: job.kind == "trial" and job.number == 3, ATTEMPTS)
        study = make_run(data, tmp_path / "run")
        check_whole(study, {}, TRIALS)
        assert measured["trial", 3] == ATTEMPTS
        (failed,) = [row for row in study.rows() if row.state == "failed"]
        assert failed.failure == f"OutOfMemoryError: no room; {ATTEMPTS} attempts"
    before = values_of(study)
    with monkeypatch.context() as patch:
        patch.setattr(
            "rankfront.search.measure.runner.JobRunner.run", lambda self, job: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(Exception, match="kept"):
            study.launch(quiet())
    study.launch(quiet())
    check_whole(study, before, TRIALS)
    assert len(values_of(study)) == TRIALS
    (repeated,) = [row for row in study.rows() if row.plan_key == failed.plan_key and row.state == "complete"]
    assert repeated.origin == failed.origin
    assert not any(row.counts for row in study.rows() if row.state == "failed")
    study.launch(quiet())  # has nothing to do
    assert len(values_of(study)) == TRIALS


def test_a_report_lost_at_every_attempt_is_measured_by_the_next_launch(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        short_of_memory(patch, lambda job: job.kind == "report", ATTEMPTS)
        study = make_run(data, tmp_path / "run")
        assert {row.report["failure"] for row in study.front()} == {f"OutOfMemoryError: no room; {ATTEMPTS} attempts"}
    study.launch(quiet())
    assert all(row.report["perplexity"] > 1 for row in study.front())


@pytest.mark.parametrize("sampler", ["random", OURS])
def test_a_dense_model_that_was_lost_ends_the_launch_and_comes_first_in_the_next(data, tmp_path, monkeypatch, sampler):
    data["search"]["sampler"] = sampler
    with monkeypatch.context() as patch:
        short_of_memory(patch, lambda job: job.kind == "trial" and not job.plan.choices, ATTEMPTS)
        for _ in range(2):
            with pytest.raises(GaveUp, match=f"dense model could not be measured .*no room; {ATTEMPTS} attempts") as e:
                make_run(data, tmp_path / "run")
            assert "\n" not in str(e.value)
    study = Study(data, tmp_path / "run")
    jobs, run = [], JobRunner.run
    monkeypatch.setattr(JobRunner, "run", lambda self, job: jobs.append(job) or run(self, job))
    study.launch(quiet())
    trials = [job for job in jobs if job.kind == "trial"]
    assert not trials[0].plan.choices
    check_whole(study, {}, TRIALS)
    assert study.box()


@pytest.mark.parametrize("sampler", ["random", OURS])
def test_the_dense_models_failure_is_said_first_and_in_its_own_words(data, tmp_path, monkeypatch, sampler):
    """Also where the menu fails for it, and by whoever reads the run; mended, the run goes on."""
    data["search"]["sampler"] = sampler
    run = JobRunner.run

    def failing(self, job):
        if job.kind == "menu":
            return {"failure": "ValueError: no gradient is finite"}
        return run(self, job) if job.plan.choices else {"failure": "not finite: perplexity is nan"}

    with monkeypatch.context() as patch:
        patch.setattr(JobRunner, "run", failing)
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"^the dense model could not be measured \(not finite: perplexity is nan"
            ):
                make_run(data, tmp_path / "run")
    study = Study.open(tmp_path / "run")
    for read in (study.box, study.best, study.knee, lambda: study.answer("parameters<=0.8"), study.menu):
        if sampler == OURS or read in (study.box, study.best, study.knee):
            with pytest.raises(
                InputError, match=r"dense model could not be measured \(not finite: perplexity is nan\)"
            ):
                read()
    study.launch(quiet())
    check_whole(study, {}, TRIALS)


def test_a_menu_that_fails_beside_the_dense_model_waits_for_its_word(data, tmp_path):
    data["search"]["sampler"] = OURS
    for dense in ({"failure": "not finite: perplexity is nan"}, None):
        scheduler, resident = make_scheduler(data, tmp_path / "run")
        menu, first = scheduler.next(), scheduler.next()
        assert (first.kind, menu.kind) == ("trial", "menu")
        scheduler.finish(menu, {"failure": "ValueError: nothing"})
        assert scheduler.next() is None
        if dense:
            with pytest.raises(InputError, match="dense model could not be measured"):
                scheduler.finish(first, dense)
        else:
            scheduler.finish(first, resident.run(first))
            with pytest.raises(InputError, match=r"menu could not be made .*search\.menu"):
                scheduler.next()


# -- deaths, as the scheduler hears of them


def test_plans_that_kill_their_workers_fail_and_the_launch_goes_on(data, tmp_path):
    """However many they are, as long as others are measured in between."""
    scheduler, resident = make_scheduler(data | {"search": data["search"] | {"trials": 12}}, tmp_path / "run")
    deadly = range(1, 2 * MAX_LOST + 2, 2)
    while not scheduler.done:
        job = scheduler.next()
        if job.kind == "trial" and job.number in deadly:
            scheduler.lost(job, DEATH)
        else:
            scheduler.finish(job, resident.run(job))
    assert {row.number for row in scheduler.state().rows if row.state == "failed"} == set(deadly)
    assert scheduler.state().spent == 12


def test_many_deaths_in_a_row_do_not_end_a_launch_whose_jobs_get_through_in_the_end(data, tmp_path):
    """Several workers die at their jobs, one after the other, and their successors measure them."""
    scheduler, resident = make_scheduler(data, tmp_path / "run")
    first = scheduler.next()
    scheduler.finish(first, resident.run(first))
    jobs = [scheduler.next() for _ in range(4)]
    for _ in range(ATTEMPTS - 1):
        for job in jobs:
            scheduler.lost(job, DEATH)
        jobs = [scheduler.next() for _ in range(4)]
    for job in jobs:
        scheduler.finish(job, resident.run(job))
    assert [row.state for row in scheduler.state().rows if row.state != "waiting"] == ["complete"] * 5


def test_where_workers_die_whatever_they_measure_the_launch_gives_up(data, tmp_path):
    scheduler, resident = make_scheduler(data, tmp_path / "run")
    first = scheduler.next()
    scheduler.finish(first, resident.run(first))
    deaths = 0
    with pytest.raises(GaveUp, match=DEATH) as caught:  # noqa: PT012 - that it is raised at last is the point
        while True:
            deaths += 1
            scheduler.lost(scheduler.next(), DEATH)
    assert "\n" not in str(caught.value)
    assert deaths == MAX_LOST * ATTEMPTS
    assert {row.failure for row in scheduler.state().rows if row.state == "failed"} == {f"{DEATH}; {ATTEMPTS} attempts"}


def test_lost_slopes_are_measured_by_the_next_launch(data, tmp_path, monkeypatch):
    data["search"] |= {"sampler": OURS, "trials": 10}
    with monkeypatch.context() as patch:
        short_of_memory(patch, lambda job: job.kind == "slopes", ATTEMPTS)
        study = make_run(data, tmp_path / "run")
        check_whole(study, {}, 10)
    before = values_of(study)
    longer = again(study, trials=14)
    longer.launch(quiet())
    check_whole(longer, before, 14)
    trials = optuna_study(longer).trials
    lost = {t.number for t in trials if "lost" in t.user_attrs}
    assert lost
    assert lost == {t.user_attrs["again"] for t in trials if "again" in t.user_attrs and "slopes" in t.user_attrs}


def test_a_lost_latency_table_is_timed_again(data, tmp_path):
    data["search"]["sampler"] = OURS
    data["objectives"] = {"perplexity": {}, "latency": {"prompt": 8, "decode": 2}}
    scheduler, _ = make_scheduler(data, tmp_path / "run")
    job = scheduler.next()
    assert job == Job("timing", 0, job.plan)
    for _ in range(ATTEMPTS - 1):
        scheduler.lost(job, DEATH)
        assert scheduler.next() == job
        assert scheduler.next() is None  # alone
    scheduler.lost(job, DEATH)
    assert scheduler.study.user_attrs["timing"] == {"failure": f"{DEATH}; {ATTEMPTS} attempts", "lost": True}
    assert scheduler.next().kind == "menu"
