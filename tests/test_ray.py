"""Trials through Ray: resident workers, failures in them, and their deaths."""

import os
from pathlib import Path

import psutil
import pytest
from launching import (
    again,
    check_whole,
    ctrl_c,
    finished,
    make_run,
    quiet,
    small_data,
    started,
    values_of,
    wait_for,
    write_study,
)

from rankfront.methods import InputError
from rankfront.search import workers
from rankfront.search.driver import WorkersDied
from rankfront.search.predictions import menu_jobs
from rankfront.search.samplers import OURS
from rankfront.search.study import Study
from rankfront.search.trial import make_space
from rankfront.search.workers import DIED

TRIALS = 8

# Workers import rankfront in processes of their own. This is found before any other sitecustomize; it notes which
# process measures what, and runs the code $SPOIL_BY before the jobs that $SPOIL names ("trial 3,report 0").
SITE = """
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "rankfront.search.trial":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            for kind in ("_trial", "_report"):
                setattr(module.Resident, kind, spoiled(getattr(module.Resident, kind)))
        spec.loader.exec_module = exec_module
        return spec

def spoiled(measure):
    def before(self, job):
        with open(os.environ["JOURNAL"], "a") as journal:
            print(os.getpid(), job.kind, job.number, file=journal)
        if {"every job", f"{job.kind} {job.number}"} & set(os.environ["SPOIL"].split(",")):
            exec(os.environ["SPOIL_BY"])
        return measure(self, job)
    return before

sys.meta_path.insert(0, Finder())
"""

# Until three processes have begun a job: the one of the first launch, and both of the second, at the same time.
WAIT_FOR_THREE = """
import time
patience = time.monotonic() + 60
while len({line.split()[0] for line in open(os.environ["JOURNAL"])}) < 3 and time.monotonic() < patience:
    time.sleep(0.05)
"""


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """Have workers run ``code`` before the jobs named; the function returned gives the processes that measured."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    journal = tmp_path / "journal"
    journal.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setenv("JOURNAL", str(journal))

    def prepare(*jobs, code=""):
        monkeypatch.setenv("SPOIL", ",".join(jobs))
        monkeypatch.setenv("SPOIL_BY", code)
        return lambda: [line.split()[0] for line in journal.read_text(encoding="utf-8").splitlines()]

    return prepare


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=TRIALS, workers=1)


@pytest.mark.parametrize("refused", [False, True])
def test_a_callers_ray_stays(model_folder, text_file, tmp_path, refused):
    """Also where the study asks for more than it has."""
    workers.ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        data = small_data(model_folder, text_file, trials=2, workers=1, resources={"cpu": 64 if refused else 1})
        if refused:
            with pytest.raises(InputError, match=r"search\.resources\.cpu"):
                make_run(data, tmp_path / "run")
        else:
            check_whole(make_run(data, tmp_path / "run"), {}, 2)
        assert workers.ray.is_initialized()
    finally:
        workers.ray.shutdown()


def test_one_worker_lives_through_every_trial_and_two_go_on(data, tmp_path, spoil):
    """Its figures are those of the same study in one process."""
    processes = spoil()
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, TRIALS)
    assert all(row.report is not None for row in study.front())
    assert len(processes()) == TRIALS + len(study.front())
    assert len(set(processes())) == 1
    alone = make_run(data | {"search": data["search"] | {"workers": 0}}, tmp_path / "alone")
    before = values_of(study)
    for number, (plan, values) in values_of(alone).items():
        assert before[number][0] == plan
        assert before[number][1] == pytest.approx(values, rel=1e-5)

    spoil("every job", code=WAIT_FOR_THREE)
    longer = again(study, workers=2, trials=TRIALS + 4)
    longer.launch(quiet())
    check_whole(longer, before, TRIALS + 4)
    assert len(set(processes())) == 3


def test_relative_paths_mean_the_launchers_folder(data, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(model_folder).parent)
    data["model"]["name"] = Path(model_folder).name
    data["search"]["trials"] = 2
    check_whole(make_run(data, tmp_path / "run"), {}, 2)


def test_a_failure_costs_a_trial_and_a_death_costs_a_worker(data, tmp_path, spoil):
    """The worker lives on after the one; another takes its place after the other."""
    code = "if job.number == 3: raise RuntimeError('out of memory\\nwith a trace')\nos._exit(1)"
    processes = spoil("trial 3", "trial 5", code=code)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, TRIALS)
    failed = {row.number: row.failure for row in study.rows() if row.state == "failed"}
    assert failed == {3: "RuntimeError: out of memory", 5: DIED}
    assert all(row.plan.key for row in study.rows())
    assert len(set(processes())) == 2


def test_workers_that_die_again_and_again_end_the_launch(data, tmp_path, spoil):
    """One line says so; what was finished is kept, and with the cause gone the next launch goes on."""
    spoil("trial 2", "trial 3", "trial 4", code="os.kill(os.getpid(), 9)")
    study = Study(data, tmp_path / "run")
    with pytest.raises(WorkersDied, match="3 workers in a row died") as caught:
        study.launch(quiet())
    assert "\n" not in str(caught.value)
    before = values_of(study)
    assert list(before) == [0, 1]
    assert [row.failure for row in study.rows() if row.state == "failed"] == [DIED] * 3
    alone = again(study, workers=0)
    alone.launch(quiet())
    check_whole(alone, before, TRIALS)


def test_a_spoiled_factor_file_is_named_by_the_worker(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    data["search"]["workers"] = 0
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"corrupt.*--rebuild"):
        again(study, workers=1, trials=TRIALS + 2).launch(quiet())
    mended = again(study, trials=TRIALS + 2)
    mended.launch(quiet(), rebuild=True)
    check_whole(mended, before, TRIALS + 2)


def test_ctrl_c_ends_the_cluster_too(data, tmp_path):
    data["search"]["trials"] = 500
    run, file = tmp_path / "run", write_study(data, tmp_path / "study.toml")
    with started("launch", file, "--run", run) as process:
        reached = wait_for(lambda: finished(run) >= 2, lambda: process.poll() is None)
        cluster = psutil.Process(process.pid).children(recursive=True)
        _, stderr = ctrl_c(process)
    assert reached, stderr
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("rankfront: stopped")
    assert "run the same command again to go on" in stderr.splitlines()[-1]
    _, left = psutil.wait_procs(cluster, timeout=30)
    for survivor in left:
        survivor.kill()
    assert left == []
    study = Study.open(run)
    before = values_of(study)
    assert "running" not in {row.state for row in study.rows()}
    shorter = again(study, workers=0, trials=len(before) + 1)
    shorter.launch(quiet())
    check_whole(shorter, before, len(before) + 1)


@pytest.mark.parametrize("source", ["probes", "gradient", "grouped"])
def test_two_workers_share_the_menu_and_slopes(model_folder, text_file, tmp_path, source):
    """Probes are jobs like trials: every part is measured once, by whichever worker is free, and so are slopes."""
    data = small_data(model_folder, text_file, sampler=OURS, menu=source, trials=14, workers=2)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 14)
    attributes = study._optuna().user_attrs
    parts = [name for name in attributes if name.startswith("menu ")]
    wanted = make_space(study.setup()).wanted()
    groups = len(wanted) if source == "grouped" else 0  # two blocks: every site is a group
    assert len(parts) == attributes["menu 0"]["jobs"] == menu_jobs(source, len(wanted)) + groups
    assert (len(parts) > 1) == (source != "gradient")
    sites = [site for name in parts for site in attributes[name].get("predictions", {})]
    assert len(set(sites)) == len(sites) == len(wanted)
    slopes = [trial for trial in study._optuna().trials if "slopes_of" in trial.user_attrs]
    assert slopes
    assert all("slopes" in trial.user_attrs for trial in slopes)
