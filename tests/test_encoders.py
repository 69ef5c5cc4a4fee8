"""Encoders: masked language models from the study file to the reloaded export; see `test_scores` for causal ones."""

import common
import pytest
import torch
import transformers
from launching import make_run
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from rankfront.methods import Cost, InputError
from rankfront.methods.checkpoint import describe
from rankfront.methods.loading import Replacements
from rankfront.objectives import Clock, Subject, make_objective, score, teach
from rankfront.objectives._model_task import MASKED, MaskedLM
from rankfront.search.config import make_config
from rankfront.search.factors.calibration import calibrate
from rankfront.search.inputs.acceptance import refused
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.outline import outline_of
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites
from rankfront.search.output.evaluate import evaluate
from rankfront.search.study import Study

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
TASK = MaskedLM(MASK, tuple(range(5)))
SIZES = {
    "vocab_size": common.VOCABULARY, "hidden_size": common.HIDDEN, "intermediate_size": common.INNER,
    "num_hidden_layers": common.BLOCKS, "num_attention_heads": common.HEADS, "max_position_embeddings": 64,
    "pad_token_id": PAD,
}  # fmt: skip
ENCODERS = {
    "bert": SIZES,
    "roberta": SIZES | {"bos_token_id": CLS, "eos_token_id": SEP},
    "distilbert": {
        "vocab_size": common.VOCABULARY, "dim": common.HIDDEN, "hidden_dim": common.INNER, "n_layers": common.BLOCKS,
        "n_heads": common.HEADS, "max_position_embeddings": 64, "pad_token_id": PAD,
    },
    "modernbert": SIZES | {
        "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": CLS, "sep_token_id": SEP,
        "bos_token_id": CLS, "eos_token_id": SEP,
    },
    "electra": SIZES | {"embedding_size": 16},
}  # fmt: skip


def build(name):
    config = transformers.AutoConfig.for_model(name, **ENCODERS[name])
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    common.randomise(model)
    return model.eval().requires_grad_(False)


def tiny_tokenizer():
    """One token a character, framed as BERT's are."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *common.CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a folder with the model and the tokenizer."""
    made = {}
    for name in ENCODERS:
        made[name] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(made[name])
        tiny_tokenizer().save_pretrained(made[name])
    return made


def study_data(folder, text_file):
    data = common.study_data(folder, text_file)
    data["model"]["task"] = "masked-lm"
    data["space"]["methods"] = ["svd-llm", "fwsvd", "kfac-svd", "vo-svd", "lama", "nystrom", "drop-block"]
    data["space"]["include"] = ["*"]
    data["objectives"] = {"divergence": {}, "parameters": {}}
    data["search"] |= {"trials": 8, "refit": "sequential"}
    return data


# -- what is masked


def test_the_mask_belongs_to_the_row():
    """A fixed share of its tokens, never special ones, the same alone, among others and again."""
    rows = torch.cat([torch.full((7, 1), CLS), common.tokens(7, 30) % 80 + 5, torch.full((7, 1), SEP)], dim=1)
    places = TASK.positions(rows)
    assert places.shape == (7, TASK.predicted(32)) == (7, round(MASKED * 32))
    assert (places.diff(dim=1) > 0).all()
    assert not torch.isin(rows.gather(1, places), torch.tensor(TASK.special)).any()
    for row, own in zip(rows, places, strict=True):
        assert torch.equal(TASK.positions(row[None])[0], own)
    assert len({tuple(own.tolist()) for own in places}) > 1
    shown = TASK.inputs(rows)["input_ids"]
    assert ((shown == MASK).sum(1) == places.shape[1]).all()
    assert torch.equal(shown.scatter(1, places, TASK.targets(rows)), rows)


@pytest.mark.parametrize("name", ENCODERS)
def test_scores_are_those_of_transformers_own_loss(name):
    """Pseudo-perplexity is the exponential of the loss with labels at the masked positions alone."""
    model, rows = build(name), common.tokens(3, 24) % 80 + 5
    labels = torch.full_like(rows, -100).scatter(1, TASK.positions(rows), TASK.targets(rows))
    loss = model(**TASK.inputs(rows), labels=labels).loss
    found = score(model, rows, teach(model, rows, task=TASK), TASK)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.divergence == pytest.approx(0, abs=1e-9)


def test_gradients_are_of_masked_positions_and_grams_of_all():
    model, rows = build("bert"), common.tokens(3, 24) % 80 + 5
    site = next(site for site in find_sites(model) if site.name.endswith("layer.0.intermediate.dense"))
    seen = {}
    module = model.get_submodule(site.name)
    handle = module.register_forward_hook(lambda m, x, y: seen.update(x=x[0].detach()) or seen.update(y=y))
    model.get_input_embeddings().weight.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(
        TASK.logits(model, rows).flatten(0, 1), TASK.targets(rows).flatten(), reduction="sum"
    )
    (g,) = torch.autograd.grad(loss, seen["y"])
    handle.remove()
    model.requires_grad_(False)
    ((_, found),) = calibrate(model, rows, [site], frozenset({"gram", "fisher"}), lambda *_: None, task=TASK)
    x = seen["x"].flatten(0, 1)
    summed = found["weight"].gram.sandwich(torch.eye(common.HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(summed, (x.T @ x).double(), rtol=1e-4, atol=1e-3)
    expected = g.flatten(0, 1).square().sum(1) @ x.square()
    torch.testing.assert_close(found["weight"].fisher, expected, rtol=1e-3, atol=1e-6)


# -- from the study to the export


@pytest.mark.parametrize("name", ENCODERS)
def test_from_the_study_to_the_reloaded_export(name, folders, text_file, tmp_path, verified_here):
    study = make_run(study_data(folders[name], text_file), tmp_path / "run")
    rows = study.rows()
    assert "failed" not in {row.state for row in rows}
    dense = study.trial(0)
    assert dense.values["divergence"] == pytest.approx(0, abs=1e-6)
    assert all(row.report["perplexity"] > 0 for row in study.front())
    treated = next(row for row in rows if row.state == "complete" and row.plan.choices)
    for form in ("factored", "dense"):
        study.export(tmp_path / form, treated, form=form, refit="none")
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / form)
        windows = study.setup().tokens["search"]
        assert score(model, windows, task=TASK).perplexity == pytest.approx(treated.figure("perplexity"), rel=5e-3)
        body = AutoModel.from_pretrained(tmp_path / form)
        hidden = model(input_ids=windows[:1], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(body(input_ids=windows[:1]).last_hidden_state, hidden)
    with pytest.raises(InputError, match="an encoder, whose tokens see those after them"):  # as healing would have it
        load_model(resolve(str(tmp_path / "factored")), torch.float32, "cpu")
    card = (tmp_path / "factored" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card
    assert "masked tokens: 15%" in card


def test_latency_is_that_of_a_forward_pass(folders, text_file, tmp_path):
    """Resident bytes need no cache; a sampler of Optuna's, for tiny models' times mean nothing."""
    data = study_data(folders["bert"], text_file)
    data["objectives"] = {"perplexity": {}, "latency": {"prompt": 16, "rounds": 2, "seconds": 0}, "resident_bytes": {}}
    data["search"] |= {"sampler": "random", "trials": 3, "anchors": [0.7], "refit": "none"}
    study = make_run(data, tmp_path / "run")
    assert study.config.objectives["latency"]["decode"] == 0
    complete = [row for row in study.rows() if row.state == "complete"]
    assert len(complete) == 3
    for row in complete:
        assert row.values["latency"] > 0
        assert "latency_decode" not in row.attributes["notes"]
        assert row.values["resident_bytes"] >= row.figure("bytes")


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_flops_are_what_a_counter_counts(name):
    """Every token of an encoder attends to all of its window."""
    model, rows = build(name), common.tokens(1, 24) % 80 + 5
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows)
    subject = Subject(model, None, rows, None, Cost(1, 1, 1, 1, 1), Clock(), task=TASK)
    assert make_objective("flops", {"context": 24}).value(subject) == counter.get_total_flops() / 24


def test_an_encoder_is_evaluated(folders, text_file):
    found = evaluate(str(folders["roberta"]), str(text_file), 2, 32, dtype="float32", task="masked-lm")
    assert found["perplexity"] > 1
    assert "decode_ms_per_token" not in found
    with pytest.raises(InputError, match="an encoder, whose tokens see those after them"):
        evaluate(str(folders["roberta"]), str(text_file), 2, 32)


# -- what it starts from


@pytest.mark.parametrize("name", ENCODERS)
def test_windows_are_framed_and_positions_counted(name, folders, text_file):
    source = resolve(str(folders[name]), task="masked-lm")
    outline = outline_of(source)
    assert outline.coverage.share == 1
    longest = {"bert": 64, "roberta": 63, "distilbert": 64, "modernbert": None, "electra": 64}
    assert outline.capacity.positions == longest[name]
    windows = Study(study_data(folders[name], text_file)).setup().tokens["search"]
    assert windows.shape == (4, 32)
    assert set(windows[:, 0].tolist()) == {CLS}
    assert set(windows[:, -1].tolist()) == {SEP}
    length = longest[name] or 64
    assert torch.isfinite(TASK.logits(build(name), windows[:1].repeat(1, 2)[:, :length])).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_and_mlp_are_found_across_modules_and_in_fused_ones(name, folders):
    """And what names propose, numbers accept."""
    source = resolve(str(folders[name]), task="masked-lm")
    sites = outline_of(source).sites
    joint = [site for site in sites if len(site.weights) > 1 and not site.separate]
    mlp = ("gate", "up", "down") if name == "modernbert" else ("up", "down")
    wanted = {("key", "query"), ("value", "output"), ("query", "key", "value", "output"), mlp}
    assert {site.roles for site in joint} == wanted
    assert len(joint) == common.BLOCKS * len(wanted)
    model = load_model(source, torch.float32, "cpu")
    rows = common.tokens(1, 24) % 80 + 5
    assert refused(model, joint, rows, TASK) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": {"kv_bytes": {}, "perplexity": {}}}, "decodes nothing: leave out objectives.kv_bytes"),
        ({"objectives": {"memory": {}, "perplexity": {}}}, "decodes nothing: leave out objectives.memory"),
        ({"objectives": {"latency_decode": {}, "perplexity": {}}}, "leave out objectives.latency_decode"),
        ({"objectives": {"latency": {"decode": 4}, "perplexity": {}}}, "leave out objectives.latency.decode"),
        ({"objectives": {"latency": {"engine": "openvino"}, "perplexity": {}}}, "no engine runs"),
        ({"data": {"search": {"text": "self", "windows": 2}}}, "samples no text: name one for data.search"),
        ({"space": {"servable": "plain", "methods": ["drop-block"]}}, "no engine runs"),
    ],
)
def test_what_encoders_cannot_have_is_refused_in_a_line(changes, said):
    with pytest.raises(InputError, match=said) as caught:
        make_config({"model": {"name": "m", "task": "masked-lm"}, **changes})
    assert "\n" not in str(caught.value)


def test_defaults_of_encoders_name_a_text():
    config = make_config({"model": {"name": "m", "task": "masked-lm"}})
    assert {split.text for split in config.data.splits().values()} == {"pydoc"}
    assert config.data.control.windows == 0


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("llama", common.GROUPED, "no language model that predicts masked tokens"),
        ("bert", SIZES | {"is_decoder": True}, "a decoder, whose tokens see none after them"),
        ("bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
                  "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
         "an encoder and a decoder"),
    ],
)  # fmt: skip
def test_what_is_no_masked_language_model_is_said_to_be_none(kind, sizes, said, tmp_path, text_file):
    AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=said):
        Study(study_data(tmp_path / "m", text_file)).setup()


def test_a_tokenizer_without_a_mask_token_is_refused(folders, tmp_path, text_file):
    build("bert").save_pretrained(tmp_path)
    common.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no mask token"):
        Study(study_data(tmp_path, text_file)).setup()


def test_other_heads_of_a_checkpoint_are_let_through(folders, tmp_path, text_file):
    """BERT's own checkpoints have a pooler and a head for the next sentence."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(resolve(str(tmp_path), task="masked-lm"), torch.float32, "cpu").num_parameters()


def test_a_class_of_several_tasks_is_loaded_as_it_was_searched(tmp_path):
    """XLM has one for next and for masked tokens."""
    sizes = {"vocab_size": common.VOCABULARY, "emb_dim": 32, "n_layers": 1, "n_heads": 4}
    model = AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model("xlm", **sizes))
    model.save_pretrained(tmp_path)
    describe(tmp_path, model, Replacements({}, {}, []), TASK.auto)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__ == f"Rankfront{type(model).__name__}"
