"""One command from a model to a smaller folder, and the study files that fit a model and a machine."""

import json
import tomllib

import pytest
import torch
from launching import quiet
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search import compress as compressing
from rankfront.search.__main__ import run
from rankfront.search.config import make_config
from rankfront.search.estimate.draft import EFFORTS, Subject, draft
from rankfront.search.estimate.request import Request
from rankfront.search.inputs.model import count_parameters
from rankfront.search.measure import footprint
from rankfront.search.measure.runner import MEASURES
from rankfront.search.quantities import parse_bytes, parse_count, said_bytes, said_time
from rankfront.search.study import Study

SMALL = ("search.trials=4", "search.resources.cpu=1")  # of tiny models one thread has one order of sums
LESS = [f"--set={each}" for each in SMALL]


@pytest.fixture
def call(capsys):
    """(Exit code, standard output, standard error) of a command."""

    def called(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


def test_a_model_becomes_smaller_in_one_go_and_the_command_goes_on_where_it_stopped(
    model_folder, text_file, tmp_path, call, verified_here, monkeypatch
):
    out, folder = tmp_path / "small", tmp_path / "small.run"
    command = ["compress", model_folder, "--keep", "0.7", "--out", out, "--text", text_file, "--effort=quick", *LESS]
    measure = MEASURES["trial"]

    def stops(runner, job):
        monkeypatch.setitem(MEASURES, "trial", measure)
        raise KeyboardInterrupt

    monkeypatch.setitem(MEASURES, "trial", stops)
    code, printed, said = call(*command)
    assert (code, printed) == (1, "")
    assert "it may be half or twice as long" in said
    assert f"text: {text_file.name}, mixed with what the dense model samples" in " ".join(said.split())
    assert not out.exists()
    study = (folder / "study.toml").read_text(encoding="utf-8")
    assert make_config(tomllib.loads(study)).search.where == ("parameters<=0.7",)

    code, printed, said = call(*command)
    assert code == 0, said
    assert "it may be half or twice as long" not in said  # the study is there
    assert "best perplexity within parameters<=0.7: " in said
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    stored = json.loads((folder / "compress.json").read_text(encoding="utf-8"))["made"]
    dense = stored["dense_parameters"]
    assert count_parameters(model) == stored["parameters"] <= 0.7 * dense
    assert f"{stored['parameters']:,} parameters ({stored['parameters'] / dense:.3f} of dense)" in printed
    assert f"dense {stored['dense_perplexity']:.4g}" in printed
    assert f"from_pretrained({str(out)!r}, trust_remote_code=True)" in printed.replace("\n", "")
    row = Study.open(folder).trial(stored["trial"])
    assert row.report["perplexity"] == stored["perplexity"]
    assert (folder / "study.toml").read_text(encoding="utf-8") == study

    monkeypatch.setattr(Study, "launch", None)  # nothing is left to do
    out.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(folder / "made-factored")  # as after a kill just before the last step
    assert call(*command)[:2] == (0, printed)
    assert call(*command)[:2] == (0, printed)
    assert out.is_dir()
    code, _, said = call(*command[:2], "--keep", "0.6", *command[4:])
    assert code == 2
    assert "was begun with keep = 0.7 and this is 0.6" in said
    code, _, said = call(*command, "--run", tmp_path)
    assert code == 2
    assert "name another folder by --run" in said


def test_the_result_is_healed_and_written_for_an_engine(model_folder, text_file, tmp_path, verified_here):
    """In the model's own class, which loads without us; its perplexity is that of the healed model."""
    request = Request(
        str(model_folder), parameters="20k", text=str(text_file), serve="plain", heal=2000, effort="quick",
        overrides=(*SMALL, "model.dtype=float32"),
    )  # fmt: skip
    made, folder = compressing.compress(request, tmp_path / "small", tmp_path / "run", quiet())
    assert folder == tmp_path / "run"
    assert (made.form, made.healed) == ("plain", 2000)
    assert made.parameters <= 20_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert count_parameters(model) == made.parameters
    study = Study.open(folder)
    assert f"before healing: {study.trial(made.trial).report['perplexity']:.4g}" in made.notes
    assert study.config.data.heal.windows == -(-2120 // 64)
    windows = study.setup().tokens["report"]
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert float(loss.exp()) == pytest.approx(made.perplexity, rel=1e-3)


def test_a_study_file_that_fits_can_be_launched_as_it_stands(model_folder, tmp_path, call):
    code, study, said = call("init", "--model", model_folder, "--effort=quick", *LESS)
    assert code == 0
    assert "text: what the dense model samples" in said
    assert "about " in said
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    assert tomllib.loads(study)["objectives"] == {"perplexity": {}, "parameters": {}}
    commented = [line for line in study.splitlines() if " = " in line]
    assert sum("#" in line for line in commented) > len(commented) / 3
    code, _, said = call("launch", tmp_path / "study.toml", "--run", tmp_path / "run")
    assert code == 0, said
    assert len(Study.open(tmp_path / "run").rows()) >= 4


def test_what_is_asked_for_becomes_limits_of_a_study(model_folder):
    """Of 22,112 parameters. What is not treated stays: blocks keep less than the model, and are compared at less."""
    name = str(model_folder)

    def drafted(**asked):
        request = Request(name, **asked)
        return draft(request, Subject.of(request), EFFORTS["quick"])

    kept = drafted(keep=0.7)
    assert (kept["search"]["where"], kept["search"]["anchors"]) == (["parameters<=0.7"], [0.5])
    assert drafted(parameters="15k", keep=0.9)["search"]["where"] == ["parameters<=0.678364"]
    on_disk = drafted(bytes="35kB", overrides=("model.dtype=bfloat16",))
    assert on_disk["search"]["where"] == ["bytes<=35000"]
    assert "gptq-int8" in on_disk["space"]["methods"]
    assert "gptq-int8" in drafted(bytes="70kB", heal=100, overrides=("model.dtype=float32",))["space"]["methods"]
    served = drafted(bytes="35kB", serve="gguf")
    assert served["search"]["where"] == ["parameters<=0.791425"]  # two bytes a value
    assert served["space"] == {
        "methods": ["nystrom", "drop-block"],
        "keep": served["space"]["keep"],
        "servable": "gguf",
    }
    held = drafted(memory="100kB", batch=2, context=32)
    assert held["objectives"] == {"perplexity": {}, "memory": {"batch": 2, "context": 32}}
    assert (held["search"]["where"], held["space"]["keep"][0]) == (["memory<=100000"], 0.2)
    assert make_config(held).data.report.text == "self"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "how small is not said"),
        (["--keep", "1.2"], "--keep is 1.2: give a fraction"),
        (["--parameters", "many"], "--parameters is 'many': write a number such as 100M"),
        (["--parameters", "1B"], "keeps the limit as it is"),
        (["--bytes", "2 gigs"], "--bytes is '2 gigs': write 2GB"),
        (["--bytes", "1kB"], "no plan of this space can meet: the smallest bytes is"),
        (["--keep", "0.7", "--heal", "1M", "--text", "short.txt"], "give a longer text"),
        (["--keep", "0.7", "--set", "search.trials"], "does not read as KEY=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    options, reason, model_folder, tmp_path, call, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    monkeypatch.setattr(compressing, "probe", None)
    code, printed, said = call("compress", model_folder, "--out", "small", *options)
    assert (code, printed) == (2, "")
    assert reason in " ".join(said.split())
    assert not (tmp_path / "small.run").exists()


def test_what_does_not_fit_the_machine_is_refused(model_folder, monkeypatch):
    request = Request(str(model_folder), keep=0.7, effort="quick", overrides=SMALL)
    lines = []
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"takes about \d+ MB of memory and cpu has 1 kB free: "):
        compressing.propose(request, lines.append)


def test_amounts_read_and_write_as_people_do():
    assert parse_bytes("2GB", "x") == parse_bytes("2000mb", "x") == 2_000_000_000
    assert parse_bytes("1.5GiB", "x") == 3 * 2**29
    assert parse_count("1.1B", "x") == parse_count("1_100M", "x") == 1_100_000_000
    assert [said_bytes(each) for each in (12, 30_700, 1.93e9)] == ["12 B", "30.7 kB", "1.93 GB"]
    assert [said_time(each) for each in (0.2, 80, 720, 12_000)] == ["1 s", "80 s", "12 min", "3 h 20 min"]
