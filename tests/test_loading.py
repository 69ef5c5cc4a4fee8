"""Loading: a model runs what its checkpoint holds, all of it, or is refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import common
import gguf
import pytest
import torch
import transformers
from launching import quiet, verify_here
from safetensors.torch import load_file, save_file

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL
from rankfront.search.__main__ import run
from rankfront.search.inputs.model import count_parameters, load_model, load_tokenizer, read_config, skeleton
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output import verify
from rankfront.search.output.evaluate import evaluate
from rankfront.search.output.export import write_factored
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def load(folder, **more):
    return load_model(resolve(str(folder), **more), torch.float32, "cpu")


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


def rewrite(folder: Path, change) -> Path:
    """Apply ``change`` to the dict of the checkpoint's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def settings(folder: Path, **changes) -> Path:
    """Change keys of the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refusal(function, *arguments, **named) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -- all of the checkpoint, and nothing else


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(model_folder, tmp_path, text_file):
    folder = rewrite(copied(model_folder, tmp_path / "m"), lambda tensors: tensors.pop(DOWN))
    assert DOWN in refusal(load, folder)
    assert DOWN in refusal(evaluate, str(folder), str(text_file), 2, 32, dtype="float32", device="cpu")


def test_a_tensor_under_another_name_is_refused_by_both_names(model_folder, tmp_path):
    other = "model.layers.0.self_attn.query.weight"
    folder = rewrite(copied(model_folder, tmp_path / "m"), lambda t: t.update({other: t.pop(QUERY)}))
    message = refusal(load, folder)
    assert QUERY in message
    assert other in message


@pytest.mark.parametrize("extra", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.scale"])
def test_a_tensor_that_the_architecture_does_not_run_is_refused_by_its_name(model_folder, tmp_path, extra):
    folder = rewrite(copied(model_folder, tmp_path / "m"), lambda t: t.update({extra: t[DOWN].clone()}))
    assert extra in refusal(load, folder)


def test_a_bias_that_the_configuration_denies_is_refused(model_folder, tmp_path):
    folder = settings(copied(model_folder, tmp_path / "m"), attention_bias=False)
    assert "self_attn.k_proj.bias" in refusal(load, folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(model_folder, tmp_path):
    folder = settings(copied(model_folder, tmp_path / "m"), intermediate_size=common.INNER + 8)
    message = refusal(load, folder)
    assert ".mlp." in message
    assert all(str(size) in message for size in (common.INNER, common.INNER + 8))


OLD_BUFFERS = {
    "gptj": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "gpt-neo": ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"),
    "codegen": ("transformer.h.0.attn.causal_mask",),
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_masks_and_frequencies_that_old_checkpoints_carry_are_no_weights(name, tmp_path):
    extra = {key: torch.zeros(1) for key in OLD_BUFFERS[name]}
    folder = rewrite(common.save_folder(name, tmp_path / "m"), lambda tensors: tensors.update(extra))
    ids = common.tokens(1, 8)
    assert torch.equal(load(folder)(ids).logits, common.architecture(name).build()(ids).logits)


def test_what_tying_explains_is_no_missing_tensor(tied_folder, tmp_path):
    ids = common.tokens(1, 8)
    said = common.architecture("llama-tied").build()(ids).logits
    assert torch.equal(load(tied_folder)(ids).logits, said)
    table = "model.embed_tokens.weight"  # a checkpoint may name the one matrix after the head, or hold it twice
    only_head = rewrite(copied(tied_folder, tmp_path / "h"), lambda t: t.update({"lm_head.weight": t.pop(table)}))
    twice = rewrite(copied(tied_folder, tmp_path / "t"), lambda t: t.update({"lm_head.weight": t[table].clone()}))
    for folder in (only_head, twice):
        assert torch.equal(load(folder)(ids).logits, said)


def write_gguf(path: Path, lacking: str = "", extra: str | None = None) -> None:
    """A Llama of two blocks as GGUF holds it, without the tensor ``lacking``, with one ``extra``."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(common.POSITIONS)
    writer.add_embedding_length(common.HIDDEN)
    writer.add_block_count(common.BLOCKS)
    writer.add_feed_forward_length(common.INNER)
    writer.add_head_count(common.HEADS)
    writer.add_head_count_kv(common.KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(common.VOCABULARY)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    shapes = {"token_embd": (common.VOCABULARY, common.HIDDEN), "output_norm": (common.HIDDEN,)}
    for block in range(common.BLOCKS):
        shapes |= {f"blk.{block}.{norm}": (common.HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.{names[kind.split('.')[1]]}": shape for kind, shape in common.GATED.items()}
    for name, shape in shapes.items():
        if name != lacking:
            writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    if extra is not None:
        writer.add_tensor(extra, torch.ones(common.HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_without_a_tensor_is_refused_by_its_name_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", lacking="blk.1.ffn_down")
    assert DOWN in refusal(resolve, str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").glob("*unpacked-*/"))


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "blk.7.attn_norm.weight"])
def test_a_gguf_file_with_a_tensor_that_nothing_runs_is_refused(tmp_path, monkeypatch, extra):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert "holds" in refusal(resolve, str(tmp_path / "m.gguf"))


def test_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    """For its configuration, its weights, and what nothing runs of it; the library is left as it was."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    reader, read, files = gguf.GGUFReader, gguf.GGUFReader.__init__, []
    monkeypatch.setattr(reader, "__init__", lambda self, file: files.append(file) or read(self, file))
    write_gguf(tmp_path / "m.gguf", extra="blk.0.attn_q.bias")
    refusal(resolve, str(tmp_path / "m.gguf"))
    assert files == [str(tmp_path / "m.gguf")]
    assert gguf.GGUFReader is reader


@pytest.mark.parametrize("spoiled", ["model.safetensors", "config.json", "checksum.json"])
def test_an_unpacked_gguf_of_which_a_byte_changed_is_refused(tmp_path, monkeypatch, spoiled):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: common.tiny_tokenizer()
    )  # the file has none
    write_gguf(tmp_path / "m.gguf", extra="rope_freqs.weight")
    source = resolve(str(tmp_path / "m.gguf"))
    load_model(source, torch.float32, "cpu")
    file = Path(source.location) / spoiled
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert "delete it" in refusal(load_model, source, torch.float32, "cpu")


@pytest.fixture(scope="module")
def factored(setup, tmp_path_factory):
    """A factored export, written without a trial."""
    resident = JobRunner(setup)
    resident.compressed.apply(common.random_plan(resident, 3))
    folder = tmp_path_factory.mktemp("factored")
    write_factored(resident.compressed, folder)
    common.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_factored_export_without_a_factor_is_refused_by_its_name(factored, tmp_path):
    load(factored)
    lost = next(name for name in load_file(factored / "model.safetensors") if name.endswith(".left"))
    folder = rewrite(copied(factored, tmp_path / "m"), lambda tensors: tensors.pop(lost))
    assert lost in refusal(load, folder)


def test_verifying_a_folder_refuses_it_where_a_tensor_is_missing(model_folder, tmp_path):
    folder = rewrite(copied(model_folder, tmp_path / "m"), lambda tensors: tensors.pop(DOWN))
    given = {name: tensor.clone() for name, tensor in CAUSAL.frozen(common.tokens(2, 16)).items()}
    save_file(given, tmp_path / "tokens")
    with pytest.raises(SystemExit) as stopped:
        verify.main(str(folder), str(tmp_path / "tokens"), "cpu", "1", "0", CAUSAL.auto)
    assert DOWN in str(stopped.value)


@pytest.mark.parametrize("name", [row.name for row in (*common.ARCHITECTURES, *common.BUFFERED)])
def test_a_factored_export_loads_as_it_ran_with_the_buffers_that_no_file_holds(name, tmp_path, text_file):
    data = common.study_data(common.save_folder(name, tmp_path / "m"), text_file)
    row = common.architecture(name)
    resident = JobRunner(Study(data | {"space": data["space"] | {"methods": ["svd"], "exclude": [row.head]}}).setup())
    for plan in _plans(resident):
        resident.compressed.apply(plan)
        ids = common.tokens(1, 16)
        said = resident.compressed.model(ids).logits
        out = tmp_path / f"{len(plan.choices)}"
        write_factored(resident.compressed, out)
        loaded = load(out)
        assert torch.equal(loaded(ids).logits, said)
        assert all("weight" not in vars(module) for module in loaded.modules())


def _plans(resident):
    """Every linear of a block treated, and each second one."""
    options = {site.name: found[0] for site, found in resident.compressed.space.wanted().items()}
    yield Plan.of(options)
    yield Plan.of(dict(list(options.items())[::2]))


# -- what is tied is what the tensors say


def untied_by_its_tensors(folder: Path, out: Path) -> Path:
    """A copy whose configuration ties the head to the table and whose checkpoint holds two matrices."""
    head = torch.randn(common.VOCABULARY, common.HIDDEN, generator=torch.Generator().manual_seed(5))
    return rewrite(copied(folder, out), lambda tensors: tensors.update({"lm_head.weight": head / 6}))


def outer(model) -> list[tuple[str, tuple[str, ...]]]:
    return [(site.name, site.anchor.tied) for site, place in find_sites(model).items() if place.block is None]


BOTH = [("lm_head", ()), ("model.embed_tokens", ())]
ONE = [("lm_head", ("model.embed_tokens",))]


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_what_is_tied_is_decided_by_the_tensors_in_the_model_and_in_its_skeleton(tied_folder, tmp_path, form):
    folder = untied_by_its_tensors(tied_folder, tmp_path / "untied")
    same = rewrite(
        copied(tied_folder, tmp_path / "same"),
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    for source, expected in ((folder, BOTH), (same, ONE), (tied_folder, ONE)):
        found = stored_as(form, source, tmp_path / f"{source.name} stored")
        assert outer(load(found)) == expected
        assert outer(skeleton(resolve(str(found)))) == expected


def stored_as(form: str, folder: Path, out: Path) -> Path:
    """A copy of ``folder`` with its tensors in one file, in two shards, or in a pytorch_model.bin."""
    out = copied(folder, out)
    file = out / "model.safetensors"
    tensors = load_file(file)
    if form == "bin":
        torch.save(tensors, out / "pytorch_model.bin")
    elif form == "shards":
        where = {name: f"{name == 'lm_head.weight'}.safetensors" for name in tensors}
        for shard in set(where.values()):
            save_file({n: t for n, t in tensors.items() if where[n] == shard}, out / shard, {"format": "pt"})
        index = {"metadata": {}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    if form != "one file":
        file.unlink()
    return out


def test_a_matrix_that_only_the_configuration_ties_is_treated_and_exported_alone(tied_folder, tmp_path, text_file):
    folder = untied_by_its_tensors(tied_folder, tmp_path / "m")
    data = common.study_data(folder, text_file)
    resident = JobRunner(Study(data).setup())
    table = resident.compressed.model.model.embed_tokens.weight.clone()
    head = next(site for site in resident.compressed.space.wanted() if site.name == "lm_head")
    resident.compressed.apply(Plan.of({"lm_head": resident.compressed.space.wanted()[head][0]}))
    assert torch.equal(resident.compressed.model.model.embed_tokens.weight, table)
    ids = common.tokens(1, 8)
    said = resident.compressed.model(ids).logits
    write_factored(resident.compressed, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, said)
    assert torch.equal(loaded.model.embed_tokens.weight, table)


def test_a_dense_export_of_it_reloads_with_both_matrices(tied_folder, tmp_path):
    folder = untied_by_its_tensors(tied_folder, tmp_path / "m")
    model = load(folder)
    model.save_pretrained(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_sites_of_the_skeleton_that_differ_from_the_models_are_an_error_by_name(setup):
    tied = replace(setup.outline, sites=find_sites(common.architecture("llama-tied").build()))
    assert "'lm_head'" in refusal(JobRunner, replace(setup, outline=tied))


# -- code that comes with a model

CODE = """
from dataclasses import replace
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def custom(model_folder, tmp_path, monkeypatch):
    """(folder, marker): a model that runs as code of its own, which touches the marker; nobody may be asked."""
    folder, marker = copied(model_folder, tmp_path / "custom"), tmp_path / "ran"
    (folder / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    settings(folder, model_type="mine", auto_map=classes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    return folder, marker


def test_a_models_own_code_does_not_run_unless_it_is_trusted(custom, text_file, capsys):
    folder, marker = custom
    for load_part in (read_config, skeleton, lambda source: load_model(source, "auto", "cpu")):
        assert "model.trust_remote_code" in refusal(load_part, resolve(str(folder)))
    assert "model.trust_remote_code" in refusal(Study(common.study_data(folder, text_file)).setup)
    assert run(["methods", "--model", str(folder)]) == 2
    assert run(["evaluate", str(folder), "--text", str(text_file), "--windows", "1", "--length", "8"]) == 2
    assert capsys.readouterr().err.count("--trust-remote-code") == 2
    assert not marker.exists()


def test_a_tokenizers_own_code_does_not_run_unless_it_is_trusted(model_folder, tmp_path, monkeypatch):
    folder = copied(model_folder, tmp_path / "m")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    file = folder / "tokenizer_config.json"
    ours = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | ours))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    assert "model.trust_remote_code" in refusal(load_tokenizer, resolve(str(folder)))


def test_a_trusted_models_own_code_runs_in_studies_their_exports_and_evaluate(custom, text_file, tmp_path, monkeypatch):
    verify_here(monkeypatch)
    folder, marker = custom
    data = common.study_data(folder, text_file)
    data["model"]["trust_remote_code"] = True
    study = Study(data | {"search": data["search"] | {"trials": 2}}, tmp_path / "run")
    study.launch(quiet())
    assert marker.exists()
    study.export(tmp_path / "out", form="dense")
    found = evaluate(str(tmp_path / "out"), str(text_file), 1, 8, device="cpu", trust_remote_code=True)
    assert found["parameters"] == count_parameters(common.architecture("llama").build())
    study.export(tmp_path / "factored")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "factored", trust_remote_code=False)
    found = evaluate(str(tmp_path / "factored"), str(text_file), 1, 8, device="cpu", trust_remote_code=True)
    assert found["parameters"] < count_parameters(common.architecture("llama").build())
    before = study.source.fingerprint
    (folder / "modeling_mine.py").write_text("# other code")
    assert study.source.fingerprint != before
