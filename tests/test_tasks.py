"""Tasks of lm-eval: whom they are measured of, where their scores are shown, and what is refused."""

import importlib.util
import json

import pytest
from launching import again, make_run, quiet, small_data

from rankfront.methods import InputError
from rankfront.objectives.tasks import Tasks
from rankfront.search.__main__ import run as command_line
from rankfront.search.config import make_config
from rankfront.search.output.report import report_page
from rankfront.search.study import Study

NAMES = ["colours", "numbers"]
BOTH = {"perplexity": {}, "parameters": {}}
REAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=4)


@pytest.fixture
def asked(monkeypatch):
    """The harness is another's: here it answers at once, and says what it was asked for."""
    calls = []

    def scores(self, model, tokenizer):
        calls.append(self)
        size = sum(parameter.numel() for parameter in model.parameters())
        return {name: 1 / (2 + number + 1e-6 * size) for number, name in enumerate(self.names)}

    monkeypatch.setattr(Tasks, "scores", scores)
    monkeypatch.setattr(Tasks, "check", lambda self: None)
    return calls


def test_members_of_the_front_are_measured_and_no_other(data, asked, tmp_path, capsys):
    data["objectives"] = BOTH | {"tasks": {"names": NAMES, "limit": 5}}
    study = make_run(data, tmp_path / "run")
    assert list(study.config.objectives) == list(BOTH)
    reported = [row for row in study.rows() if row.report is not None]
    assert len(asked) == len(reported) >= len(study.front())
    assert all(call.limit == 5 for call in asked)
    scores = study.front()[-1].report["tasks"]["scores"]
    assert list(scores) == NAMES
    page = report_page(study.read())
    assert command_line(["front", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"{scores[name]:.4g}" in printed
        assert f"<th>{name}</th>" in page
    assert command_line(["front", str(tmp_path / "run"), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert trials[study.front()[-1].number]["report"]["tasks"]["scores"] == scores


def test_they_are_measured_once_and_anew_where_others_are_asked_for(data, asked, tmp_path):
    study = make_run(data, tmp_path / "run")
    assert not asked
    data["objectives"] = BOTH | {"tasks": {"names": NAMES}}
    Study(data, tmp_path / "run").launch(quiet())
    first = len(asked)
    assert first > 0
    Study(data, tmp_path / "run").launch(quiet())
    assert len(asked) == first
    data["objectives"]["tasks"]["names"] = NAMES[:1]
    Study(data, tmp_path / "run").launch(quiet())
    assert len(asked) == 2 * first
    assert [row.values for row in Study.open(tmp_path / "run").rows()] == [row.values for row in study.rows()]


def test_one_that_fails_costs_no_report_and_is_tried_again(data, asked, tmp_path, monkeypatch):
    data["objectives"] = BOTH | {"tasks": {"names": NAMES}}
    with monkeypatch.context() as patch:
        patch.setattr(Tasks, "scores", lambda *_: {}["no data\nat all"])
        study = make_run(data, tmp_path / "run")
    for row in study.front():
        assert row.report["perplexity"] > 1
        assert row.report["tasks"]["failure"].startswith("'no data")
        assert "\n" not in row.report["tasks"]["failure"]
    again(study).launch(quiet())
    assert all("scores" in row.report["tasks"] for row in Study.open(tmp_path / "run").front())


def test_trials_are_scored_by_them_where_search_says_so(data, asked, tmp_path):
    data["objectives"] = BOTH | {"tasks": {"names": NAMES, "search": True}}
    study = make_run(data, tmp_path / "run")
    complete = [row for row in study.rows() if row.state == "complete"]
    assert len(asked) == len(complete)
    assert all(0 < row.values["tasks"] < 1 for row in complete)
    assert Study.open(tmp_path / "run").config == study.config


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({}, "list tasks of lm-eval"),
        ({"names": "arc_easy"}, "list tasks of lm-eval"),
        ({"names": ["a"], "limit": 0}, "limit is 0"),
        ({"names": ["a"], "fewshot": 1.5}, "fewshot is 1.5"),
        ({"names": ["a"], "shots": 1}, "shots"),
    ],
)
def test_what_no_task_is_asked_by_is_refused_in_one_line(tasks, said):
    for search in (False, True):
        with pytest.raises(InputError, match=said) as caught:
            make_config({"objectives": BOTH | {"tasks": tasks | {"search": search}}})
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(REAL, reason="lm-eval is installed")
def test_without_the_harness_the_launch_says_what_to_install(data, tmp_path):
    data["objectives"] = BOTH | {"tasks": {"names": NAMES}}
    with pytest.raises(InputError, match=r"pip install 'rankfront\[tasks\]'"):
        Study(data, tmp_path / "run").launch(quiet())
    assert not (tmp_path / "run").exists()


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(not REAL, reason="lm-eval is not installed")
def test_a_local_task_is_scored_by_the_harness(resident, tmp_path):
    file = tmp_path / "colours.jsonl"
    rows = [{"question": f"item {i} is", "choices": [" red", " blue"], "answer": i % 2} for i in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "colours.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    tasks = Tasks(["colours"], include_path=str(tmp_path))
    found = tasks.scores(resident.compressed.model, resident.compressed.tokenizer)
    assert found["colours"] * 6 == pytest.approx(round(found["colours"] * 6))
    with pytest.raises(InputError, match="knows no task 'shapes'"):
        Tasks(["shapes"]).scores(resident.compressed.model, resident.compressed.tokenizer)
    with pytest.raises(InputError, match=r"has the metrics \['acc'"):
        Tasks(["colours"], metric="bleu", include_path=str(tmp_path)).scores(
            resident.compressed.model, resident.compressed.tokenizer
        )
