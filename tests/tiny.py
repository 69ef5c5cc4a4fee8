"""Tiny random models of every type of transformers' causal language models, from the defaults of its configuration.

Sizes go by the names of fields, the same in all types, so that what has to fit together still does. What does not is
an exception by type. Of layers of several kinds, one or two of each kind stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from common import HEAD_WIDTH, HEADS, HIDDEN, INNER, KEY_VALUE_HEADS, POSITIONS, VOCABULARY, randomise
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# A field's name -> its size here, the first that matches. Smaller defaults stay.
SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size$", 2),
    (r"vocab_size|group_vocab$", VOCABULARY),
    (r"bos_token_id$", 0),
    (r"eos_token_id$", 1),
    (r"token_(id|index)$", VOCABULARY - 1),
    (r"index_topk$", POSITIONS),  # of all: which of equal ones are taken, rounding decides
    (r"(shared_experts?|topk_group|n_group|num_expert_group|n_groups|num_groups)$", 1),
    (r"(experts_per_tok|experts_per_token|top_?k(_experts)?|moe_k|num_selected_experts)$", 2),
    (r"(experts|num_experts_.*)$", 4),
    (r"first_k_dense_replace|decoder_sparse_step|moe_layer_start_index$", 1),
    (r"(key_value|kv)_heads$|n_head_kv$", KEY_VALUE_HEADS),
    (r"(heads|n_head)$", HEADS),
    (r"(qk_rope_head_dim|rotary_dim|rope_head_dim)$", HEAD_WIDTH // 2),
    (r"(head_dim|d_kv|kv_channels|head_size)$", HEAD_WIDTH),
    (r"lora_rank|_rank$", HIDDEN // 2),
    (r"(expert|moe).*(intermediate|ffn|hidden)|shared_intermediate", HIDDEN // 2),
    (r"intermediate|ffn|n_inner|d_ff|feed_forward|mlp_dim", INNER),
    (r"(state_size|d_state|ssm_state)$", 4),
    (r"chunk_size", HEAD_WIDTH),
    (r"window", HEAD_WIDTH),
    (r"position|n_ctx|context_length|max_seq|seq_length|max_source|max_target", POSITIONS),
    (r"adapter_(in_dim|out_dim|input_size)$", HIDDEN),
    (r"image_size$", 16),
    (r"patch_size$", 4),
    (r"(hidden_size|hidden_size_global|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim|hidden_dim|proj_dim|lru_width|width|^dim|embd_dim)$",
     HIDDEN),
)  # fmt: skip
LAYERS = re.compile(r"^(num_|n_)?(\w+_)?(layers?|hidden_layers|depth|blocks)$")
DENSE_FIRST = re.compile(r"first_k_dense_replace|decoder_sparse_step|moe_layer_start_index")

# What default configurations lack.
QSA = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": POSITIONS,
    "indexer_compress_ratio": 4,
}  # fmt: skip
LACKING: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
}
# What the rules above do not get right: which layers there are, and sizes.
HYBRID = ["linear_attention", "hybrid", "hybrid"]
DEPTHS: Mapping[str, Mapping[str, Any]] = {
    "bert-generation": {"is_decoder": True},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 1}},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "lfm2_moe": {"num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # two stacks, run four times in all
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "reformer": {"is_decoder": True},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlm": {"causal": True},
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": 3, "hybrid_layer_ids": [1, 2]},
}  # fmt: skip
MAMBA2 = {"mamba_d_head": 16}
DOTS3 = {"head_dim": HEAD_WIDTH + HEAD_WIDTH // 2}
ONE_KEY = {"indexer_kv_heads": 1, "indexer_head_dim": HIDDEN}
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": MAMBA2,
    "deepseek_v4": {
        "num_key_value_heads": 1, "head_dim": HIDDEN, "qk_rope_head_dim": 4, "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "gemma3n": {
        "text_config": {"intermediate_size": INNER},
        "vision_config": {"model_args": {"channel_multiplier": 0.01}},
    },
    "gemma3n_text": {"intermediate_size": INNER},
    "granitemoehybrid": MAMBA2,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": {"dim_model_base": HIDDEN},
    "mpt": {"max_seq_len": 512},
    "qwen4_exp": {"text_config": ONE_KEY},
    "qwen4_exp_text": ONE_KEY,
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24]},
    "xlnet": {"d_head": HEAD_WIDTH},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its cache rounds widths to multiples of 64
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_WIDTH},
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_WIDTH, "n_mamba_heads": 8,
        "mamba_headdim": 8, "num_key_value_heads": HEADS,
    },
}  # fmt: skip
# Types whose towers are of another package, which the tests do without -> that package.
BESIDE: Mapping[str, str] = {"gemma3n": "timm"}


def tiny_config(name: str) -> Any:
    """The configuration of the type ``name``, its integers cut down."""
    default = CONFIG_MAPPING[name]()
    settings = _merged(_with_layers(name, default, narrow=True), EXCEPTIONS.get(name, {}))
    return type(default).from_dict(settings)


def _with_layers(name: str, default: Any, narrow: bool) -> dict[str, Any]:
    return _merged(shrunk(_merged(_as_decoder(default), LACKING.get(name, {})), narrow), DEPTHS.get(name, {}))


def _merged(settings: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        settings[key] = _merged(dict(settings[key]), value) if isinstance(value, dict) and settings.get(key) else value
    return settings


def wide_config(name: str) -> Any:
    """The default configuration of the type ``name`` with as few layers as `tiny_config` has."""
    default = CONFIG_MAPPING[name]()
    return type(default).from_dict(_with_layers(name, default, narrow=False))


def _as_decoder(default: Any) -> dict[str, Any]:
    """A default configuration as of a causal language model, where it may be of something else."""
    settings: dict[str, Any] = default.to_dict()
    if settings.get("is_encoder_decoder") or type(default) in MODEL_FOR_MASKED_LM_MAPPING:
        settings |= {"is_encoder_decoder": False, "is_decoder": True}
    return settings


def shrunk(settings: dict[str, Any], narrow: bool = True) -> dict[str, Any]:
    """A configuration's plain data with few layers, those of its parts too, and small sizes where ``narrow``."""
    count = settings.get("num_hidden_layers") or settings.get("n_layer") or settings.get("num_layers")
    kept = _kinds_of_layers(settings, count if isinstance(count, int) else 0)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "per_layer_config" and isinstance(value, dict):
            small[key] = {kept.index(int(i)): shrunk(own, narrow) for i, own in value.items() if int(i) in kept}
        elif isinstance(value, dict) and key.endswith("config"):
            small[key] = shrunk(value, narrow)
        elif isinstance(value, list) and len(value) == count and kept:
            small[key] = [value[i] for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _size(key, value, len(kept) or 2, narrow)
        else:
            small[key] = value
    if narrow and small.keys() & {"qk_rope_head_dim", "kv_lora_rank"}:  # latent attention: a key head for each query
        rotary = small.get("qk_rope_head_dim", HEAD_WIDTH // 2)
        sizes = {"head_dim": rotary, "qk_head_dim": rotary + HEAD_WIDTH}
        small |= {key: size for key, size in (sizes | {"num_key_value_heads": HEADS}).items() if key in small}
    return small


def _kinds_of_layers(settings: Mapping[str, Any], count: int) -> list[int]:
    """The first two layers of each kind, by all that is said layer by layer; [] where nothing is."""
    lists = [v for v in settings.values() if isinstance(v, list) and len(v) == count > 1]
    if not lists:
        return []
    kinds = [repr([each[i] for each in lists]) for i in range(count)]
    return [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]


def _size(key: str, value: int, layers: int, narrow: bool) -> int:
    if LAYERS.search(key):
        return min(value, layers)
    if not narrow and not DENSE_FIRST.search(key):
        return value
    return next((min(value, size) for pattern, size in SIZES if re.search(pattern, key)), value)


def tiny_model(name: str) -> Any:
    """A seeded random model of the type ``name`` in evaluation mode, frozen, fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    randomise(model)
    return model.eval().requires_grad_(False)
