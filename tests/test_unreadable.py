"""Models that cannot be read: whatever is wrong with their files is one line, and no code of theirs runs."""

import json
import os
import shutil
from pathlib import Path

import common
import pytest
import torch

from rankfront.methods import InputError
from rankfront.search.inputs.model import load_model, load_tokenizer, skeleton
from rankfront.search.inputs.resolve import resolve
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.output.evaluate import evaluate
from rankfront.search.output.export import write_factored
from rankfront.search.study import Study


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny Llama to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "m"))


def settings(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(function, *arguments, **named) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def load(folder):
    return load_model(resolve(str(folder)), torch.float32, "cpu")


TEXTS = {
    "a list": b"[1, 2]",
    "a string": b'"llama"',
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "cut short": b'{"model_type": "lla',
    "nothing": b"",
    "too deep": b"[" * 100_000,
    "without a type": b"{}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_configuration_that_is_none_is_one_line(folder, text):
    (folder / "config.json").write_bytes(text)
    for part in (skeleton, lambda source: load_model(source, torch.float32, "cpu")):
        assert str(folder) in refusal(part, resolve(str(folder)))


CHANGES = [
    {"model_type": "nonsuch"},
    {"model_type": 7},
    {"model_type": ["llama"]},
    {"model_type": "vit"},
    {"hidden_size": -32},
    {"hidden_size": "32"},
    {"hidden_size": float("nan")},
    {"hidden_size": 10**30},
    {"num_attention_heads": 0},
    {"num_attention_heads": 7},
    {"num_hidden_layers": 10**9},
    {"hidden_act": "nonsuch"},
    {"dtype": "nonsuch"},
    {"rope_parameters": {"rope_type": "nonsuch"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"auto_map": 3},
    {"pad_token_id": 10**6},
    {"quantization_config": [1]},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_configuration_that_describes_no_model_is_one_line(folder, changes):
    settings(folder, **changes)
    for part in (skeleton, lambda source: load_model(source, torch.float32, "cpu")):
        assert str(folder) in refusal(part, resolve(str(folder)))


def test_more_memory_than_there_is_is_no_error_of_the_input(folder, monkeypatch):
    monkeypatch.setattr("rankfront.search.inputs.model.MOST_VALUES", 10**12)  # else it is refused before it is tried
    settings(folder, vocab_size=10**12)
    with pytest.raises(MemoryError, match="memory") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_more_than_the_checkpoint_could_fill_is_refused_before_it_is_allocated(folder):
    settings(folder, vocab_size=10**12)
    assert "restore the config.json that belongs to it" in refusal(load, folder)


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:-100], lambda old: b"junk" * 100])
def test_damaged_weights_are_one_line(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "weights" in refusal(load, folder)


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_loads_its_tensors_and_runs_nothing(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    file, ids = folder / "pytorch_model.bin", common.tokens(1, 8)
    model = common.architecture("llama").build()
    torch.save(model.state_dict(), file)
    assert torch.equal(load(folder)(ids).logits, model(ids).logits)
    whole = file.read_bytes()
    for spoiled in (whole[: len(whole) // 2], b"", b"junk" * 100):
        file.write_bytes(spoiled)
        assert "weights" in refusal(load, folder)
    torch.save(model.state_dict() | {"evil": Evil(tmp_path / "ran")}, file)
    assert "weights_only" in refusal(load, folder)
    assert not (tmp_path / "ran").exists()


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_its_method(folder, method):
    settings(folder, quantization_config=QUANTISED[method])
    for part in (skeleton, lambda source: load_model(source, torch.float32, "cpu")):
        message = refusal(part, resolve(str(folder)))
        assert repr(method) in message
        assert "unquantised" in message


def test_tokenizers_that_are_missing_or_damaged_are_one_line(folder):
    tokenizer = folder / "tokenizer.json"
    whole = tokenizer.read_bytes()
    for spoiled in (whole[:300], b"{}", b"\xff\xfe", b""):
        tokenizer.write_bytes(spoiled)
        assert "tokenizer" in refusal(load_tokenizer, resolve(str(folder)))
    tokenizer.unlink()
    assert "tokenizer" in refusal(load_tokenizer, resolve(str(folder)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for spoiled in (b"junk" * 50, b""):
        (folder / "tokenizer.model").write_bytes(spoiled)
        assert "tokenizer" in refusal(load_tokenizer, resolve(str(folder)))


def test_token_ids_beyond_the_table_are_one_line_with_both_numbers(tmp_path, text_file):
    small = common.architecture("llama").build()
    small.resize_token_embeddings(20)
    small.save_pretrained(tmp_path / "m")
    common.tiny_tokenizer().save_pretrained(tmp_path / "m")
    study = Study(common.study_data(tmp_path / "m", text_file))
    messages = [
        refusal(evaluate, str(tmp_path / "m"), str(text_file), 1, 8, device="cpu"),
        refusal(lambda: make_space(study.setup())),
    ]
    assert all("token id" in message and "20 rows" in message for message in messages)


def test_a_factored_export_is_no_model_of_a_study(setup, tmp_path, text_file):
    resident = JobRunner(setup)
    resident.compressed.apply(common.random_plan(resident, 3))
    write_factored(resident.compressed, tmp_path / "out")
    common.tiny_tokenizer().save_pretrained(tmp_path / "out")
    study = Study(common.study_data(tmp_path / "out", text_file))
    assert "factored export" in refusal(lambda: make_space(study.setup()))
