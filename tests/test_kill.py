"""Kill the launcher at any moment and launch again: nothing finished is lost, nothing is repeated."""

import shutil
import time

import pytest
from launching import (
    PATIENCE,
    check_whole,
    ctrl_c,
    finished,
    sigterm,
    small_data,
    started,
    values_of,
    wait_for,
    write_study,
)

from rankfront.search.__main__ import run as command_line
from rankfront.search.atomic import partial_of
from rankfront.search.study import Study

TRIALS = 30


@pytest.fixture
def study_file(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, trials=TRIALS, sampler="tpe")
    return write_study(data, tmp_path / "study.toml")


def test_killed_again_and_again(study_file, tmp_path, monkeypatch):
    """Between two factor files, then at arbitrary moments among the trials; every launch gets a little further, and
    the last one to the end."""
    cache, run, before = tmp_path / "cache", tmp_path / "run", {}

    def launch_and_kill(due, after=0.0):
        with started("launch", study_file, "--run", run, RANKFRONT_CACHE=str(cache)) as process:
            reached = wait_for(due, lambda: process.poll() is None)
            time.sleep(after)
            process.kill()
            _, stderr = process.communicate(timeout=PATIENCE)
        assert reached, f"the launch ended before it could be killed: {stderr}"

    launch_and_kill(lambda: len(list(cache.rglob("*.safetensors"))) >= 3)
    assert finished(run) == 0
    for turn, more in enumerate((1, 1, 2, 4)):
        target = len(before) + more
        launch_and_kill(lambda target=target: finished(run) >= target, 0.02 * turn)  # seconds: other steps of a trial
        study = Study.open(run)
        kept = values_of(study)
        assert kept.items() >= before.items()
        assert [row.state for row in study.rows()].count("running") <= 1
        before = kept
    assert len(before) < TRIALS

    monkeypatch.setenv("RANKFRONT_CACHE", str(cache))
    assert command_line(["launch", str(study_file), "--run", str(run)]) == 0
    study = Study.open(run)
    check_whole(study, before, TRIALS)
    assert all(row.report is not None for row in study.front())
    assert [path for path in cache.rglob("*") if path.name.startswith(".")] == []


def test_a_half_written_definition_is_none(study_file, tmp_path):
    """A launcher that died while it wrote study.json leaves its partial file, which nobody reads."""
    run = tmp_path / "run"
    run.mkdir()
    partial_of(run / "study.json").write_text('{"version": 1, "conf', encoding="utf-8")
    assert command_line(["launch", str(study_file), "--run", str(run), "--trials", "3"]) == 0
    check_whole(Study.open(run), {}, 3)


@pytest.mark.parametrize(("stop", "moment"), [(ctrl_c, "preparing"), (ctrl_c, "searching"), (sigterm, "searching")])
def test_a_stop_ends_cleanly_and_says_how_to_go_on(study_file, tmp_path, stop, moment):
    cache, run = tmp_path / "cache", tmp_path / "run"
    with started("launch", study_file, "--run", run, RANKFRONT_CACHE=str(cache)) as process:
        if moment == "preparing":
            defined = run / "study.json"  # not the first file of a launch
            reached = wait_for(
                lambda: defined.is_file() and any(cache.rglob("*.safetensors")), lambda: process.poll() is None
            )
        else:
            reached = wait_for(lambda: finished(run) >= 3, lambda: process.poll() is None)
        stdout, stderr = stop(process)
    assert reached
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("rankfront: stopped")
    assert "run the same command again to go on" in last

    study = Study.open(run)
    before = values_of(study)
    assert "running" not in {row.state for row in study.rows()}
    shutil.rmtree(cache, ignore_errors=True)  # its factors are made again
    trials = len(before) + 2
    assert command_line(["launch", str(study_file), "--run", str(run), "--trials", str(trials)]) == 0
    check_whole(Study.open(run), before, trials)
