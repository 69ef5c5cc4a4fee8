"""``gguf``: the file that llama.cpp and what is built on it open, written by the `gguf` package.

Plans with one width are of the architecture of their own model type; others are ``deci``, which has the number of heads
and of neurons of every block. ``llama`` and ``deci`` turn neighbouring dimensions of a head together by rotary
positions, where transformers turns i and i + d/2: rows of queries and keys are put in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from rankfront.methods import InputError, check_choice
from rankfront.search.errors import ExportError
from rankfront.search.plain import without_folders
from rankfront.search.serve.gguf_tokenizer import add_tokenizer, carry_tokenizer
from rankfront.search.serve.llama_like import check, has_attention
from rankfront.search.serve.structure import Structure

# What the gguf package can round to; llama.cpp's own tool makes the others, such as Q4_K_M, of an F16 file.
TYPES: Mapping[str, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # model type -> llama.cpp's
FILE = "model.gguf"
ZERO_WIDTH = 32  # neurons of an MLP of zeros: llama.cpp's deci drops the attention too of a block without MLP
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: in the file.
        source: what the dense model calls it; "" of zeros.
        shape: (rows, columns), or (rows,).
        kind: what its values are stored as.
        heads: whose rows are reordered for rotary positions; 0 where none are.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    heads: int = 0


def write_gguf(
    structure: Structure, folder: Path, kind: str, tokenizer: Any, original: Path | None
) -> tuple[int, list[str]]:
    """Write ``structure`` as ``model.gguf``, its weights stored as ``kind``, and read it back. How many values it
    stores, and the names of tensors that are F16 because their rows fit no block of ``kind``.

    The tokenizer is that of the GGUF file ``original`` where there is one. Raises `InputError` where the plan, the
    model, its tokenizer or ``kind`` have no form there; `ExportError` where what is read back differs.
    """
    check_type(kind)
    check(structure, "gguf")
    file = folder / FILE
    architecture = architecture_of(structure)
    entries, unrounded = _entries(structure, architecture, GGMLQuantizationType[kind])
    writer = GGUFWriter(file, architecture)
    _settings(writer, structure, architecture, TYPES[kind])
    rows = structure.shape("model.embed_tokens.weight")[0]
    if original is None:
        add_tokenizer(writer, tokenizer, rows)
    else:
        carry_tokenizer(writer, original, rows)
    for entry in entries:
        size = int(np.prod(gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)))
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
    factors = frequency_factors(structure)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_stored(entry, _values(structure, entry)))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    _read_back(structure, file, entries)
    return sum(int(np.prod(entry.shape)) for entry in entries), unrounded


def check_type(kind: str) -> None:
    """Raise `InputError` where the `gguf` package cannot round to ``kind``."""
    if "_K" in kind.upper() or kind.upper().startswith("IQ"):
        raise InputError(
            f"--gguf-type {kind} is one that the gguf package cannot round to: export F16 and run llama.cpp's"
            f" llama-quantize on the file, or choose one of {', '.join(TYPES)}"
        )
    check_choice("--gguf-type", kind, TYPES)


def architecture_of(structure: Structure) -> str:
    """llama.cpp's name for what is written."""
    own = ARCHITECTURES[structure.config.model_type]
    widths = {block.width for block in structure.blocks}
    uniform = len(widths) == 1 and 0 not in widths and all(block.attention for block in structure.blocks)
    scaled = own == "qwen2" and frequency_factors(structure) is not None  # which it does not look for there
    return own if uniform and not scaled else "deci"


def _settings(writer: GGUFWriter, structure: Structure, architecture: str, kind: LlamaFileType) -> None:
    """Write all that is neither a tensor nor of the tokenizer."""
    config, count = structure.config, len(structure.blocks)
    present = [has_attention(structure, place) for place in range(count)]
    heads = [config.num_attention_heads * here for here in present]
    keys = [config.num_key_value_heads * here for here in present]
    widths = [block.width or ZERO_WIDTH for block in structure.blocks]
    uniform = architecture != "deci"
    writer.add_type("model")
    writer.add_name(without_folders(str(getattr(config, "_name_or_path", "") or config.model_type)))
    writer.add_file_type(kind)
    if kind not in (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(count)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths[0] if uniform else widths)
    writer.add_head_count(heads[0] if uniform else heads)
    writer.add_head_count_kv(keys[0] if uniform else keys)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _entries(structure: Structure, architecture: str, kind: GGMLQuantizationType) -> tuple[list[Entry], list[str]]:
    """Every tensor of the file in order, and those that are F16 instead of ``kind``."""
    entries, unrounded = [], []
    for name, source, shape in _named(structure):
        outer = source.rpartition(".")[0] in OUTER
        wanted = _kind(shape, kind, outer)
        if wanted == GGMLQuantizationType.F16 and kind not in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
            unrounded.append(name)
        heads = 0
        if architecture != "qwen2" and ".attn_" in name:
            counts = {"attn_q": structure.config.num_attention_heads, "attn_k": structure.config.num_key_value_heads}
            heads = counts.get(name.split(".")[2], 0)
        entries.append(Entry(name, source, shape, wanted, heads))
    return entries, unrounded


def _named(structure: Structure) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the file, name in the dense model or "" of zeros, shape) of every tensor."""
    held = {name for name, _ in structure.skeleton.named_parameters()}  # a tied head is none
    for module, name in OUTER.items():
        source = f"{module}.weight"
        if source in held:
            yield f"{name}.weight", source, structure.shape(source)
    for place, block in enumerate(structure.blocks):
        for module, name in NAMES.items():
            attention = module.startswith(("self_attn", "input"))
            if attention and not has_attention(structure, place):
                continue
            for own in ("weight", "bias"):
                source = f"{structure.prefix}.{place}.{module}.{own}"
                if structure.original(source) not in held:
                    continue
                shape = structure.shape(source)
                if not attention and not block.width and module.startswith("mlp"):
                    shape = tuple(size or ZERO_WIDTH for size in shape)
                    source = ""
                yield f"blk.{place}.{name}.{own}", source, shape


def _kind(shape: tuple[int, ...], wanted: GGMLQuantizationType, outer: bool) -> GGMLQuantizationType:
    """What a tensor is stored as: vectors as F32, the table and the head in 8 bits at least, and F16 where rows do not
    fit the blocks of a type."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    if outer and 8 * size < 8 * block:
        wanted = GGMLQuantizationType.Q8_0
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _values(structure: Structure, entry: Entry) -> np.ndarray:
    """What the model has at an entry, in fp32, in the order of the file."""
    if not entry.source:
        return np.zeros(entry.shape, dtype=np.float32)
    tensor = structure.tensor(entry.source).float().cpu()
    if entry.heads:
        tensor = interleaved(tensor, entry.heads)
    return np.asarray(tensor.contiguous().numpy())


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows (heads · d, ...) with dimensions i and i + d/2 of every head side by side."""
    found: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return found


def _stored(entry: Entry, values: np.ndarray) -> np.ndarray:
    """``values`` as they are stored; `InputError` where they are out of the range of F16."""
    with np.errstate(over="ignore"):
        found: np.ndarray = gguf.quantize(values, entry.kind)
    if entry.kind == GGMLQuantizationType.F16 and not np.isfinite(found).all():
        raise InputError(
            f"{entry.source!r} has values beyond those of F16, up to {np.abs(values).max():.3g}: use --gguf-type BF16"
        )
    return found


def frequency_factors(structure: Structure) -> np.ndarray | None:
    """What llama.cpp divides the frequencies of rotary positions by, (d/2,); None where that is 1 everywhere.

    Measured on the model itself: θ^(−2i/d) over the frequency that it has. Raises `InputError` where its positions do
    more than that.
    """
    config, rotary = structure.config, structure.model.model.rotary_emb
    settings = config.rope_parameters or {}
    kind = settings.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise InputError(
            f"gguf is written for rotary positions that are fixed and these are {kind!r}: use --format plain"
        )
    frequencies = rotary.inv_freq.double().cpu()
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors = float(settings.get("rope_theta", 10000.0)) ** -exponents / frequencies
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return None
    return np.asarray(factors.float().numpy())


def _read_back(structure: Structure, file: Path, entries: list[Entry]) -> None:
    """Raise `ExportError` where the file does not hold what was to be written."""
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for entry in entries:
        tensor = found.get(entry.name)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != entry.shape or tensor.tensor_type != entry.kind:
            raise ExportError(f"{entry.name!r} is not in the written file as it should be: not kept")
        values = _values(structure, entry)
        lost = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape) - values)
        if lost.size and lost.max() > tolerance(entry.kind) * np.abs(values).max():
            raise ExportError(f"{entry.name!r} was read back {lost.max():.3g} off: not kept")


def tolerance(kind: GGMLQuantizationType) -> float:
    """The most that rounding to ``kind`` moves a value, over the largest value of its tensor, with a half to spare."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == GGMLQuantizationType.F32:
        return 0.0
    if kind == GGMLQuantizationType.F16:
        return 2.0**-10
    if kind == GGMLQuantizationType.BF16:
        return 2.0**-7
    bits = int(8 * size / block)  # scales of a block included, which stay below one bit
    return float(1.5 / (2 ** (bits - 1) - 1))
