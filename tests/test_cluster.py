"""Several nodes of a Ray cluster on one machine: one is lost while a trial runs on it, and comes back."""

import psutil
import pytest
from launching import PATIENCE, check_whole, make_run, small_data, started, values_of, wait_for, write_study
from ray.cluster_utils import Cluster
from spoiling import ONCE

from rankfront.search.study import Study

TRIALS = 8


@pytest.fixture
def cluster(monkeypatch):
    """A head without a CPU for trials, which the launcher connects to."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


def test_a_node_that_is_lost_while_a_trial_runs_and_comes_back_costs_nothing(
    model_folder, text_file, tmp_path, journal, spoil, cluster
):
    processes = spoil("trial 3", code=f"import time\n{ONCE}time.sleep(600)")
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    data = small_data(model_folder, text_file, trials=TRIALS, workers=2)
    run, file = tmp_path / "run", write_study(data, tmp_path / "study.toml")

    def stuck():
        """The node whose worker hangs in trial 3, once it does."""
        lines = [line.split() for line in journal.read_text(encoding="utf-8").splitlines()]
        pids = [int(pid) for pid, kind, number in lines if (kind, number) == ("trial", "3")]
        return [node for node in nodes for pid in pids if psutil.Process(pid).ppid() in pids_of(node)]

    with started("launch", file, "--run", run, "--address", cluster.address) as process:
        reached = wait_for(lambda: bool(stuck()), lambda: process.poll() is None)
        assert reached, process.communicate()
        cluster.remove_node(stuck()[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    study = Study.open(run)
    check_whole(study, {}, TRIALS)
    assert len(values_of(study)) == TRIALS
    assert all(row.report["perplexity"] > 1 for row in study.front())
    assert len(set(processes())) == 3
    spoil()
    alone = values_of(make_run(data | {"search": data["search"] | {"workers": 0}}, tmp_path / "alone"))
    expected = dict(alone.values())
    for plan, values in values_of(study).values():
        assert plan not in expected or values == pytest.approx(expected[plan], rel=1e-5)
    assert len(expected.keys() & {plan for plan, _ in values_of(study).values()}) >= 3  # the anchors at least


def pids_of(node):
    """The processes of a node's own services; its workers are their children."""
    return {info.process.pid for infos in node.all_processes.values() for info in infos}
