"""A Llama whose blocks differ: an MLP of a width of its own, or no attention, or no MLP.

Written by rankfront. For ``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``; it needs torch and
transformers (5.0 or newer) alone. Engines that know ``DeciLMForCausalLM`` read the configuration and the weights, and
not this file's model.

``config.block_configs`` has for every block ``attention = {no_op, n_heads_in_group}`` and ``ffn = {no_op}`` with
``intermediate_size``, or with ``ffn_mult``: the width is then 2/3 ffn_mult · hidden_size, up to a multiple of 256. The
first block has attention, by which caches count.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

STEP = 256  # of widths that are given as ffn_mult


class Settings(dict):
    """A dict that is read by attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class NemotronNASConfig(LlamaConfig):
    """Llama's, with ``block_configs`` and ``qkv_bias``: whether queries, keys and values alone have biases."""

    model_type = "nemotron-nas"

    def __init__(
        self, block_configs: Sequence[Mapping[str, Any]] = (), qkv_bias: bool | None = None, **named: Any
    ) -> None:
        super().__init__(**named)
        self.block_configs = [Settings({half: Settings(of) for half, of in each.items()}) for each in block_configs]
        if qkv_bias is not None:
            self.qkv_bias = qkv_bias


def width_of(ffn: Mapping[str, Any], hidden_size: int) -> int:
    """Neurons of an MLP by its settings."""
    if "ffn_mult" not in ffn:
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // STEP) * STEP


class NoAttention(nn.Module):
    """It adds nothing."""

    def forward(self, hidden_states: Tensor, **named: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """It adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """The model; what a block does not have, it has no tensors of."""

    config_class = NemotronNASConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op:
                layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention()
            elif getattr(config, "qkv_bias", False):
                for name in ("q_proj", "k_proj", "v_proj"):
                    dense = getattr(layer.self_attn, name)
                    setattr(layer.self_attn, name, nn.Linear(dense.in_features, dense.out_features, bias=True))
            if block.ffn.no_op:
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP()
            else:
                own = copy.copy(config)
                own.intermediate_size = width_of(block.ffn, config.hidden_size)
                layer.mlp = LlamaMLP(own)
        self.post_init()
