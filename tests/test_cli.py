"""The command line: what it prints, what it writes, its exit codes, and one line for every kind of bad input."""

import contextlib
import csv
import html
import json
import shutil
import sqlite3
from dataclasses import replace

import pytest
from common import save_folder
from launching import again, contents, make_run, optuna_study, quiet, small_data, verify_here, write_study
from optuna.trial import TrialState

from rankfront.methods import FAMILIES, method_names
from rankfront.search.__main__ import run
from rankfront.search.attributes import SITES
from rankfront.search.errors import Interrupted
from rankfront.search.output.tables import plan_json
from rankfront.search.plans.plan import Plan
from rankfront.search.storage.front import StudyState
from rankfront.search.study import Study

TRIALS = 7


@pytest.fixture(scope="session")
def finished_run(model_folder, text_file, tmp_path_factory):
    """A finished run, to read only."""
    return make_run(small_data(model_folder, text_file, trials=TRIALS), tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A finished run of the test's own."""
    shutil.copytree(finished_run.run.path, tmp_path / "run")
    return Study.open(tmp_path / "run")


@pytest.fixture
def ok(capsys):
    """Run a command that works; its standard output."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refused(capsys):
    """Run a command that is the user's mistake: exit code 2, nothing on stdout, one line, which is returned."""

    def call(*arguments, code=2):
        capsys.readouterr()
        found = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if not line.endswith(" ...")]  # phases that began
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("rankfront: ")
        return lines[0]

    return call


# -- what others wrote is shown as it is

ODD = "\x1b[2J[red]boom[/] :boom: \u202e<b>"
SHOWN = "\\x1b[2J[red]boom[/] :boom: \\u202e<b>"


@pytest.fixture
def odd_run(finished_run, tmp_path):
    """A run whose folder, origins and failures mean something to terminals, to rich and to browsers."""
    folder = tmp_path / "[bold]x[" / "y]"
    shutil.copytree(finished_run.run.path, folder)
    study = optuna_study(Study.open(folder), write=True)
    trial = study.ask()
    trial.set_user_attr("failure", ODD)
    study.tell(trial, state=TrialState.FAIL)
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as database, database:
        database.execute("DELETE FROM trial_system_attributes WHERE key LIKE 'rankfront:%'")  # checksums
        database.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = 'origin'", (json.dumps(ODD),))
    return folder


def test_nothing_that_others_wrote_is_interpreted(odd_run, ok, refused, tmp_path):
    front = ok("front", odd_run)
    assert "[bold]x[/y]" in front
    assert f"failed trials, such as {TRIALS}: {SHOWN}" in front
    assert front.count("\\x1b[2J[red]boom[/] :boom:") > 1  # origins too, however they are wrapped
    shown = ok("show", odd_run, "0")
    assert f"trial 0 ({SHOWN}: dense)" in shown
    assert "\x1b" not in front + shown
    assert "\u202e" not in front + shown
    assert "\\x1b" in refused("export", odd_run, "--out", tmp_path / "out", "--trial", str(TRIALS))
    ok("report", odd_run, "--out", tmp_path / "[b]x.html")
    page = (tmp_path / "[b]x.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert f"<td>{html.escape(SHOWN)}" in page
    assert ":boom: \\\\u202e<b>" not in page


def test_models_with_odd_names_are_listed(model_folder, ok, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "[red]m")
    monkeypatch.chdir(tmp_path)
    assert "sites of [red]m" in ok("methods", "--model", "[red]m")


# -- methods, front, show


def test_methods(ok):
    table = ok("methods")
    listed = json.loads(ok("methods", "--json"))
    assert sorted(method["name"] for method in listed) == sorted(["dense", *method_names()])
    keys = {"name", "paper", "family", "geometry", "metric", "formula", "needs", "nested"}
    assert all(method.keys() == keys for method in listed)
    assert list(dict.fromkeys(method["family"] for method in listed)) == ["dense", *FAMILIES]
    assert all(name in table for name in (*method_names(), *FAMILIES))


def test_methods_say_what_they_refuse(ok, model_folder):
    listed = json.loads(ok("methods", "--model", model_folder, "--json"))
    by_name = {method["name"]: method["refuses"] for method in listed}
    assert set(by_name["dense"].values()) == {None}
    assert by_name["svd-llm"]["self_attn.q_proj"] is None
    assert by_name["svd-llm"]["self_attn.v_proj+o_proj"] == "it treats one weight at a time"
    assert by_name["vo-svd"]["self_attn.v_proj+o_proj"] is None
    assert all(reason is None or "\n" not in reason for refuses in by_name.values() for reason in refuses.values())
    assert f"1 of {len(by_name['dense'])} kinds" in " ".join(ok("methods", "--model", model_folder).split())


def test_front_table(finished_run, ok):
    printed = ok("front", finished_run.run.path)
    for row in finished_run.front():
        assert row.origin in printed
        assert f"{row.report['perplexity']:.4g}" in printed
    assert f"hypervolume {finished_run.hypervolume():.4f}" in printed
    assert "reference" in printed


def test_front_json_is_as_documented(finished_run, ok):
    data = json.loads(ok("front", finished_run.run.path, "--json"))
    assert data["objectives"] == ["perplexity", "parameters"]
    assert data["hypervolume"] == pytest.approx(finished_run.hypervolume())
    assert data["dense"]["values"]["parameters"] == 1.0
    assert [trial["number"] for trial in data["trials"]] == list(range(TRIALS))
    front = {row.number for row in finished_run.front()}
    for trial in data["trials"]:
        assert {
            "number", "state", "origin", "values", "report", "block_parameters", "pareto", "seconds"
        } <= trial.keys()  # fmt: skip
        assert trial["state"] == "complete"
        assert trial["pareto"] == (trial["number"] in front)
        known = trial["pareto"] or trial["origin"] == "anchor: dense"  # which the others are compared with
        assert (trial["report"]["perplexity"] is not None) == known
        assert {"apply", "evaluate"} <= trial["seconds"].keys()
        assert 0 < trial["block_parameters"] <= 1


def test_front_json_is_json_for_every_reader(own_run, ok):
    """No NaN or Infinity, which Python writes and other readers refuse; failed trials included."""
    raw = optuna_study(own_run, write=True)
    failed = raw.ask()
    failed.set_user_attr("failure", "RuntimeError: out of memory")
    raw.tell(failed, state=TrialState.FAIL)

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(ok("front", own_run.run.path, "--json"), parse_constant=refuse)
    assert data["trials"][-1]["failure"] == "RuntimeError: out of memory"
    assert data["trials"][-1]["values"] == {}


def test_where_limits_what_is_listed(finished_run, ok):
    path = finished_run.run.path
    limit = sorted(row.values["parameters"] for row in finished_run.rows())[TRIALS // 2]
    data = json.loads(ok("front", path, "--json", "--where", f"parameters<={limit!r}"))
    met = {row.number for row in finished_run.rows() if row.values["parameters"] <= limit}
    assert {trial["number"] for trial in data["trials"]} == met
    two = json.loads(ok("front", path, "--json", "--where", f"parameters<={limit!r}", "--where", "perplexity<0"))
    assert two["trials"] == []
    assert "0 trials" in ok("front", path, "--where", "parameters<=0.01")


def test_csv_and_report(finished_run, ok, tmp_path):
    assert ok("front", finished_run.run.path, "--csv", tmp_path / "t.csv") == ""
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == list(range(TRIALS))
    expected = [row.values["perplexity"] for row in finished_run.rows()]
    assert [float(row["perplexity"]) for row in rows] == pytest.approx(expected)
    assert {"origin", "pareto", "block_parameters", "seconds.apply"} <= rows[0].keys()
    assert ok("report", finished_run.run.path, "--out", tmp_path / "t.html") == ""
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert f"{finished_run.hypervolume():.4f}" in page
    assert "src=" not in page.split("<body>")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.html"]


def test_show(finished_run, ok):
    number = finished_run.front()[-1].number
    plan = finished_run.trial(number).plan
    data = json.loads(ok("show", finished_run.run.path, number, "--json"))
    assert data["number"] == number
    assert len(data["sites"]) == len({site["site"] for site in data["sites"]})
    for site in data["sites"]:
        option = plan.option(site["site"])
        assert (site["method"], site["level"]) == (option.method, dict(option.level))
        assert 0 < site["keep"] <= 1
    table = ok("show", finished_run.run.path, number)
    assert all(site in table for site, _ in plan.choices)


def test_a_run_of_an_earlier_version_is_shown_through_its_model(finished_run):
    """One that kept neither sites nor what each of them stores: to the same figures."""
    found = finished_run.read()
    known = {name: record for name, record in found.state.known.items() if name != SITES}
    rows = [replace(row, stored=None) for row in found.rows]
    earlier = replace(found, state=StudyState(found.state.trials, known, rows))
    assert SITES in found.state.known
    for row in found.front():
        assert plan_json(earlier, earlier.trial(row.number)) == plan_json(found, row)


def test_reading_changes_nothing(finished_run, ok):
    before = contents(finished_run)
    ok("front", finished_run.run.path, "--json")
    ok("show", finished_run.run.path, 0)
    assert contents(finished_run) == before


# -- launch


def test_launch_prints_the_front_and_goes_on(model_folder, text_file, tmp_path, ok, monkeypatch):
    """The run folder is named after the study file; limits come from options, other keys from --set."""
    monkeypatch.chdir(tmp_path)
    file = write_study(small_data(model_folder, text_file, trials=30), tmp_path / "mine.toml")
    printed = ok("launch", file, "--trials", 3, "--time", "10m", "--workers", 0, "--set", "search.seed=4")
    assert "hypervolume" in printed
    study = Study.open(tmp_path / "runs" / "mine")
    assert study.config.search.seed == 4
    assert len(study.rows()) == 3
    ok("launch", file, "--set", "search.trials=4", "--set", "search.seed=4", "--run", "runs/mine")
    assert len(study.rows()) == 4


# -- export


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--trial", "2"], lambda study: study.trial(2)),
        (["--where", "block_parameters<=0.7"], lambda study: study.best("block_parameters<=0.7")),
        (["--where", "parameters<=0.95", "--where", "perplexity>1"], lambda study: study.best("parameters<=0.95")),
        (["--max-parameters", "0.8"], lambda study: study.best("parameters<=0.8")),
        (["--max-perplexity", "1e6"], lambda study: study.best()),
        (["--knee"], lambda study: study.knee()),
        (["--knee", "--max-parameters", "0.9"], lambda study: study.knee("parameters<=0.9")),
        ([], lambda study: study.best()),
        (["--format", "dense", "--trial", "1"], lambda study: study.trial(1)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_picks(finished_run, ok, tmp_path, monkeypatch, options, chosen):
    verify_here(monkeypatch)
    ok("export", finished_run.run.path, "--out", tmp_path / "out", *options)
    plan = Plan.from_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert plan == chosen(finished_run).plan
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert ("rankfront" in config) == (bool(plan.choices) and "dense" not in options)


def test_export_within_a_latency(model_folder, text_file, tmp_path, ok, monkeypatch):
    verify_here(monkeypatch)
    data = small_data(model_folder, text_file, trials=4)
    data["objectives"]["latency"] = {"prompt": 8, "decode": 2, "rounds": 3, "seconds": 0}
    study = make_run(data, tmp_path / "run")
    bound = max(row.values["latency"] for row in study.rows())
    ok("export", study.run.path, "--out", tmp_path / "out", "--max-latency", bound)
    assert all({"latency_spread", "latency_prefill"} <= row.attributes["notes"].keys() for row in study.rows())
    assert all("latency" in row.attributes["seconds"] for row in study.rows())
    assert "latency" in ok("front", study.run.path)


# -- evaluate


def test_evaluate_dense_and_exported(finished_run, model_folder, text_file, ok, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    options = ["--text", text_file, "--windows", 4, "--length", 32]
    dense = json.loads(ok("evaluate", model_folder, *options, "--json"))
    row = finished_run.best("parameters<=0.8")
    ok("export", finished_run.run.path, "--out", tmp_path / "out", "--trial", row.number)
    ours = json.loads(ok("evaluate", tmp_path / "out", *options, "--json"))
    for figures in (dense, ours):
        assert figures["tokens"] == 4 * 32
        assert figures["perplexity"] > 1
        assert figures["prefill_tokens_per_second"] > 0
        assert figures["decode_ms_per_token"] > 0
    assert ours["parameters"] == row.attributes["parameter_count"]
    assert ours["parameters"] / dense["parameters"] == pytest.approx(row.values["parameters"])
    assert "perplexity" in ok("evaluate", model_folder, *options)
    for model, figures in ((model_folder, dense), (tmp_path / "out", ours)):
        packed = json.loads(ok("evaluate", model, *options, "--prepack", "--json"))
        assert packed["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-3)
        assert {name: packed[name] for name in ("parameters", "bytes")} == {
            name: figures[name] for name in ("parameters", "bytes")
        }


def test_evaluate_agrees_with_the_trial(finished_run, model_folder, text_file, ok, monkeypatch):
    """The same windows in the same dtype give the same perplexity."""
    from rankfront.search.output import evaluate

    monkeypatch.setattr(evaluate, "pick_dtype", lambda dtype, device: "float32")
    windows = finished_run.setup().tokens["search"]
    monkeypatch.setattr(evaluate, "rows_of", lambda *_, **__: {"evaluate": windows})
    found = json.loads(ok("evaluate", model_folder, "--text", text_file, "--windows", 4, "--length", 32, "--json"))
    assert found["perplexity"] == pytest.approx(finished_run.trial(0).values["perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_evaluate_a_model_of_few_positions(text_file, ok, tmp_path, name):
    """Learned positions end at 64 here: the timing's prompt and continuation stay within them."""
    folder = save_folder(name, tmp_path / name)
    found = json.loads(ok("evaluate", folder, "--text", text_file, "--windows", 4, "--length", 64, "--json"))
    assert found["decode_ms_per_token"] > 0


# -- bad input


def _table(table, /, **keys):
    def change(data):
        data[table] |= keys

    return change


def _rule(**rule):
    return _table("space", rule=[rule])


BAD_STUDIES = {
    "unknown model": (_table("model", name="smollm2-135"), ["smollm2-135", "smollm2-135m"]),
    "folder without a model": (_table("model", name="."), ["config.json"]),
    "missing gguf": (_table("model", name="absent.gguf"), ["absent.gguf"]),
    "unknown dtype": (_table("model", dtype="float8"), ["float8", "bfloat16"]),
    "unknown device": (_table("model", device="abacus"), ["abacus"]),
    "unknown method": (_table("space", methods=["svd-lm"]), ["svd-lm", "did you mean 'svd-llm'"]),
    "unknown method in a rule": (_rule(match="*", methods=["asvdd"]), ["asvdd", "asvd"]),
    "no methods": (_table("space", methods=[]), ["space.methods"]),
    "unknown sampler": (_table("search", sampler="tpee"), ["tpee", "did you mean 'tpe'"]),
    "unknown key": (_table("search", trails=3), ["search.trails", "did you mean 'trials'"]),
    "unknown table": (lambda data: data.update({"serach": {}}), ["serach", "did you mean 'search'"]),
    "unknown objective": (lambda data: data["objectives"].update({"perplexitty": {}}), ["did you mean 'perplexity'"]),
    "unknown objective key": (
        lambda data: data["objectives"].update({"latency": {"promt": 3}}),
        ["promt", "did you mean 'prompt'"],
    ),
    "one objective": (lambda data: data["objectives"].pop("parameters"), ["two or more objectives"]),
    "no objective": (lambda data: data["objectives"].clear(), ["two or more objectives"]),
    "a space of nothing": (_table("space", include=["nothing"]), ["space is empty"]),
    "everything excluded": (_table("space", exclude=["*"]), ["space is empty"]),
    "a space without levels": (_table("space", keep=[]), ["keep"]),
    "levels above one": (_table("space", keep=[0.5, 1.5]), ["1.5", "between 0 and 1"]),
    "levels of zero": (_table("space", keep=[0.0]), ["between 0 and 1"]),
    "levels of a rule": (_rule(match="*", keep=[2.0]), ["2.0", "between 0 and 1"]),
    "no rank that fits": (_table("space", rank_multiple=4096), ["space is empty", "rank_multiple"]),
    "rank multiple of zero": (_table("space", rank_multiple=0), ["rank_multiple"]),
    "anchors out of range": (_table("search", anchors=[1.2]), ["anchors", "1.2"]),
    "negative trials": (_table("search", trials=-1), ["search.trials", "-1"]),
    "a time that is none": (_table("search", time="soon"), ["soon", "20m"]),
    "negative workers": (_table("search", workers=-1), ["search.workers"]),
    "no processor": (_table("search", resources={"cpu": 0}), ["search.resources.cpu"]),
    "windows too short": (_table("data", length=2), ["data.length"]),
    "text too short": (_table("data", search={"text": "pydoc", "windows": 10**6}), ["tokens", "need", "32,000,000"]),
    "missing text": (_table("data", search={"text": "absent.txt", "windows": 2}), ["absent.txt"]),
    "malformed hub text": (_table("data", search={"text": "hub:x", "windows": 2}), ["hub:NAME/CONFIG:SPLIT"]),
    "part out of range": (_table("data", search={"windows": 2, "part": [0.5, 0.2]}), ["part"]),
    "unreadable storage": (_table("search", storage="nosuch://x"), ["nosuch://x"]),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_a_bad_study_is_refused(model_folder, text_file, tmp_path, refused, monkeypatch, name):
    """One line names what is wrong, and no trial is measured."""
    monkeypatch.chdir(tmp_path)
    change, named = BAD_STUDIES[name]
    data = small_data(model_folder, text_file)
    change(data)
    line = refused("launch", write_study(data, tmp_path / "study.toml"))
    assert all(word in line for word in named)
    assert not (tmp_path / "runs" / "study" / "study.db").exists()


def test_windows_beyond_a_models_positions_are_refused(text_file, tmp_path, refused, monkeypatch):
    """Learned positions end at 64 here."""
    monkeypatch.chdir(tmp_path)
    data = small_data(save_folder("gpt2", tmp_path / "gpt2"), text_file)
    data["data"]["length"] = 128
    line = refused("launch", write_study(data, tmp_path / "study.toml"))
    assert "128" in line
    assert "64" in line


BAD_LAUNCHES = {
    "no such file": (["absent.toml"], "absent.toml"),
    "not TOML": (["broken.toml"], "not valid TOML"),
    "not text": (["binary.toml"], "not valid TOML"),
    "a folder": (["folder.toml"], "does not exist"),
    "an override without a value": (["study.toml", "--set", "search.trials"], "KEY=VALUE"),
    "an override of an unknown key": (["study.toml", "--set", "search.trails=3"], "did you mean 'trials'"),
    "an override of a wrong kind": (["study.toml", "--set", "search.trials=many"], "search.trials"),
    "an override below a value": (["study.toml", "--set", "data.length.x=3"], "data.length.x"),
    "trials that are no number": (["study.toml", "--trials", "x"], "--trials"),
    "a time that is none": (["study.toml", "--time", "later"], "later"),
    "an unknown option": (["study.toml", "--trails", "3"], "--trails"),
    "no study file": ([], "STUDY.toml"),
    "a run that is a file": (["study.toml", "--run", "study.toml"], "study.toml"),
}


@pytest.mark.parametrize("name", BAD_LAUNCHES)
def test_a_bad_launch_is_refused(model_folder, text_file, tmp_path, refused, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_study(small_data(model_folder, text_file), tmp_path / "study.toml")
    (tmp_path / "broken.toml").write_text("[search\ntrials = ", encoding="utf-8")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    arguments, named = BAD_LAUNCHES[name]
    assert named in refused("launch", *arguments)


BAD_READS = {
    "front of no run": (["front", "{empty}"], "not a run folder"),
    "show of no run": (["show", "{empty}", "0"], "not a run folder"),
    "export of no run": (["export", "{empty}", "--out", "{out}"], "not a run folder"),
    "front of a folder that is not there": (["front", "{empty}/absent"], "not a run folder"),
    "show of no trial": (["show", "{run}", "99"], "no trial 99"),
    "show of a negative trial": (["show", "{run}", "--", "-1"], "no trial -1"),
    "show of no number": (["show", "{run}", "x"], "trial"),
    "export of no trial": (["export", "{run}", "--out", "{out}", "--trial", "99"], "no trial 99"),
    "nothing so small": (["export", "{run}", "--out", "{out}", "--max-parameters", "0.01"], "closest is trial"),
    "nothing so good": (["export", "{run}", "--out", "{out}", "--max-perplexity", "0.5"], "closest is trial"),
    "no knee so small": (["export", "{run}", "--out", "{out}", "--knee", "--where", "bytes<9"], "closest is trial"),
    "nothing that is both": (
        ["export", "{run}", "--out", "{out}", "--where", "parameters<0.5", "--where", "parameters>0.9"],
        "closest is trial",
    ),
    "latency was not measured": (["export", "{run}", "--out", "{out}", "--max-latency", "1"], "latency"),
    "a limit that is none": (["front", "{run}", "--where", "parameters=0.5"], "'parameters<=0.8'"),
    "a limit without a number": (["front", "{run}", "--json", "--where", "parameters<=small"], "'parameters<=0.8'"),
    "a limit on an unknown figure": (["front", "{run}", "--where", "parametres<1"], "did you mean 'parameters'"),
    "a bound that is no number": (["export", "{run}", "--out", "{out}", "--max-parameters", "nan"], "nan"),
    "a trial and a limit": (["export", "{run}", "--out", "{out}", "--trial", "1", "--knee"], "--trial"),
    "a folder that is taken": (["export", "{run}", "--out", "{run}"], "not empty"),
    "an unknown format": (["export", "{run}", "--out", "{out}", "--format", "onnx"], "onnx"),
    "no folder named": (["export", "{run}"], "--out"),
    "evaluate nothing": (["evaluate", "{empty}"], "config.json"),
    "evaluate an unknown model": (["evaluate", "no/such-model"], "no/such-model"),
    "evaluate on no text": (["evaluate", "{model}", "--text", "absent.txt"], "absent.txt"),
    "evaluate on too short a text": (["evaluate", "{model}", "--text", "{text}", "--windows", "99999"], "tokens"),
    "evaluate on no windows": (["evaluate", "{model}", "--windows", "0"], "--windows"),
    "evaluate on long windows": (["evaluate", "{gpt2}", "--text", "{text}", "--length", "128"], "128"),
    "an unknown command": (["lanch"], "lanch"),
}


@pytest.mark.parametrize("name", BAD_READS)
def test_a_bad_command_is_refused(finished_run, model_folder, text_file, tmp_path, refused, monkeypatch, name):
    verify_here(monkeypatch)
    arguments, named = BAD_READS[name]
    if "{gpt2}" in arguments:
        save_folder("gpt2", tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    places = {
        "empty": tmp_path / "empty",
        "run": finished_run.run.path,
        "out": tmp_path / "out",
        "model": model_folder,
        "text": text_file,
        "gpt2": tmp_path / "gpt2",
    }
    before = contents(finished_run)
    assert named in refused(*(argument.format(**places) for argument in arguments))
    assert not (tmp_path / "out").exists()
    assert contents(finished_run) == before


def test_a_changed_study_is_refused(own_run, tmp_path, refused):
    data = own_run.config.model_dump(mode="json")
    data["space"]["keep"] = [0.3]
    line = refused("launch", write_study(data, tmp_path / "study.toml"), "--run", own_run.run.path)
    assert "space.keep" in line
    assert "[0.3]" in line


def test_a_second_launcher_is_refused(own_run, tmp_path, refused):
    file = write_study(own_run.config.model_dump(mode="json"), tmp_path / "study.toml")
    with own_run.run.lock():
        assert "is being launched" in refused("launch", file, "--run", own_run.run.path)


CORRUPT_PLANS = {
    "not JSON": "{broken",
    "not a table": "[]",
    "of a later version": '{"version": 99, "origin": {}, "sites": {}}',
    "without sites": '{"version": 1}',
    "sites that are no table": '{"version": 1, "sites": 3}',
    "an unknown method": '{"version": 1, "sites": {"model.layers.0.mlp.up_proj": {"method": "svdd", "rank": 2}}}',
    "without a rank": '{"version": 1, "sites": {"model.layers.0.mlp.up_proj": {"method": "svd"}}}',
    "a rank that is none": '{"version": 1, "sites": {"model.layers.0.mlp.up_proj": {"method": "svd", "rank": "x"}}}',
    "an unknown site": '{"version": 1, "sites": {"model.layers.9.mlp.up_proj": {"method": "svd", "rank": 2}}}',
}


@pytest.mark.parametrize("name", CORRUPT_PLANS)
def test_a_corrupt_plan_is_named(own_run, tmp_path, refused, monkeypatch, name):
    """In one trial of the storage: that trial can be neither shown nor exported, the others can."""
    verify_here(monkeypatch)
    with sqlite3.connect(own_run.run.path / "study.db") as connection:
        query = "SELECT t.trial_id FROM trials t WHERE t.number = 4"
        (number,) = connection.execute(query).fetchone()
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'plan' AND trial_id = ?",
            (json.dumps(CORRUPT_PLANS[name]), number),
        )
    for arguments in (
        ["show", own_run.run.path, 4],
        ["export", own_run.run.path, "--out", tmp_path / "out", "--trial", 4],
    ):
        assert "trial 4 " in (line := refused(*arguments))
        assert "damaged" in line
    assert not (tmp_path / "out").exists()
    assert own_run.trial(3).plan.choices


def test_a_corrupt_factor_file_is_named(own_run, tmp_path, refused, monkeypatch, capsys):
    """An export that needs it says which and how to mend it, and works after that."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    verify_here(monkeypatch)
    row = own_run.best("parameters<=0.9")
    arguments = ["export", own_run.run.path, "--out", tmp_path / "out", "--trial", row.number]
    assert run([str(argument) for argument in [*arguments[:3], tmp_path / "first", *arguments[4:]]]) == 0
    capsys.readouterr()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    line = refused(*arguments)
    assert "corrupt" in line
    assert "--rebuild" in line
    assert not (tmp_path / "out").exists()
    file = write_study(own_run.config.model_dump(mode="json"), tmp_path / "study.toml")
    assert run(["launch", str(file), "--run", str(own_run.run.path), "--rebuild"]) == 0
    assert run([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("spoiled", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"spoiled" * 50])
def test_a_spoiled_model_folder_is_named(own_run, text_file, tmp_path, refused, monkeypatch, spoiled, content):
    """An export or any other folder whose files were damaged: one line."""
    verify_here(monkeypatch)
    own_run.export(tmp_path / "out", own_run.trial(2))
    (tmp_path / "out" / spoiled).write_bytes(content)
    line = refused("evaluate", tmp_path / "out", "--text", text_file, "--windows", 2, "--length", 32)
    assert str(tmp_path / "out") in line


def test_a_storage_that_is_gone_is_named(own_run, refused):
    """The definition is there and no trial is."""
    for file in own_run.run.path.glob("study.db*"):
        file.unlink()
    assert "launch" in refused("export", own_run.run.path, "--out", own_run.run.path / "out")
    for file in own_run.run.path.glob("study.db*"):
        file.unlink()
    (own_run.run.path / "study.db").write_bytes(b"spoiled" * 1000)
    assert "storage" in refused("front", own_run.run.path)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_an_unfinished_run_can_be_read(model_folder, text_file, tmp_path, monkeypatch, ok, refused):
    """A run with no trial at all lists none; what needs one says so."""
    study = Study(small_data(model_folder, text_file), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("rankfront.search.measure.runner.JobRunner.run", _interrupt)
        with pytest.raises(Interrupted):
            study.launch(quiet())
    data = json.loads(ok("front", study.run.path, "--json"))
    assert data["dense"] is None
    assert data["hypervolume"] is None
    assert [trial for trial in data["trials"] if trial["state"] == "complete"] == []
    assert "launch" in refused("export", study.run.path, "--out", tmp_path / "out")
    assert "launch" in refused("report", study.run.path, "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_no_command_shows_the_help(capsys):
    run([])
    captured = capsys.readouterr()
    assert "launch" in captured.out + captured.err
    assert len((captured.out + captured.err).splitlines()) > 5  # as help, not squeezed into one line


@pytest.mark.parametrize("command", [[], ["launch"], ["front"], ["show"], ["export"], ["evaluate"], ["methods"]])
def test_help(ok, command):
    assert "--help" in ok(*command, "--help")


def test_where_a_file_cannot_be_written(finished_run, tmp_path, refused):
    """The place is the user's choice; whichever code it gets, it is one line and no trace."""
    for command, option in (("front", "--csv"), ("report", "--out")):
        line = refused(command, finished_run.run.path, option, tmp_path / "absent" / "x", code=1)
        assert "absent" in line


def test_a_run_goes_on_after_reading(own_run, ok):
    ok("front", own_run.run.path)
    longer = again(own_run, trials=TRIALS + 1)
    longer.launch()
    assert len(longer.rows()) == TRIALS + 1
