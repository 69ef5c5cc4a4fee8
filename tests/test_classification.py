"""Models that classify texts: from labelled rows to the reloaded export."""

import csv
import json

import common
import pytest
import torch
import transformers
from launching import make_run
from test_encoders import CLS, ENCODERS, PAD, SEP, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from rankfront.methods import InputError
from rankfront.objectives import score
from rankfront.objectives._model_task import SequenceClassification
from rankfront.objectives._scores import error_rate
from rankfront.search.config import make_config
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs.labelled import labelled_rows, read_rows
from rankfront.search.inputs.sites import find_sites
from rankfront.search.output.evaluate import evaluate
from rankfront.search.splits import Split
from rankfront.search.study import Study

TASK, LENGTH, CLASSES = SequenceClassification(PAD), 24, {"no": 0, "yes": 1, "maybe": 2}
KINDS = {**ENCODERS, "llama": common.GROUPED | {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}}


def build(name):
    names = {"id2label": {number: label for label, number in CLASSES.items()}, "label2id": CLASSES}
    config = transformers.AutoConfig.for_model(name, **KINDS[name], **names)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    common.randomise(model)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Sixty short texts of several lengths, labelled by name and by number."""
    lines = [
        {"text": common.random_text(6 + number % 17, number), "label": [*CLASSES, 0, 1, 2][number % 6]}
        for number in range(60)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(rows_file):
    return read_rows(str(rows_file), tiny_tokenizer(), LENGTH, CLASSES)


def study_data(folder, rows_file):
    split = {"text": str(rows_file), "windows": 12}
    return {
        "model": {"name": str(folder), "dtype": "float32", "device": "cpu", "task": "sequence-classification"},
        "data": {"length": LENGTH, "calibrate": split, "search": split, "report": split},
        "space": {"methods": ["fwsvd", "svd-llm", "vo-svd", "nystrom"], "keep": [0.4, 0.7], "rank_multiple": 2},
        "objectives": {"divergence": {}, "parameters": {}, "error_rate": {}},
        "search": {"workers": 0, "trials": 8, "resources": {"cpu": 1}},
    }


def save(name, folder):
    build(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- rows


def test_rows_are_class_ids_and_padding(rows, rows_file, tmp_path):
    assert rows.shape == (60, 1 + LENGTH)
    assert rows[:, 0].tolist() == [number % 3 for number in range(60)]
    assert set(rows[:, 1].tolist()) == {CLS}
    there = rows[:, 1:] != PAD
    assert there.sum(1).tolist() == [min(LENGTH, 8 + number % 17) for number in range(60)]
    table = tmp_path / "rows.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "class"])
        for line in rows_file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            writer.writerow([row["text"], row["label"]])
    assert torch.equal(read_rows(f"{table}#sentence,class", tiny_tokenizer(), LENGTH, CLASSES), rows)


def test_splits_share_no_row(rows_file, rows):
    text = str(rows_file)
    splits = {"a": Split(text, 20), "b": Split(text, 20, (0.0, 0.5)), "c": Split(text, 10)}
    found = labelled_rows(tiny_tokenizer(), splits, LENGTH, CLASSES)
    assert {name: len(own) for name, own in found.items()} == {"a": 20, "b": 20, "c": 10}
    everything = torch.cat(list(found.values()))
    assert len(everything.unique(dim=0)) == 50
    assert (everything[:, None] == rows[None]).all(-1).any(1).all()
    with pytest.raises(InputError, match="ask for fewer"):
        labelled_rows(tiny_tokenizer(), splits | {"d": Split(text, 20)}, LENGTH, CLASSES)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n', "row 1 of text .* has no 'label'"),
        ("a.jsonl", '{"text": "x", "label": "never"}\n', "has label 'never', and the model's are"),
        ("a.jsonl", "", "has no rows"),
        ("a.txt", "text", "is no file of labelled rows"),
    ],
)
def test_rows_that_are_none_are_refused_in_a_line(name, content, said, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_rows(str(tmp_path / name), tiny_tokenizer(), LENGTH, CLASSES)


# -- figures


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_scores_are_those_of_transformers_own_loss(name, rows):
    """Padding changes nothing: each text alone, and not filled up, gives the same."""
    model, losses, wrong = build(name), [], []
    for row in rows:
        ids = row[1:][row[1:] != PAD][None]
        out = model(input_ids=ids, labels=row[:1])
        losses.append(float(out.loss))
        wrong.append(int(out.logits.argmax()) != int(row[0]))
    assert score(model, rows, task=TASK).loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert error_rate(model, rows, TASK) == sum(wrong) / len(wrong)


def test_the_task_gives_the_fisher_information_and_padding_none(rows):
    """As FWSVD has it: gradients of the classification's loss; sums over the tokens of each text alone."""
    model = build("bert")
    site = next(site for site in find_sites(model) if site.name.endswith("layer.1.intermediate.dense"))
    module, gram, fisher = model.get_submodule(site.name), 0, 0
    model.get_input_embeddings().weight.requires_grad_(True)
    for row in rows[:8]:
        seen = {}
        handle = module.register_forward_hook(lambda m, x, y, seen=seen: seen.update(x=x[0].detach(), y=y))
        loss = model(input_ids=row[1:][row[1:] != PAD][None], labels=row[:1]).loss
        handle.remove()
        (g,) = torch.autograd.grad(loss, seen["y"])
        gram += seen["x"][0].T @ seen["x"][0]
        fisher += g[0].square().sum(1) @ seen["x"][0].square()
    model.requires_grad_(False)
    ((_, found),) = calibrate(model, rows[:8], [site], frozenset({"gram", "fisher"}), lambda *_: None, task=TASK)
    summed = found["weight"].gram.sandwich(torch.eye(common.HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(summed, gram.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["weight"].fisher, fisher, rtol=1e-3, atol=1e-6)
    assert found["weight"].tokens == int((rows[:8, 1:] != PAD).sum())


# -- from the study to the export


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_from_the_study_to_the_reloaded_export(name, rows_file, tmp_path, verified_here):
    folder = save(name, tmp_path / "m")
    study = make_run(study_data(folder, rows_file), tmp_path / "run")
    found = study.rows()
    assert "failed" not in {row.state for row in found}
    assert all(0 <= row.values["error_rate"] <= 1 for row in found if row.state == "complete")
    assert all(0 <= row.report["error_rate"] <= 1 for row in study.front())
    treated = next(row for row in found if row.state == "complete" and row.plan.choices)
    search = study.setup().tokens["search"]
    for form in ("factored", "dense"):
        study.export(tmp_path / form, treated, form=form)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / form)
        assert score(model, search, task=TASK).perplexity == pytest.approx(treated.figure("perplexity"), rel=1e-3)
        assert error_rate(model, search, TASK) == treated.values["error_rate"]
        AutoModel.from_pretrained(tmp_path / form)
    card = (tmp_path / "factored" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card
    assert "| error rate, report split (rows.jsonl) |" in card
    said = evaluate(str(tmp_path / "factored"), str(rows_file), 12, LENGTH, dtype="float32", task=TASK.name)
    assert 0 <= said["error_rate"] <= 1


def test_what_needs_windows_of_one_length_is_refused(rows_file, tmp_path):
    data = study_data(tmp_path, rows_file)
    data["search"]["refit"] = "sequential"
    with pytest.raises(InputError, match=r"leave out search\.refit"):
        make_config(data)


@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [("bert", 1, "a regression, which has no classes"), ("llama", 3, "a decoder, whose tokens see none after them")],
)
def test_what_is_no_encoder_with_classes_is_refused(name, labels, said, rows_file, tmp_path):
    config = transformers.AutoConfig.for_model(name, **KINDS[name], num_labels=labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=said):
        Study(study_data(tmp_path, rows_file)).setup()
