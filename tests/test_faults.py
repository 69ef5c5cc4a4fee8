"""What goes wrong during a study: failing trials and factorisations, spoiled factor files, a second launcher."""

import itertools
import math
import subprocess
import sys

import optuna
import pytest
import torch
from launching import again, check_whole, make_run, make_scheduler, optuna_study, quiet, small_data, values_of

from rankfront.methods import InputError
from rankfront.methods._low_rank import LowRank
from rankfront.objectives.parameters import Parameters
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.measure.runner import MEASURES
from rankfront.search.measure.setup import make_space
from rankfront.search.study import Study

TRIALS = 6


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=TRIALS)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A factor store of the test's own, to spoil."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_record_says_how_it_came_about(data, tmp_path):
    data["search"]["seed"] = 7
    study = make_run(data, tmp_path / "run")
    splits = {row.attributes["split"] for row in study.rows()}
    assert splits == {study.run.definition().resolved["tokens.search"]}
    for row in study.rows():
        assert row.attributes["seed"] == 7
        assert row.attributes["tokens"] == 4 * 32
        assert {"apply", "evaluate", "total"} <= row.attributes["seconds"].keys()
        assert all(seconds >= 0 for seconds in row.attributes["seconds"].values())
        origin = dict(row.plan.origin)
        assert origin["fingerprint"] == study.setup().fingerprint
        assert origin["calibration"] == study.run.definition().resolved["tokens.calibrate"]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (RuntimeError("CUDA out of memory\nand more"), "RuntimeError: CUDA out of memory"),
        (torch.linalg.LinAlgError("did not converge"), "did not converge"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_a_trial_that_fails_costs_one_trial(data, tmp_path, monkeypatch, outcome, reason):
    calls, value = itertools.count(), Parameters.value

    def spoiled(self, subject):
        if next(calls) != 2:
            return value(self, subject)
        if isinstance(outcome, float):
            return outcome
        raise outcome

    monkeypatch.setattr(Parameters, "value", spoiled)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, TRIALS)
    (failed,) = [row for row in study.rows() if row.state == "failed"]
    assert reason in failed.failure
    assert "\n" not in failed.failure
    assert failed.plan.choices
    assert len(values_of(study)) == TRIALS - 1
    assert failed.number not in {row.number for row in study.front()}

    before = values_of(study)
    longer = again(study, trials=TRIALS + 1)
    longer.launch(quiet())
    check_whole(longer, before, TRIALS + 1)


def test_a_report_that_fails_costs_nothing_else(data, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "report", lambda runner, job: 1 / 0)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, TRIALS)
    assert all("ZeroDivisionError" in row.report["failure"] for row in study.front())


def test_a_site_that_cannot_be_factored_fails_its_trials_and_the_study_goes_on(data, tmp_path, own_cache, monkeypatch):
    """Of svd's factorisations one does not converge: the trials that want it fail, with that reason."""
    prepare, calls = LowRank.prepare, itertools.count()

    def diverging(self, site, weights, statistics, options):
        if self.name == "svd" and next(calls) == 0:
            raise torch.linalg.LinAlgError("eigh did not converge")
        return prepare(self, site, weights, statistics, options)

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "prepare", diverging)
        study = make_run(data, tmp_path / "run")
    rows = study.rows()
    assert next(row for row in rows if row.origin == "anchor: dense").state == "complete"
    assert next(row for row in rows if row.origin.startswith("anchor: svd-llm")).state == "complete"
    assert all("converge" in row.failure for row in rows if row.state == "failed")


SPOILS = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "a flipped bit": lambda whole: whole[:-5] + bytes([whole[-5] ^ 16]) + whole[-4:],
    "of another kind": lambda whole: b"not a factor file" * 100,
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_factor_file_is_named_and_mended_by_rebuilding(data, tmp_path, own_cache, spoil):
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    path = max(own_cache.rglob("*q_proj.safetensors"), key=lambda file: (file.parent.name.startswith("svd-llm"), file))
    path.write_bytes(SPOILS[spoil](path.read_bytes()))
    longer = again(study, trials=TRIALS + 8)
    with pytest.raises(InputError, match=r"corrupt.*--rebuild") as caught:
        longer.launch(quiet())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    stopped = values_of(longer)
    assert stopped.items() >= before.items()
    assert not [row for row in longer.rows() if row.state == "failed" and row.counts]

    longer.launch(quiet(), rebuild=True)
    check_whole(longer, stopped, TRIALS + 8)


def test_a_missing_factor_file_is_made_again(data, tmp_path, own_cache):
    study = make_run(data, tmp_path / "run")
    path = max(own_cache.rglob("*q_proj.safetensors"))
    content = path.read_bytes()
    path.unlink()
    longer = again(study, trials=TRIALS + 2)
    longer.launch(quiet())
    check_whole(longer, values_of(study), TRIALS + 2)
    assert path.read_bytes() == content


def test_a_factor_file_deleted_under_a_worker_is_named(data, tmp_path, own_cache, monkeypatch):
    """After preparation the files are gone: one line says so, and the next launch makes them again."""
    study = Study(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("rankfront.search.measure.runner.JobRunner.subject", _delete_first(own_cache))
        with pytest.raises(InputError, match=r"missing.*launch the study again"):
            study.launch(quiet())
    study.launch(quiet())
    check_whole(study, {}, TRIALS)


def _delete_first(cache):
    from rankfront.search.measure.runner import JobRunner

    subject = JobRunner.subject

    def deleting(self, plan, clock):
        for path in cache.rglob("*.safetensors"):
            path.unlink()
        return subject(self, plan, clock)

    return deleting


HOLD = """
import sys
from pathlib import Path
from rankfront.search.storage.folder import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_launcher_is_refused(data, tmp_path):
    """Another process holds the run; when it is killed, the run is free at once."""
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(study.run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    longer = again(study, trials=TRIALS + 1)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"launched by process {holder.pid}") as caught:
            longer.launch(quiet())
        assert "\n" not in str(caught.value)
        assert values_of(Study.open(study.run.path)) == before  # reading is free
    finally:
        holder.kill()
        holder.communicate()
    longer.launch(quiet())
    check_whole(longer, before, TRIALS + 1)


def test_trials_left_running_are_closed_and_measured_again(data, tmp_path):
    """A launcher that died between ask and tell: before, it had asked for the anchors and told nothing."""
    study = Study(data, tmp_path / "run")
    setup = study.setup()
    space = make_space(setup)
    storage = study.run
    storage.path.mkdir()
    optuna_study = storage.study(study.config, write=True)
    for anchor in space.anchors(study.config.search.anchors)[:2]:
        attributes = {"origin": "anchor", "anchor": anchor.label}
        optuna_study.enqueue_trial(space.anchor_parameters(anchor), user_attrs=attributes)
        trial = optuna_study.ask()
        trial.set_user_attr("plan", space.suggest(trial, setup.origin()).to_json())
    optuna_study.ask()  # one of the sampler's, with nothing drawn yet
    assert [row.state for row in study.rows()] == ["running"] * 3

    study.launch(quiet())
    rows = study.rows()
    assert [row.failure for row in rows[:3]] == [INTERRUPTED] * 3
    assert not any(row.counts for row in rows[:3])
    check_whole(study, {}, TRIALS)
    done = [row.origin for row in rows if row.state == "complete"]
    assert done[:3] == ["anchor: dense", "anchor: svd keep=0.6", "anchor: svd-llm keep=0.6"]


def test_a_trial_without_a_plan_says_so(data, tmp_path):
    study = make_run(data, tmp_path / "run")
    number = optuna_study(study, write=True).ask().number
    longer = again(study, trials=TRIALS + 1)
    longer.launch(quiet())
    with pytest.raises(InputError, match=f"trial {number} has no plan"):
        _ = longer.trial(number).plan


def test_what_samplers_ask_twice_is_left_out(data, tmp_path):
    """A plan that was proposed again is not a trial, in any listing."""
    study = make_run(data, tmp_path / "run")
    raw = optuna_study(study, write=True)
    repeated = raw.ask()
    raw.tell(repeated, state=optuna.trial.TrialState.PRUNED)
    assert repeated.number not in {row.number for row in study.rows()}
    assert repeated.number not in set(study.frame()["number"])


def test_a_tiny_time_limit_ends_the_launch_and_more_time_goes_on(data, tmp_path):
    data["search"] |= {"time": "0.001s", "trials": 30}
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    assert len(before) <= 1
    assert all(row.report is not None for row in study.front())
    longer = again(study, time="1h", trials=TRIALS)
    longer.launch(quiet())
    check_whole(longer, before, TRIALS)


@pytest.mark.parametrize("sampler", ["random", "rankfront"])
def test_workers_together_spend_no_more_tokens_than_one(data, tmp_path, sampler):
    """What runs counts before it is told: at most the last job goes beyond the limit."""
    data["search"] |= {"tokens": 4 * 32 * 10 + 1, "trials": 100, "sampler": sampler}
    scheduler, resident = make_scheduler(data, tmp_path / "run")
    largest = 0
    while not scheduler.done:
        jobs = [job for job in (scheduler.next() for _ in range(8)) if job]
        for job in jobs:
            before = scheduler.state().tokens
            scheduler.finish(job, resident.run(job))
            largest = max(largest, scheduler.state().tokens - before)
    assert data["search"]["tokens"] <= scheduler.state().tokens < data["search"]["tokens"] + largest


def test_a_limit_that_the_menu_alone_spends_is_refused(data, tmp_path):
    data["search"] |= {"tokens": 100, "sampler": "rankfront"}
    with pytest.raises(InputError, match=r"search.tokens = 100 .* set it to") as refused:
        make_run(data, tmp_path / "run")
    enough = int(str(refused.value).rpartition("set it to ")[2].split()[0].replace(",", ""))
    data["search"]["tokens"] = enough
    assert make_run(data, tmp_path / "run").front()


@pytest.mark.parametrize("limit", [{"trials": 2}, {"workers": 3}, {"time": "5m"}, {"resources": {"cpu": 2, "gpu": 0}}])
def test_limits_may_change_between_launches(data, tmp_path, limit):
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    again(study, **limit).launch(quiet())  # has nothing to do
    assert values_of(study) == before
    assert Study.open(study.run.path).config.search.model_dump(mode="json").items() >= limit.items() or "time" in limit


def test_the_python_face(data, tmp_path):
    """A study from a dictionary, opened again, read: the same figures everywhere."""
    study = make_run(data, tmp_path / "run")
    opened = Study.open(tmp_path / "run")
    assert [row.number for row in opened.front()] == [row.number for row in study.front()]
    front = opened.front("parameters<=0.95")
    assert all(row.values["parameters"] <= 0.95 for row in front)
    assert opened.best().values["perplexity"] == min(row.values["perplexity"] for row in opened.rows())
    assert opened.knee("parameters<=0.95").number in {row.number for row in front}
    assert opened.trial(0).origin == "anchor: dense"
    frame = opened.frame()
    assert list(frame["number"]) == [row.number for row in opened.rows()]
    assert set(frame.loc[frame["pareto"], "number"]) == {row.number for row in study.front()}
    assert {"seconds.apply", "seconds.evaluate", "report.perplexity", "perplexity", "parameters"} <= set(frame.columns)
    assert 0 < opened.hypervolume() <= 1
    with pytest.raises(InputError, match="closest is trial"):
        opened.best("parameters<=0.001")
