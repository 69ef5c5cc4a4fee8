"""What may happen to a run's storage: flipped bytes, creation cut short, a full disk, a lock, a password, a move."""

import contextlib
import json
import random
import shutil
import sqlite3
import struct

import pytest
from launching import (
    again,
    check_whole,
    make_run,
    optuna_study,
    quiet,
    small_data,
    tree,
    values_of,
    verify_here,
    write_study,
)

from rankfront.methods import InputError
from rankfront.search.__main__ import run as command
from rankfront.search.attributes import DAMAGED
from rankfront.search.measure.runner import JobRunner
from rankfront.search.storage.checked import close
from rankfront.search.storage.database import to_write
from rankfront.search.study import Study

TRIALS = 6
FLIPS = 60  # in cells that decide something, and as many anywhere


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    """A finished run, to read only."""
    data = small_data(model_folder, text_file, trials=TRIALS)
    return make_run(data, tmp_path_factory.mktemp("storage") / "run")


@pytest.fixture
def own(finished, tmp_path):
    """A finished run of the test's own."""
    shutil.copytree(finished.run.path, tmp_path / "run")
    return Study.open(tmp_path / "run")


def front_of(run, capsys):
    """(exit code, what `front --json` prints, lines of standard error)."""
    capsys.readouterr()
    code = command(["front", str(run), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err.splitlines()


def trusted(found, expected):
    """Whether every figure equals the original one, or its trial is named as damaged."""
    code, printed, errors = found
    if code:
        return printed is None and len(errors) == 1
    damaged, before = printed["damaged"], {trial["number"]: trial for trial in expected["trials"]}
    assert [trial["number"] for trial in printed["trials"]] == list(before)
    for trial in printed["trials"]:
        if trial["failure"] == DAMAGED:
            assert f"trial {trial['number']}" in damaged
            assert trial["values"] == {}
            continue
        original = before[trial["number"]]
        if f"report {trial['number']}" in damaged:
            assert trial["report"] == {"perplexity": None}
            original = original | {"report": trial["report"]}
        changed = {key for key in original if trial[key] != original[key]}
        assert changed <= ({"pareto"} if damaged else set()), changed  # the front is another without a member
    return bool(damaged) or printed == expected


def places_of(content, *needles):
    """Where the cells that hold ``needles`` lie in the file."""
    for needle in needles:
        at = content.find(needle)
        while at >= 0:
            yield from range(at, at + len(needle))
            at = content.find(needle, at + 1)


def cells_of(database):
    """What decides something, as the file holds it: plans, values, draws, records, requests, checksums."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        columns = [f"value_json FROM {table}_attributes" for table in ("trial_user", "trial_system", "study_user")]
        columns += ["distribution_json FROM trial_params", "key FROM trial_user_attributes"]
        texts = connection.execute("SELECT " + " UNION SELECT ".join(columns))
        cells = [text.encode() for (text,) in texts]
        numbers = connection.execute("SELECT value FROM trial_values UNION SELECT param_value FROM trial_params")
        cells += [struct.pack(">d", number) for (number,) in numbers if number % 1]
        return [*cells, b"COMPLETE", b"FINITE"]


def flipped(content, place, bit):
    spoiled = bytearray(content)
    spoiled[place] ^= 1 << bit
    return bytes(spoiled)


def test_no_flipped_byte_changes_a_figure_unseen(own, capsys):
    """In cells that decide something, systematically; anywhere, at random."""
    database, draw = own.run.database, random.Random(0)
    content, (_, expected, _) = database.read_bytes(), front_of(own.run.path, capsys)
    cells = [cell for cell in cells_of(database) if cell in content]  # what is longer than a page is in pieces
    assert expected["damaged"] == []
    places = [draw.choice(list(places_of(content, cell))) for cell in draw.sample(cells, FLIPS)]
    places += [draw.randrange(len(content)) for _ in range(FLIPS)]
    named = 0
    for place in places:
        database.write_bytes(flipped(content, place, draw.randrange(8)))
        found = front_of(own.run.path, capsys)
        assert trusted(found, expected), (place, found)
        named += found[0] == 0 and bool(found[1]["damaged"])
    assert named > FLIPS / 2


def execute(study, *statements):
    with contextlib.closing(sqlite3.connect(study.run.database)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement


OF = "WHERE trial_id = (SELECT trial_id FROM trials WHERE number = {number})"
DAMAGES = {
    "plan": "UPDATE trial_user_attributes SET value_json = replace(value_json, 'sites', 'site') {of} AND key = 'plan'",
    "values": "UPDATE trial_values SET value = value * 1.0001 {of} AND objective = 0",
    "draws": "UPDATE trial_params SET param_value = 1 - (param_value > 0) {of}",
    "attribute": "UPDATE trial_user_attributes SET value_json = value_json + 1 {of} AND key = 'parameter_count'",
    "key": "UPDATE trial_user_attributes SET key = 'bytez' {of} AND key = 'bytes'",
    "state": "UPDATE trials SET state = 'COMPLETD' {of}",
    "checksum": "UPDATE trial_system_attributes SET value_json = '\"0\"' {of} AND key LIKE '%checksum'",
}


@pytest.mark.parametrize("sampler", ["random", "rankfront"])
def test_damaged_trials_are_named_and_measured_again(model_folder, text_file, tmp_path, sampler, capsys):
    """To the same values, whatever of them was spoiled, the dense anchor among them; no sampler learns from them."""
    data = small_data(model_folder, text_file, trials=12, sampler=sampler)
    study = make_run(data, tmp_path / "run")
    before = {row.plan_key: row.values for row in study.rows()}
    numbers = [row.number for row in study.rows()][: len(DAMAGES)]
    for number, statement in zip(numbers, DAMAGES.values(), strict=True):
        execute(study, statement.format(of=OF.format(number=number)))
    rows = {row.number: row for row in study.rows()}
    assert {number for number, row in rows.items() if row.failure == DAMAGED} == set(numbers)
    assert study.damages() == [f"trial {number}" for number in numbers]
    assert command(["front", str(study.run.path)]) in (0, 2)
    assert ", ".join(study.damages()) in capsys.readouterr().out
    assert command(["show", str(study.run.path), str(numbers[0])]) == 2
    assert "damaged" in capsys.readouterr().err
    learned = [trial for trial in optuna_study(study).trials if trial.number in numbers]
    assert all(trial.values is None and not trial.params for trial in learned)

    again(study, trials=12).launch(quiet())
    after = {row.plan_key: row.values for row in study.rows() if row.state == "complete"}
    assert after == before
    assert study.damages() == []
    once = study.rows()
    again(study, trials=12).launch(quiet())
    assert study.rows() == once


def test_damaged_reports_menus_and_slopes_are_measured_again(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, trials=10, sampler="rankfront")
    study = make_run(data, tmp_path / "run")
    before, reports = optuna_study(study).user_attrs, {row.number: row.report for row in study.front()}
    slopes = [trial for trial in optuna_study(study).trials if "slopes" in trial.user_attrs]
    assert slopes
    report = f"report {min(reports)}"
    digit, slope = "replace(value_json, '1', '2')", OF.format(number=slopes[0].number)
    execute(
        study,
        f"UPDATE study_user_attributes SET value_json = {digit} WHERE key IN ('menu 0', '{report}')",
        f"UPDATE trial_user_attributes SET value_json = {digit} {slope} AND key = 'slopes'",
    )
    assert study.damages() == [f"trial {slopes[0].number}", "menu 0", report]
    assert next(row for row in study.front() if row.number == min(reports)).report is None
    again(study, trials=11).launch(quiet())
    assert study.damages() == []
    now = optuna_study(study).user_attrs
    assert now["menu 0"]["predictions"] == before["menu 0"]["predictions"]
    assert now[report]["perplexity"] == before[report]["perplexity"]
    anew = [t for t in optuna_study(study).trials if t.user_attrs.get("replaces") == slopes[0].number]
    assert [trial.user_attrs["slopes"] for trial in anew] == [slopes[0].user_attrs["slopes"]]


def without_checksums(study):
    """As an earlier version wrote it."""
    with contextlib.closing(sqlite3.connect(study.run.database)) as connection, connection:
        connection.execute("DELETE FROM trial_system_attributes WHERE key LIKE 'rankfront:%'")
        for key, text in connection.execute("SELECT key, value_json FROM study_user_attributes").fetchall():
            plain = json.dumps(json.loads(text)["record"])
            connection.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = ?", (plain, key))


def test_runs_of_earlier_versions_are_read_and_go_on(own, capsys):
    """Their trials have no checksum: plans are compared with their keys, and what is told from now on has one."""
    expected = front_of(own.run.path, capsys)
    without_checksums(own)
    assert front_of(own.run.path, capsys) == expected
    longer = again(own, trials=TRIALS + 1)
    longer.launch(quiet())
    assert longer.damages() == []
    plan = DAMAGES["plan"].replace("'sites', 'site'", "'svd', 'asvd'")
    execute(own, plan.format(of=OF.format(number=1)), DAMAGES["values"].format(of=OF.format(number=TRIALS)))
    assert own.damages() == ["trial 1", f"trial {TRIALS}"]


def test_a_trial_that_is_gone_is_said(own):
    execute(own, "DELETE FROM trials WHERE number = 2")
    with pytest.raises(InputError, match="damaged: trial") as caught:
        own.rows()
    assert "\n" not in str(caught.value)


# -- creation


def test_a_database_whose_creation_was_cut_short_is_made_again(own, finished, tmp_path):
    """After every statement of it; a later launch finds a whole one. What holds a trial is never replaced."""
    statements = []
    connection = sqlite3.connect(tmp_path / "whole.db")
    with contextlib.closing(sqlite3.connect(finished.run.database)) as whole:
        statements = [text for (text,) in whole.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]
    connection.close()
    shutil.rmtree(own.run.path)
    for count in range(len(statements)):
        run = tmp_path / f"run{count}"
        shutil.copytree(finished.run.path, run)
        (run / "study.db").unlink()
        with contextlib.closing(sqlite3.connect(run / "study.db")) as connection, connection:
            for statement in statements[:count]:
                connection.execute(statement)
            if any(text.startswith("CREATE TABLE studies") for text in statements[:count]):
                connection.execute("INSERT INTO studies (study_name) VALUES ('rankfront')")
        study = optuna_study(Study.open(run), write=True)
        assert study.trials == []
        study.ask()
        close(study)
        assert len(optuna_study(Study.open(run), write=True).trials) == 1
    assert sorted(path.name for path in run.iterdir() if "partial" in path.name) == []


def test_a_foreign_database_is_completed(own, tmp_path):
    """Without the index that keeps names apart, every launch added another study of the name."""
    data = own.config.model_dump(mode="json")
    data["search"]["storage"] = f"sqlite:///{tmp_path / 'trials.db'}"
    study = Study(data, tmp_path / "other")
    study.run.define(study.config, own.run.definition().resolved)
    with contextlib.closing(sqlite3.connect(own.run.database)) as whole:
        (table,) = whole.execute("SELECT sql FROM sqlite_master WHERE name = 'studies'").fetchone()
    with contextlib.closing(sqlite3.connect(tmp_path / "trials.db")) as connection, connection:
        connection.execute(table)
    for _ in range(2):
        optuna_study(study, write=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "trials.db")) as connection, connection:
        assert connection.execute("SELECT count(*) FROM studies").fetchone() == (1,)
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert "ix_studies_study_name" in names
        connection.execute("DROP INDEX ix_studies_study_name")
        connection.execute("INSERT INTO studies (study_name) SELECT study_name FROM studies")
    with pytest.raises(InputError, match="cannot be opened") as caught:
        optuna_study(study, write=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:", "sqlite:///file::memory:?uri=true",
            "sqlite:///file:x?mode=memory&uri=true"]
)  # fmt: skip
def test_a_storage_in_memory_is_refused(own, url):
    with pytest.raises(InputError, match="memory"):
        again(own, storage=url)


@pytest.mark.parametrize("what", ["study.db", "study.json", "."])
def test_a_run_that_is_deleted_while_it_runs_is_said_at_once(model_folder, text_file, tmp_path, monkeypatch, what):
    study = Study(small_data(model_folder, text_file, trials=8), tmp_path / "run")
    seen, told = [], JobRunner.run

    def deleting(resident, job):
        seen.append(job.number)
        if len(seen) == 2:
            path = study.run.path / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return told(resident, job)

    monkeypatch.setattr(JobRunner, "run", deleting)
    with pytest.raises(InputError, match="deleted or replaced") as caught:
        study.launch(quiet())
    assert len(seen) == 2
    assert "\n" not in str(caught.value)


# -- passwords and places


def define(study, url):
    """As a launch with this storage does."""
    changed = again(study, storage=url)
    changed.run.define(changed.config, study.run.definition().resolved)


SECRET = "s3cr3t-w0rd"


def test_a_password_is_shown_nowhere(own, tmp_path, capsys):
    """Of a storage that cannot be reached, or that no driver is there for: errors, and the mode of what holds it."""
    for url in (
        f"postgresql://me:{SECRET}@localhost:1/x",
        f"nosuch://me:{SECRET}@host/x",
        f"mysql://me:{SECRET}@h:no/x",
    ):
        with pytest.raises(InputError) as caught:
            define(own, url)
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)
    other = Study(again(own, storage=f"postgresql://me:{SECRET}@localhost:1/x").config, tmp_path / "other")
    other.run.define(other.config, {})
    assert other.run.file.stat().st_mode & 0o777 == 0o600
    assert own.run.file.stat().st_mode & 0o077
    assert command(["front", str(other.run.path)]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_a_password_that_changed_is_no_other_study(own, tmp_path):
    url = "postgresql://me:{}@localhost:1/x"
    study = Study(again(own, storage=url.format("one")).config, tmp_path / "other")
    study.run.define(study.config, {})
    define(study, url.format("two"))
    assert Study.open(study.run.path).config.search.storage == url.format("two")
    with pytest.raises(InputError, match="does not hold it"):
        define(study, "postgresql://me:one@elsewhere:1/x")


def test_a_storage_may_move_with_what_it_holds(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, trials=3, storage="sqlite:///trials.db")
    study = make_run(data, tmp_path / "run")
    assert (tmp_path / "run" / "trials.db").is_file()
    elsewhere = again(study, storage=f"sqlite:///{tmp_path / 'moved.db'}", trials=4)
    with pytest.raises(InputError, match="does not hold it"):
        elsewhere.launch(quiet())
    assert not (tmp_path / "moved.db").exists()
    (tmp_path / "run" / "trials.db").rename(tmp_path / "moved.db")
    elsewhere.launch(quiet())
    assert len(elsewhere.rows()) == 4


def test_a_relative_storage_of_before_is_named(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trials.db").touch()
    with pytest.raises(InputError, match="relative to the run folder") as caught:
        optuna_study(again(own, storage="sqlite:///trials.db"))
    assert str(tmp_path / "trials.db") in str(caught.value)


# -- reading


@pytest.mark.parametrize("left", ["finished", "killed", "killed, copied without the index of its log"])
def test_reading_writes_nothing(own, tmp_path, capsys, left):
    held = None
    if left != "finished":
        held = to_write(own.run.database)
        held.execute("UPDATE trials SET number = number")
        held.commit()
        shutil.copytree(own.run.path, tmp_path / "copy")
        held.close()
        own = Study.open(tmp_path / "copy")
        if left != "killed":
            (own.run.path / "study.db-shm").unlink()
    before = {name: content for name, content in tree(tmp_path).items() if not name.endswith("-shm")}
    run, number = str(own.run.path), str(own.front()[-1].number)
    assert [command([*arguments, run]) for arguments in (["front"], ["front", "--json"])] == [0, 0]
    assert command(["show", run, number]) == 0
    assert [command(["menu", run]), command(["solve", run, "parameters<=0.9", "--no-measure"])] == [2, 2]
    capsys.readouterr()
    after = {name: content for name, content in tree(tmp_path).items() if not name.endswith("-shm")}
    assert after.keys() == before.keys()
    assert after == before


def test_reading_makes_no_database(own, tmp_path, monkeypatch):
    """Neither in the run folder nor where a storage says."""
    (own.run.path / "study.db").unlink()
    assert own.rows() == []
    missing = Study(again(own, storage=f"sqlite:///{tmp_path / 'none.db'}").config, own.run.path)
    with pytest.raises(InputError, match="does not exist"):
        missing.rows()
    assert sorted(path.name for path in own.run.path.iterdir()) == [
        "launcher",
        "lock",
        "self.safetensors",
        "study.json",
    ]
    assert not (tmp_path / "none.db").exists()


# -- databases that fail


def test_a_full_database_loses_nothing_that_was_finished(model_folder, text_file, tmp_path, monkeypatch):
    study = Study(small_data(model_folder, text_file, trials=10), tmp_path / "run")

    def full(file):
        connection = to_write(file)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 16}")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr("rankfront.search.storage.database.to_write", full)
        with pytest.raises(InputError, match="full") as caught:
            study.launch(quiet())
    assert "\n" not in str(caught.value)
    before = values_of(study)
    assert 0 < len(before) < 10
    study.launch(quiet())
    check_whole(study, before, 10)


def test_a_locked_database_is_one_line(own, monkeypatch):
    monkeypatch.setattr("rankfront.search.storage.database.PATIENCE", 0.1)
    before = own.rows()
    with contextlib.closing(sqlite3.connect(own.run.database)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="locked") as caught:
            again(own, trials=TRIALS + 1).launch(quiet())
        assert "\n" not in str(caught.value)
        assert own.rows() == before
        holder.rollback()
    again(own, trials=TRIALS + 1).launch(quiet())
    assert len(own.rows()) == TRIALS + 1


def test_a_schema_of_another_optuna_is_one_line(own, capsys):
    execute(own, "UPDATE alembic_version SET version_num = 'v99'")
    code, _, errors = front_of(own.run.path, capsys)
    assert code == 2
    assert len(errors) == 1
    assert "optuna" in errors[0]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(own, seed):
    with pytest.raises(InputError, match=r"search\.seed"):
        again(own, seed=seed)


# -- from another folder


@pytest.fixture
def elsewhere(model_folder, text_file, tmp_path, monkeypatch):
    """A finished run of a study file with relative paths, launched in ``home``; the test stands in ``away``."""
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    shutil.copytree(model_folder, home / "models" / "tiny")
    shutil.copy(text_file, home / "text.txt")
    data = small_data("models/tiny", "text.txt", trials=3)
    write_study(data, home / "study.toml")
    monkeypatch.chdir(home)
    assert command(["launch", "study.toml"]) == 0
    monkeypatch.chdir(away)
    return home


def test_a_run_is_used_from_any_folder(elsewhere, tmp_path, monkeypatch, capsys):
    run = "../home/runs/study"
    verify_here(monkeypatch)
    assert command(["front", run]) == 0
    assert command(["show", run, "1"]) == 0
    assert command(["export", run, "--trial", "1", "--out", "small"]) == 0
    study = json.loads((elsewhere / "runs" / "study" / "study.json").read_text(encoding="utf-8"))
    assert study["config"]["model"]["name"] == str(elsewhere / "models" / "tiny")
    assert study["config"]["data"]["search"]["text"] == str(elsewhere / "text.txt")
    assert command(["launch", "../home/study.toml", "--run", run, "--trials", "4"]) == 0
    assert len(Study.open(run).rows()) == 4
    shutil.copytree(elsewhere / "models", "models")
    capsys.readouterr()
    assert command(["launch", "../home/study.toml", "--run", run]) == 2  # which names another model from here
    assert "model.name" in capsys.readouterr().err


def test_a_run_with_relative_paths_of_an_earlier_version_goes_on(elsewhere, capsys):
    file = elsewhere / "runs" / "study" / "study.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(f"{elsewhere}/", ""), encoding="utf-8")
    overrides = [f"model.name={elsewhere / 'models/tiny'}"]
    overrides += [f"data.{split}.text={elsewhere / 'text.txt'}" for split in ("calibrate", "search", "report")]
    arguments = [part for override in overrides for part in ("--set", override)]
    assert command(["launch", str(elsewhere / "study.toml"), "--run", str(file.parent), *arguments]) == 0


def test_the_home_folder_is_known_in_every_path(elsewhere, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(elsewhere))
    verify_here(monkeypatch)
    settings = ["--set", "model.name=~/models/tiny", "--set", "search.storage=sqlite:///~/trials.db"]
    settings += [
        part for split in ("calibrate", "search", "report") for part in ("--set", f"data.{split}.text=~/text.txt")
    ]
    assert command(["launch", "~/study.toml", "--run", "~/run", *settings]) == 0
    assert (elsewhere / "trials.db").is_file()
    assert command(["front", "~/run", "--csv", "~/front.csv"]) == 0
    assert command(["report", "~/run", "--out", "~/front.html"]) == 0
    assert command(["export", "~/run", "--trial", "1", "--out", "~/small"]) == 0
    assert command(["evaluate", "~/small", "--text", "~/text.txt", "--windows", "1", "--length", "32"]) == 0
    assert {"run", "front.csv", "front.html", "small"} <= {path.name for path in elsewhere.iterdir()}
    assert not list((tmp_path / "away").iterdir())
