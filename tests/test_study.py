"""The study, launched in this process on a tiny model: ask, tell, interrupt, resume."""

import io
import itertools
import json
import shutil
import wsgiref.util

import optuna
import pytest
from common import study_data
from launching import make_run, small_data
from optuna.storages._cached_storage import _CachedStorage
from rich.console import Console

from rankfront.methods import InputError
from rankfront.search.errors import Interrupted
from rankfront.search.measure.runner import JobRunner
from rankfront.search.study import Study

TRIALS = 10


def quiet():
    return Console(file=io.StringIO())


def make_data(model_folder, text_file, **search):
    data = study_data(model_folder, text_file)
    data["search"] |= {"trials": TRIALS, "sampler": "random", "anchors": [0.7], **search}
    return data


@pytest.fixture(scope="session")
def launched(model_folder, text_file, tmp_path_factory):
    """A finished run, to read only."""
    study = Study(make_data(model_folder, text_file), tmp_path_factory.mktemp("runs") / "run")
    study.launch(quiet())
    return study


@pytest.fixture
def copied(launched, tmp_path):
    """A finished run of the test's own."""
    shutil.copytree(launched.run.path, tmp_path / "run")
    return Study.open(tmp_path / "run")


def more(study, **search):
    """The same run with other limits."""
    data = study.config.model_dump(mode="json")
    data["search"] |= search
    return Study(data, study.run.path)


def values(study):
    return {row.number: row.values for row in study.rows() if row.state == "complete"}


def fail_at(monkeypatch, count, error):
    """Make the ``count``-th job from now on raise ``error``."""
    numbers, run = itertools.count(1), JobRunner.run

    def counted(self, job):
        if next(numbers) == count:
            raise error
        return run(self, job)

    monkeypatch.setattr(JobRunner, "run", counted)


def test_as_many_trials_as_asked(launched):
    rows = launched.rows()
    assert [row.state for row in rows] == ["complete"] * TRIALS
    assert len({row.plan_key for row in rows}) == TRIALS
    assert all(list(row.values) == ["perplexity", "parameters"] for row in rows)


def test_anchors_come_first(launched):
    """Dense, then every method at the anchors' kept fraction, then the sampler."""
    origins = [row.origin for row in launched.rows()]
    assert origins[0] == "anchor: dense"
    assert origins[1:5] == [f"anchor: {method} keep=0.7" for method in ("asvd", "fwsvd", "svd", "svd-llm")]
    assert set(origins[5:]) == {"random"}
    dense = launched.rows()[0]
    assert dense.values["parameters"] == dense.attributes["block_parameters"] == 1.0
    assert dense.plan.choices == ()


def test_the_front_has_reports(launched):
    front = launched.front()
    assert 1 <= len(front) <= TRIALS
    assert all(row.report is not None and row.report["perplexity"] > 1 for row in front)
    dense = {row.number for row in launched.rows() if row.is_dense}  # which the others are compared with
    assert {row.number for row in launched.rows() if row.report is not None} == {row.number for row in front} | dense


def test_reading_a_run(launched):
    assert Study.open(launched.run.path).config == launched.config
    assert 0 <= launched.hypervolume() <= 1
    assert launched.knee().number in {row.number for row in launched.front()}
    best = launched.best("parameters<=0.9")
    assert best.values["perplexity"] == min(
        row.values["perplexity"] for row in launched.rows() if row.values["parameters"] <= 0.9
    )
    assert len(launched.frame()) == TRIALS
    assert launched.trial(3).number == 3
    with pytest.raises(InputError, match="no trial 99"):
        launched.trial(99)


def test_a_seed_gives_the_same_study(launched, tmp_path):
    again = Study(launched.config, tmp_path / "again")
    again.launch(quiet())
    assert values(again) == values(launched)


def test_a_finished_study_has_nothing_to_do(copied, monkeypatch):
    before = values(copied)
    monkeypatch.setattr(JobRunner, "__init__", lambda *arguments: pytest.fail("no model is needed"))
    copied.launch(quiet())
    assert values(copied) == before


def test_more_trials_go_on_where_it_stopped(copied):
    before = values(copied)
    longer = more(copied, trials=TRIALS + 4)
    longer.launch(quiet())
    after = values(longer)
    assert len(after) == TRIALS + 4
    assert {number: after[number] for number in before} == before
    assert len({row.plan_key for row in longer.rows()}) == TRIALS + 4


@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_interrupted_study_ends_up_complete(model_folder, text_file, tmp_path, monkeypatch, launched, count):
    """Everything finished is kept, and what was cut off is measured again without counting."""
    study = Study(make_data(model_folder, text_file), tmp_path / "run")
    with monkeypatch.context() as patch:
        fail_at(patch, count, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="kept"):
            study.launch(quiet())
    kept = values(study)
    assert len(kept) == count - 1
    study.launch(quiet())
    after = values(study)
    assert {number: after[number] for number in kept} == kept
    assert len(after) == TRIALS
    failed = [row for row in study.rows() if row.state == "failed"]
    assert [row.counts for row in failed] == [False]
    anchors = [row.origin for row in study.rows() if row.state == "complete" and row.origin.startswith("anchor")]
    assert sorted(anchors) == sorted(row.origin for row in launched.rows() if row.origin.startswith("anchor"))


def test_a_killed_launchers_trial_is_closed(model_folder, text_file, tmp_path, monkeypatch):
    """A launcher that could not clean up leaves a running trial; the next one measures it again."""
    study = Study(make_data(model_folder, text_file), tmp_path / "run")
    with monkeypatch.context() as patch:
        fail_at(patch, 4, SystemExit())
        patch.setattr("rankfront.search.run.scheduler.Scheduler.abandon", lambda self: None)
        with pytest.raises(SystemExit):
            study.launch(quiet())
    assert [row.state for row in study.rows()].count("running") == 1
    study.launch(quiet())
    states = [row.state for row in study.rows()]
    assert states.count("complete") == TRIALS
    assert states.count("failed") == 1
    assert "running" not in states


def test_a_failed_trial_is_recorded_and_the_study_goes_on(model_folder, text_file, tmp_path, monkeypatch):
    study, run = Study(make_data(model_folder, text_file), tmp_path / "run"), JobRunner.run
    numbers = itertools.count(1)

    def failing(self, job):
        return {"failure": "RuntimeError: out of memory"} if next(numbers) == 3 else run(self, job)

    monkeypatch.setattr(JobRunner, "run", failing)
    study.launch(quiet())
    (failed,) = [row for row in study.rows() if row.state == "failed"]
    assert failed.failure == "RuntimeError: out of memory"
    assert failed.counts
    assert len(values(study)) == TRIALS - 1
    assert list(study.frame()["failure"].dropna()) == ["RuntimeError: out of memory"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"search": {"seed": 5}}, "search.seed"),
        ({"space": {"keep": [0.5]}}, "space.keep"),
        ({"objectives": {"bytes": {}}}, "objectives.bytes"),
        ({"data": {"length": 16}}, "data.length"),
    ],
)
def test_what_defines_a_run_may_not_change(copied, change, named):
    data = copied.config.model_dump(mode="json")
    for table, keys in change.items():
        data[table] |= keys
    with pytest.raises(InputError, match=rf"{named}.*would not compare") as caught:
        Study(data, copied.run.path).launch(quiet())
    assert "\n" not in str(caught.value)


def test_another_text_under_the_same_name_is_refused(copied, text_file, tmp_path):
    before = text_file.read_text(encoding="utf-8")
    try:
        text_file.write_text(before[::-1], encoding="utf-8")
        with pytest.raises(InputError, match="tokens"):
            more(copied, trials=TRIALS + 1).launch(quiet())
    finally:
        text_file.write_text(before, encoding="utf-8")


def test_one_launcher_at_a_time(copied):
    with copied.run.lock(), pytest.raises(InputError, match="is being launched by process"):
        Study.open(copied.run.path).launch(quiet())
    copied.launch(quiet())  # the lock is free again


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 1}', '{"version": 1, "config": 3, "resolved": {}}']
)
def test_a_corrupt_definition_is_named(tmp_path, content):
    (tmp_path / "study.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"study\.json is corrupt") as caught:
        Study.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_definition_of_another_version_is_named(copied):
    data = json.loads(copied.run.file.read_text(encoding="utf-8")) | {"version": 99}
    copied.run.file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="version 99"):
        Study.open(copied.run.path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        Study.open(tmp_path)


def test_a_corrupt_storage_is_named(copied):
    (copied.run.path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match="storage") as caught:
        copied.rows()
    assert "\n" not in str(caught.value)


def test_a_small_space_is_exhausted_and_the_study_ends(model_folder, text_file, tmp_path):
    """Two options and dense at one site: three plans, however many trials were asked for."""
    data = make_data(model_folder, text_file, trials=50)
    data["space"] |= {"include": ["model.layers.0.mlp.up_proj"], "methods": ["svd"]}
    study = Study(data, tmp_path / "run")
    study.launch(quiet())
    assert len(values(study)) == 3
    assert {row.state for row in study.rows()} == {"complete"}


def test_no_time_is_left_for_searching_but_reports_are_made(model_folder, text_file, tmp_path, monkeypatch):
    study = Study(make_data(model_folder, text_file, time="1h"), tmp_path / "run")
    monkeypatch.setattr(
        "rankfront.search.run.scheduler.Scheduler.elapsed", property(lambda self: 3600.0 * (self.state().spent >= 3))
    )
    study.launch(quiet())
    assert len(values(study)) == 3
    assert all(row.report is not None for row in study.front())


def test_divergence_of_the_dense_model_is_zero(model_folder, text_file, tmp_path):
    data = make_data(model_folder, text_file, trials=2)
    data["objectives"] = {"divergence": {}, "bytes": {}}
    study = Study(data, tmp_path / "run")
    study.launch(quiet())
    dense, other = (row for row in study.rows() if row.state == "complete")
    assert dense.values["divergence"] == pytest.approx(0, abs=1e-6)
    assert other.values["divergence"] > dense.values["divergence"]
    assert other.values["bytes"] < dense.values["bytes"]


# -- how many workers there are where nobody says


@pytest.fixture
def unplaced(model_folder, text_file):
    data = small_data(model_folder, text_file, trials=2)
    del data["search"]["workers"]
    return data


def test_one_device_runs_trials_in_this_process(unplaced, tmp_path, monkeypatch):
    monkeypatch.setattr("rankfront.search.run.workers.run", lambda *_: pytest.fail("a cluster for one device"))
    study = make_run(unplaced, tmp_path / "run")
    assert sum(row.state == "complete" for row in study.rows()) == 2
    assert Study.open(tmp_path / "run").config.search.workers is None  # another machine may have more


@pytest.mark.parametrize(("devices", "address", "wanted"), [(2, None, 2), (1, "auto", 1)])
def test_several_devices_or_a_cluster_get_an_actor_each(unplaced, tmp_path, monkeypatch, devices, address, wanted):
    asked = []
    monkeypatch.setattr("rankfront.search.run.resolving.count_devices", lambda device: devices)
    monkeypatch.setattr("rankfront.search.run.workers.run", lambda *given: asked.append(given[2:]))
    Study(unplaced, tmp_path / "run").launch(quiet(), address)
    ((workers, resources, where),) = asked
    assert (workers, resources.gpu, where) == (wanted, 0, address)


def test_a_run_that_was_defined_with_a_worker_goes_on(unplaced, tmp_path):
    """1 was the default once, and is in the definition of those runs."""
    study = make_run(unplaced, tmp_path / "run")
    definition = json.loads(study.run.file.read_text(encoding="utf-8"))
    definition["config"]["search"]["workers"] = 1
    study.run.file.write_text(json.dumps(definition), encoding="utf-8")
    unplaced["search"]["trials"] = 3
    longer = make_run(unplaced, tmp_path / "run")
    assert sum(row.state == "complete" for row in longer.rows()) == 3


def test_a_trial_reads_the_study_as_often_however_long_it_is(model_folder, text_file, tmp_path, monkeypatch):
    """Storage is read at every step, and no more often where there are more trials."""
    reads = []
    for name in ("get_all_trials", "get_study_user_attrs"):
        read = getattr(_CachedStorage, name)
        monkeypatch.setattr(
            _CachedStorage,
            name,
            lambda *given, read=read, name=name, **more: reads.append(name) or read(*given, **more),
        )
    study = Study(make_data(model_folder, text_file, trials=8), tmp_path / "run")
    study.launch(quiet(), report=False)
    counts = []
    for trials in (12, 16):
        reads.clear()
        more(study, trials=trials).launch(quiet(), report=False)
        counts.append((reads.count("get_all_trials"), reads.count("get_study_user_attrs")))
    assert counts[0] == counts[1]


def test_objectives_have_their_names_in_storage(launched):
    """As Optuna's own plots read them."""
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{launched.run.path / 'study.db'}")
    assert stored.metric_names == list(launched.config.objectives)
    assert all(" method" in name or " keep" in name for trial in stored.trials for name in trial.params)


def test_the_dashboard_of_optuna_shows_a_run(copied):
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    app = dashboard.wsgi(f"sqlite:///{copied.run.path / 'study.db'}")
    shown = []
    for page in ("/api/studies", "/api/studies/1"):
        request = {"PATH_INFO": page}
        wsgiref.util.setup_testing_defaults(request)
        shown.append(json.loads(b"".join(app(request, lambda *_: None))))
    assert [each["study_name"] for each in shown[0]["study_summaries"]] == ["rankfront"]
    assert shown[1]["objective_names"] == list(copied.config.objectives)
    assert len(shown[1]["trials"]) == len(copied.rows())
    again = Study({**copied.config.model_dump(mode="json")}, copied.run.path)
    again.launch(quiet())  # which goes on as before
    assert again.rows() == copied.rows()
