"""Fixtures: tiny random models, a tiny tokenizer, a text. Nothing is downloaded and no cache outside is touched."""

import os
import shutil

import common
import launching
import pytest
import serving
import sqlalchemy
import torch
from optuna.storages._rdb.storage import _VersionManager
from spoiling import journal as journal  # fixtures of several files
from spoiling import spoil as spoil

from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import Setup
from rankfront.search.study import Study


@pytest.fixture(scope="session", autouse=True)
def _session():
    """One thread, whatever a launch asks for: tiny matrices run fastest on it, its sums have one order, and two wait
    for each other where cores are busy. No database waits for the disk, and none has the history of Optuna's tables
    read again: to do so takes longer than a trial."""
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None
    read, history = _VersionManager._create_alembic_script, []

    def once(manager):
        if not history:
            history.append(read(manager))
        return history[0]

    _VersionManager._create_alembic_script = once
    sqlalchemy.event.listen(
        sqlalchemy.Engine, "connect", lambda connection, record: connection.execute("PRAGMA synchronous = OFF")
    )
    yield
    shutil.rmtree(os.environ["RANKFRONT_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def never_joined(monkeypatch):
    """No clock decides how models run here; tests of what it does decide override this."""
    monkeypatch.setattr("rankfront.search.measure.joining.faster", lambda *_: False)


@pytest.fixture(autouse=True)
def always_prepacked(monkeypatch):
    """Nor which weights are prepacked."""
    monkeypatch.setattr("rankfront.methods.prepacked.faster", lambda *_: True)


@pytest.fixture(params=common.ARCHITECTURES, ids=lambda row: row.name)
def architecture(request):
    """Each row of `common.ARCHITECTURES` in turn."""
    return request.param


@pytest.fixture
def model(architecture):
    """A tiny random model of the architecture, the test's own to change."""
    return architecture.build()


@pytest.fixture(scope="session")
def tokenizer():
    return common.tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny untied Llama and its tokenizer, saved as a local folder."""
    return common.save_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory):
    """The same with tied embeddings."""
    return common.save_folder("llama-tied", tmp_path_factory.mktemp("llama-tied"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text of about 24,000 characters, and as many tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(common.random_text(24_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def setup(model_folder, text_file) -> Setup:
    return Study(common.study_data(model_folder, text_file)).setup()


@pytest.fixture(scope="session")
def _resident(setup):
    return JobRunner(setup)


@pytest.fixture
def resident(_resident):
    """A resident tiny Llama with its factor store; dense again after the test."""
    common.restore(_resident)
    yield _resident
    common.restore(_resident)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory, text_file):
    """Name of a tiny decoder -> what it is compressed and served from."""
    return serving.make_worlds(tmp_path_factory, text_file)


@pytest.fixture
def verified_here(monkeypatch):
    """Exports are verified in this process, not in one of their own."""
    launching.verify_here(monkeypatch)
