"""A control text beside every reported figure: a plan that loses more there than its report split shows is named."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from common import random_plan
from launching import make_run, measured, optuna_study, quiet, small_data, verify_here

from rankfront.search.__main__ import run as command_line
from rankfront.search.config import make_config
from rankfront.search.measure import control
from rankfront.search.measure.control import CONTINUED, continuations, reported
from rankfront.search.output.control_check import front_warning, hidden_loss, warning
from rankfront.search.output.export import export
from rankfront.search.output.report import write_report
from rankfront.search.splits import PROMPTS
from rankfront.search.study import Study

DENSE = {"perplexity": 16.4, "control": 29.5}


@pytest.fixture(scope="module")
def study(model_folder, text_file, tmp_path_factory):
    """A finished run, to read only."""
    return make_run(small_data(model_folder, text_file, trials=5), tmp_path_factory.mktemp("control") / "run")


@pytest.mark.parametrize(
    ("report", "times"),
    [
        ({"perplexity": 16.8, "control": 43.5}, math.log(43.5 / 29.5) / math.log(16.8 / 16.4)),
        ({"perplexity": 16.0, "control": 43.5}, math.inf),
        ({"perplexity": 16.8, "control_failure": "inf"}, math.inf),
        ({"perplexity": 20.0, "control": 43.5}, None),
        ({"perplexity": 30.0, "control": 31.0}, None),
        ({"perplexity": 16.4, "control": 29.6}, None),
        ({"perplexity": 16.8}, None),
        ({"failure": "nan"}, None),
    ],
    ids=["hidden", "no loss shown", "not finite", "alike", "less than shown", "noise", "not measured", "failed"],
)
def test_what_a_control_text_loses_beyond_the_report_split(report, times):
    found = hidden_loss(report, DENSE)
    assert found == (None if times is None else pytest.approx(times))
    line = warning(report, DENSE, "self")
    assert (line is None) == (times is None)
    if line is not None:
        assert "\n" not in line
        assert "29.5" in line
        assert report.get("control_failure", "43.5") in line


def one_by_one(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    length = ids.shape[1]
    for _ in range(CONTINUED):
        likeliest = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
        if int(likeliest) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, likeliest], dim=1)
    return tokenizer.decode(ids[0, length:].tolist())


def test_prompts_are_continued_together_as_one_by_one(model, tokenizer, monkeypatch):
    """Of several lengths; on every architecture, one of which ends early."""
    prompts = ("a", "abc def", "hello there")
    monkeypatch.setattr(control, "PROMPTS", prompts)
    said = [one_by_one(model, tokenizer, prompt) for prompt in prompts]
    assert continuations(model, tokenizer) == said
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer(said[1])["input_ids"][-1])
    shorter = [one_by_one(model, tokenizer, prompt) for prompt in prompts]
    assert shorter != said
    assert continuations(model, tokenizer) == shorter


def test_every_reported_plan_has_a_control_and_continuations(study):
    rows = [row for row in study.rows() if row.report is not None]
    assert {row.number for row in study.front()} <= {row.number for row in rows}
    assert any(row.is_dense for row in rows)
    for row in rows:
        assert row.report["control"] > 1
        assert len(row.report["continuations"]) == len(PROMPTS)


def test_the_dense_model_is_reported_even_off_the_front(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, trials=5)
    data["search"]["where"] = ["parameters<=0.9"]
    study = make_run(data, tmp_path / "run")
    assert not any(row.is_dense for row in study.front())
    assert study.dense_report()["control"] > 1


def test_a_run_reported_without_a_control_gets_it_at_the_next_launch(model_folder, text_file, tmp_path, monkeypatch):
    data = small_data(model_folder, text_file, trials=3)
    with monkeypatch.context() as patch:
        patch.setitem(data["data"], "control", {"windows": 0})
        study = make_run(data, tmp_path / "run")
    assert all("control" not in row.report for row in study.front())
    file = study.run.file
    written = json.loads(file.read_text(encoding="utf-8"))
    del written["config"]["data"]["control"]  # as an earlier version wrote it
    file.write_text(json.dumps(written), encoding="utf-8")
    opened = Study.open(study.run.path)
    assert opened.config.data.control.text == "self"
    before = {row.number: row.report["perplexity"] for row in study.front()}
    opened.launch(quiet())
    assert {row.number: row.report["perplexity"] for row in opened.front()} == before
    assert all(row.report["control"] > 1 for row in opened.front())
    opened.launch(quiet())


@pytest.mark.parametrize(
    ("texts", "control"),
    [
        ({"report": "self"}, "pydoc"),
        ({"calibrate": [{"text": "self"}, {"text": "a.txt", "weight": 3}]}, "pydoc"),
        ({"calibrate": "pydoc", "search": "pydoc", "report": "pydoc"}, "self"),
        ({"calibrate": "a.txt", "search": "a.txt", "report": "hub:a/b:c"}, "self"),
        ({"control": {"windows": 5}, "calibrate": "a.txt", "search": "a.txt", "report": "a.txt"}, "self"),
        ({"control": {"text": "b.txt"}}, "b.txt"),
    ],
)
def test_the_control_is_of_another_domain_than_the_splits(texts, control):
    data = {name: text if name == "control" else {"text": text, "windows": 8} for name, text in texts.items()}
    config = make_config({"data": data})
    assert config.data.control.text == control
    assert config.data.control.windows == data.get("control", {}).get("windows", 16)
    assert make_config(config.model_dump(mode="json")) == config


def test_front_says_it_in_table_json_page_and_one_line(study, tmp_path, capsys, monkeypatch):
    worst = next(row for row in study.front() if not row.is_dense)
    dense = study.dense_report()
    lost = worst.report | {"perplexity": 1.01 * dense["perplexity"], "control": 99 * dense["control"]}
    rows = [row if row.number != worst.number else replace(row, report=lost) for row in study.front()]
    alike = [replace(row, report=dense) for row in study.front() if row.number != worst.number]
    assert front_warning(alike, dense, "self") is None
    line = front_warning([*alike, replace(worst, report=lost)], dense, "self")
    assert line.startswith(f"1 of {len(rows)} members lose far more than their figures say: trial {worst.number} ")
    writing = optuna_study(study, write=True)
    for row in rows:
        writing.set_user_attr(f"report {row.number}", lost if row.number == worst.number else dense)
    assert command_line(["front", str(study.run.path)]) == 0
    printed = capsys.readouterr().out
    assert line in printed
    assert "control" in printed
    assert command_line(["front", str(study.run.path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["control"], data["prompts"], data["warning"]) == ("self", list(PROMPTS), line)
    trial = data["trials"][worst.number]
    assert trial["report"]["control"] == lost["control"]
    assert trial["report"]["continuations"] == lost["continuations"]
    write_report(study.read(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "perplexity on self" in page
    assert line in page
    assert all(f"{prompt} …" in page for prompt in PROMPTS)


def test_a_card_has_the_control_of_a_trial_that_was_never_reported(resident, tmp_path, monkeypatch):
    """Measured at the export, beside dense, with what both say."""
    verify_here(monkeypatch)
    row = measured(resident, random_plan(resident, 1))
    assert row.report is None
    verified = export(resident.setup, row, tmp_path / "out", "factored")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    resident.compressed.apply(row.plan)
    found = reported(resident.compressed.model, resident.setup.tokens, resident.compressed.tokenizer)
    assert f"control text (self) | {found['control']:.6g} (dense:" in card
    assert all(json.dumps(text, ensure_ascii=False) in card for text in found["continuations"])
    assert all(prompt in card for prompt in PROMPTS)
    assert verified.warning is None or f"It {verified.warning}." in card
