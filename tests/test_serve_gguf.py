"""GGUF files: what is written is read back, and llama.cpp says what the compressed model says."""

import copy

import gguf
import numpy as np
import pytest
import torch
from common import architecture
from gguf import GGUFReader
from serving import PAIRS, PLANS, bpe_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.search.serve import llama_cpp
from rankfront.search.serve.writing import write

IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
NEAR = 0.01  # of two logits that rounding may put in either order
installed = pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp")
each_pair = pytest.mark.parametrize(("name", "plan"), PAIRS)


def written(world, plan, folder, kind="F32"):
    """(model, what is said of the file, the file)."""
    folder.mkdir(exist_ok=True)
    model = world.run(plan)
    return model, write(model, "gguf", folder, kind, world.tokenizer), folder / "model.gguf"


def settings(file, *names):
    """Values of what a file says beside its tensors, without the architecture before their names."""
    fields = GGUFReader(file).fields
    architecture = fields["general.architecture"].contents()
    return [architecture, *(fields[f"{architecture}.{name}"].contents() for name in names)]


@installed
@each_pair
def test_llama_cpp_says_what_the_compressed_model_says(worlds, tmp_path, name, plan):
    model, _, file = written(worlds(name), plan, tmp_path)
    engine = llama_cpp.LlamaCpp(file, 64, 1)
    with torch.no_grad():
        logits = model(input_ids=IDS[:1]).logits[0]
    for end in range(4, 16):
        (said,) = engine.greedy(IDS[0, :end].tolist(), 1)
        assert logits[end - 1, said] > logits[end - 1].max() - NEAR
    here, there, count = engine.perplexities(model, IDS[:1])
    assert count > 12
    assert here == pytest.approx(there, rel=0.01)


@each_pair
def test_the_file_holds_the_tensors_of_the_compressed_model(worlds, tmp_path, name, plan):
    """By the rules of the format, not by our own code: rows of queries and keys put back as transformers has them."""
    model, said, file = written(worlds(name), plan, tmp_path)
    held = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    assert sum(tensor.size for each, tensor in held.items() if each != "rope_freqs.weight") == said.values
    write(model, "nemotron-nas", tmp_path / "nas")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "nas", trust_remote_code=True).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(PLANS))
    config, (architecture,) = model.config, settings(file)
    for path, tensor in reference.items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kept = held.pop(names.get_name(path, try_suffixes=(".weight", ".bias")))
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = counts.get(path.split(".")[-2], 0) if architecture != "qwen2" else 0
        if heads:
            kept = kept.reshape(heads, -1, 2, *kept.shape[1:]).swapaxes(1, 2).reshape(kept.shape)
        np.testing.assert_array_equal(kept, tensor.float().numpy())
    assert all("ffn" in each or each == "rope_freqs.weight" for each in held)
    assert not any(tensor.any() for each, tensor in held.items() if ".ffn_" in each and "norm" not in each)


@pytest.mark.parametrize(
    ("plan", "architecture", "widths"),
    [("one width", "llama", 32), ("widths", "deci", [24, 48, 32, 48]), ("halves gone", "deci", [40, 48, 32, 48])],
)
def test_plans_of_one_width_are_of_their_own_architecture(worlds, tmp_path, plan, architecture, widths):
    _, _, file = written(worlds("llama"), plan, tmp_path)
    found = settings(file, "feed_forward_length", "block_count")
    assert found == [architecture, widths, 4]


def test_blocks_without_attention_have_no_heads(worlds, tmp_path):
    _, _, file = written(worlds("llama"), "halves gone", tmp_path)
    assert settings(file, "attention.head_count", "attention.head_count_kv")[1:] == [[4, 0, 4, 4], [2, 0, 2, 2]]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_what_fits_no_block_of_a_type_is_f16_and_said(worlds, tmp_path, kind):
    _, said, file = written(worlds("llama"), "widths", tmp_path, kind)
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    blocks = kind.startswith("Q")  # of 32 values; MLPs are 24, 48 and 32 wide, the model too
    assert found["blk.0.ffn_down.weight"] == found["blk.1.ffn_down.weight"] == ("F16" if blocks else kind)
    assert found["blk.2.ffn_down.weight"] == found["blk.0.attn_q.weight"] == kind
    assert found["token_embd.weight"] == ("Q8_0" if blocks else kind)
    assert found["blk.0.attn_q.bias"] == found["output_norm.weight"] == "F32"
    noted = [note for note in said.notes if "F16" in note]
    assert len(noted) == blocks
    assert not blocks or noted[0].startswith("3 tensors are F16")


@pytest.mark.parametrize(
    ("kind", "remedy"), [("Q4_K_M", "llama-quantize"), ("IQ2_XS", "llama-quantize"), ("Q8", "did you mean 'Q8_0'")]
)
def test_types_that_cannot_be_made_are_refused(worlds, tmp_path, kind, remedy):
    with pytest.raises(InputError, match=remedy):
        written(worlds("llama"), "dense", tmp_path, kind)


def test_values_beyond_f16_are_refused(worlds, tmp_path):
    world = worlds("llama")
    model = world.run("dense")
    table = model.model.embed_tokens.weight
    kept = table.data[0, 0].item()
    try:
        table.data[0, 0] = 1e6
        with pytest.raises(InputError, match="--gguf-type BF16"):
            write(model, "gguf", tmp_path, "F16", world.tokenizer)
    finally:
        table.data[0, 0] = kept


@installed
@pytest.mark.parametrize("sentencepiece", [False, True])
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(worlds, tmp_path, sentencepiece):
    tokenizer = bpe_tokenizer(sentencepiece)
    write(worlds("llama-tied").run("dense"), "gguf", tmp_path, "F32", tokenizer)
    engine = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 64, 1)
    for text in ("the people were all there.", "An other (many), 1234 + 5!", " it's\n\nnot  all", "naïve 日本"):
        assert engine.tokenize(text) == tokenizer(text).input_ids


def test_tokenizers_that_have_no_name_there_are_refused(worlds, tmp_path, tokenizer):
    model = worlds("llama").run("dense")
    with pytest.raises(InputError, match="a WordLevel and gguf takes BPE"):
        write(model, "gguf", tmp_path / "a", "F32", tokenizer)
    other = copy.deepcopy(bpe_tokenizer())
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), other.backend_tokenizer.pre_tokenizer]
    )
    with pytest.raises(InputError, match="has no name in llama"):
        write(model, "gguf", tmp_path / "b", "F32", other)


def test_a_tokenizer_is_carried_over_from_a_gguf_file(worlds, tmp_path):
    world = worlds("llama")
    _, _, first = written(world, "dense", tmp_path / "a")
    write(world.run("widths"), "gguf", tmp_path / "b", "F32", None, first)
    ours, theirs = (
        {name: field.contents() for name, field in GGUFReader(file).fields.items() if name.startswith("tokenizer.")}
        for file in (tmp_path / "b" / "model.gguf", first)
    )
    assert ours == theirs
    with pytest.raises(InputError, match="320 tokens and the model 96 rows"):
        write(architecture("llama").build(), "gguf", tmp_path / "c", "F32", None, first)


def test_models_that_are_no_llama_are_refused(tmp_path):
    with pytest.raises(InputError, match="this model is 'qwen3'"):
        write(architecture("qwen3").build(), "gguf", tmp_path)
    with pytest.raises(InputError, match="no sliding windows and this model's attention sees 8 of 64"):
        write(architecture("mistral").build(), "gguf", tmp_path)
