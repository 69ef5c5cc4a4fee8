"""What the machine has of what is needed: one line each, and an exit code."""

from importlib import metadata

import pytest

from rankfront.search.__main__ import run
from rankfront.search.run import workers


@pytest.fixture
def examined(monkeypatch, capsys):
    """(Exit code, name -> line) of the command, Ray being asked for by nothing but ``init``."""

    def call(init=lambda *_, **__: None):
        monkeypatch.setattr(workers.ray, "init", init)
        monkeypatch.setattr(workers.ray, "cluster_resources", lambda: {"CPU": 1})
        code = run(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        return code, {line[8:24].strip(): line for line in lines}

    return call


def test_all_that_is_needed_is_there(examined):
    code, lines = examined()
    assert code == 0
    for name in ("python", "rankfront", "torch", "transformers", "cpu", "memory", "cache", "ray"):
        assert lines[name].startswith("ok ")
    assert metadata.version("torch") in lines["torch"]
    assert "HF_HUB_OFFLINE is set" in lines["hub"]
    assert "the extra llama-cpp" in lines["xllamacpp"]


def test_what_is_missing_or_too_old_is_named_with_its_remedy(examined, monkeypatch):
    version = metadata.version

    def changed(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else version(name)

    monkeypatch.setattr(metadata, "version", changed)
    code, lines = examined()
    assert code == 1
    assert lines["scipy"].startswith("MISSING")
    assert "not installed: pip install 'scipy>=1.14'" in lines["scipy"]
    assert "1.0 is not" in lines["torch"]
    assert "pip install 'torch" in lines["torch"]
    assert "cpu" not in lines  # which torch would be asked about


def test_without_ray_trials_run_one_by_one(examined):
    def refuses(*_, **__):
        raise RuntimeError("no port is free\nmore")

    code, lines = examined(refuses)
    assert code == 0
    assert lines["ray"].startswith("- ")
    assert "does not start (no port is free): trials run one by one, with --workers 0" in lines["ray"]
