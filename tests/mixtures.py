"""Tiny random mixtures of experts, of every form in which transformers keeps experts."""

import common
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": common.VOCABULARY, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 128,
}  # fmt: skip
MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48,
    },
    "nemotron_h": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "layers_block_type": ["moe", "attention"],
    },
    "longcat_flash": {  # experts that give what they are given
        "n_routed_experts": 4, "zero_expert_num": 3, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
        "num_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "dbrx": {  # all experts of a projection one below the other
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"num_local_experts": 4, "num_layers": 2, "kv_channels": 8},  # of attentions too, sorted beforehand
}  # fmt: skip


def built(name, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | MIXTURES[name] | more))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # some types start at zeros
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3)
    return model
