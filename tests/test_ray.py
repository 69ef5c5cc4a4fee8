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
    optuna_study,
    quiet,
    small_data,
    started,
    values_of,
    wait_for,
    write_study,
)
from ray.cluster_utils import Cluster
from spoiling import ONCE

from rankfront.methods import InputError
from rankfront.search.choices import OURS
from rankfront.search.config import ResourcesConfig
from rankfront.search.errors import GaveUp
from rankfront.search.measure.setup import make_space
from rankfront.search.plans.menu_jobs import menu_jobs
from rankfront.search.run import retries, scheduler, workers
from rankfront.search.run.workers import DIED, KILLED, reason_of
from rankfront.search.study import Study

TRIALS = 8


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=TRIALS, workers=1)


@pytest.fixture(scope="module")
def address(journal):
    """Of a cluster for every launch here, but of those that have one of their own: to start one takes seconds."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield found.address
    found.shutdown()


def launched(study, address):
    """``study`` after a launch on the cluster."""
    study.launch(quiet(), address)
    return study


@pytest.fixture
def callers_ray(address):
    """Ray is connected to the cluster by who calls a launch, and stays so."""
    workers.ray.init(address=address, log_to_driver=False)
    try:
        yield
        assert workers.ray.is_initialized()
    finally:
        workers.ray.shutdown()


def test_a_callers_ray_that_has_too_little_is_refused(data, tmp_path, callers_ray):
    with pytest.raises(InputError, match=r"search\.resources\.cpu"):
        again(Study(data, tmp_path / "run"), resources={"cpu": 3}).launch(quiet())


def test_one_worker_lives_through_every_trial(data, model_folder, tmp_path, monkeypatch, spoil, address):
    """Its figures are those of the same study in one process. Relative paths mean the launcher's folder."""
    monkeypatch.chdir(Path(model_folder).parent)
    data["model"]["name"] = Path(model_folder).name
    processes = spoil()
    study = launched(Study(data, tmp_path / "run"), address)
    check_whole(study, {}, TRIALS)
    assert all(row.report is not None for row in study.front())
    assert len(processes()) == TRIALS + len(
        {0, *(row.number for row in study.front())}
    )  # the dense one is reported too
    assert len(set(processes())) == 1
    alone = make_run(data | {"search": data["search"] | {"workers": 0}}, tmp_path / "alone")
    before = values_of(study)
    for number, (plan, values) in values_of(alone).items():
        assert before[number][0] == plan
        assert before[number][1] == pytest.approx(values, rel=1e-5)


def test_a_failure_costs_a_trial_and_a_death_costs_a_worker(data, tmp_path, spoil, callers_ray):
    """The worker lives on after the one; another takes its place after the other, and measures what the death took."""
    code = "if job.number == 3: raise RuntimeError('out of memory\\nwith a trace')\n" + ONCE + "os.kill(os.getpid(), 9)"
    processes = spoil("trial 3", "trial 5", code=code)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, TRIALS)
    failed = {row.number: row.failure for row in study.rows() if row.state == "failed"}
    assert failed == {3: "RuntimeError: out of memory"}
    assert all(row.plan.key for row in study.rows())
    assert len(set(processes())) == 2


def test_workers_that_die_again_and_again_end_the_launch(data, tmp_path, monkeypatch, spoil, address):
    """One line says so, each death has its reason; what was finished is kept, and with the cause gone the next launch
    goes on."""
    for module in (scheduler, retries):
        monkeypatch.setattr(module, "ATTEMPTS", 1)
    deaths = "{2: lambda: os.kill(os.getpid(), 9), 3: lambda: os._exit(5), 4: lambda: sys.exit(7)}"
    spoil("trial 2", "trial 3", "trial 4", code=f"import sys\n{deaths}[job.number]()")
    study = Study(data, tmp_path / "run")
    with pytest.raises(GaveUp, match=r"every attempt of 3 jobs in succession .*exit code 7") as caught:
        study.launch(quiet(), address)
    assert "\n" not in str(caught.value)
    before = values_of(study)
    assert list(before) == [0, 1]
    reasons = [row.failure.rpartition(";")[0] for row in study.rows() if row.state == "failed"]
    assert reasons[0] == KILLED
    assert all(reason.startswith(DIED) for reason in reasons[1:])
    alone = again(study, workers=0)
    alone.launch(quiet())
    check_whole(alone, before, TRIALS)


def test_a_spoiled_factor_file_is_named_by_the_worker(data, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    data["search"]["workers"] = 0
    study = make_run(data, tmp_path / "run")
    before = values_of(study)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"corrupt.*--rebuild"):
        again(study, workers=1, trials=TRIALS + 2).launch(quiet(), address)
    mended = again(study, trials=TRIALS + 2)
    mended.launch(quiet(), rebuild=True)
    check_whole(mended, before, TRIALS + 2)


def test_a_stop_ends_the_cluster_too(data, tmp_path):
    data["search"]["trials"] = 500
    run, file = tmp_path / "run", write_study(data, tmp_path / "study.toml")
    with started("launch", file, "--run", run) as process:
        reached = wait_for(lambda: finished(run) >= 2, lambda: process.poll() is None)
        cluster = psutil.Process(process.pid).children(recursive=True) if reached else []
        _, stderr = ctrl_c(process) if reached else process.communicate()
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


def check_parts(study, source):
    """Every part of the menu is measured once, and so are slopes around trials."""
    attributes = optuna_study(study).user_attrs
    parts = [name for name in attributes if name.startswith("menu ")]
    wanted = make_space(study.setup()).wanted()
    groups = len(wanted) if source == "grouped" else 0  # two blocks: every site is a group
    assert len(parts) == attributes["menu 0"]["jobs"] == menu_jobs(source, len(wanted)) + groups
    assert (len(parts) > 1) == (source != "gradient")
    sites = [site for name in parts for site in attributes[name].get("predictions", {})]
    assert len(set(sites)) == len(sites) == len(wanted)
    slopes = [trial for trial in optuna_study(study).trials if "slopes_of" in trial.user_attrs]
    assert slopes
    assert all("slopes" in trial.user_attrs for trial in slopes)


@pytest.mark.parametrize("source", ["probes", "gradient"])
def test_the_parts_of_a_menu_are_jobs_in_one_process_too(model_folder, text_file, tmp_path, source):
    study = make_run(small_data(model_folder, text_file, sampler=OURS, menu=source, trials=14), tmp_path / "run")
    check_whole(study, {}, 14)
    check_parts(study, source)


def test_two_workers_share_the_menu_and_slopes(model_folder, text_file, tmp_path, spoil, address):
    """Parts of the menu are jobs like trials: whichever worker is free measures them. There are never more workers than
    asked for, however short their jobs, and they have the launcher's priority."""
    spoil()
    data = small_data(model_folder, text_file, sampler=OURS, menu="grouped", trials=14, workers=2)
    study = launched(Study(data, tmp_path / "run"), address)
    check_whole(study, {}, 14)
    begun = Path(os.environ["JOURNAL"] + ".workers").read_text(encoding="utf-8").splitlines()
    assert len(begun) == 2
    assert {int(line.split()[1]) for line in begun} == {os.getpriority(os.PRIO_PROCESS, 0)}
    check_parts(study, "grouped")


RAYS_WORDS = {
    'ray::Worker.train() (pid=1)\n  File "a.py", line 1, in step\n    raise\nKeyError: 1\nmore': "KeyError: 1",
    "The actor died\n\tpid: 1\nWorker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a"
    " connection error code 2. End of file. Some common causes include: (1) the process": KILLED,
    "The actor died\nWorker exit type: SYSTEM_ERROR Worker exit detail: Worker exits with an exit code 3.": (
        f"{DIED}: Worker exits with an exit code 3."
    ),
    "The actor died because its node has died. Node Id: abc": (
        f"{DIED}: The actor died because its node has died. Node Id: abc"
    ),
    "": DIED,
}


@pytest.mark.parametrize("words", RAYS_WORDS)
def test_a_reason_is_one_line_of_rays_words(words):
    assert reason_of(words) == RAYS_WORDS[words]


@pytest.mark.parametrize(("wanted", "named"), [((4096, 1), "search.workers is 4096"), ((1, 4096), "cpu is 4096")])
def test_what_this_machine_cannot_have_is_refused_before_ray_starts(wanted, named, monkeypatch):
    monkeypatch.setattr(workers.ray, "init", lambda *_, **__: pytest.fail("it has started"))
    monkeypatch.setattr(workers, "WORKER_BYTES", 1e12)
    with pytest.raises(InputError, match=named) as caught:
        workers._connect(None, wanted[0], ResourcesConfig(cpu=wanted[1]))
    assert "\n" not in str(caught.value)
