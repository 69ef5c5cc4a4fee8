"""What several test files share: tiny architectures as rows, a tiny tokenizer, texts, study data."""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from rankfront.methods import DENSE_OPTION, Option, Site, Weight
from rankfront.search.inputs.sites import find_sites
from rankfront.search.names import Place
from rankfront.search.plans.plan import Plan

VOCABULARY, HIDDEN, INNER, BLOCKS, POSITIONS = 96, 32, 48, 2, 64
HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 4, 2, 8
KEYS = KEY_VALUE_HEADS * HEAD_WIDTH

GATED = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
GATED_SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Architecture:
    """One tiny random model.

    Attributes:
        name: as tests show it.
        config: its transformers configuration class, by name.
        settings: what the configuration is built from.
        blocks: path of its list of blocks.
        kinds: linear inside each block -> (out_features, in_features), from the settings by hand.
        shared: groups of linears that read one input.
        table, head: paths of the embedding table and the output head.
        tied: whether they are one matrix.
        biases: whether some linear has a bias.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    blocks: str
    kinds: Mapping[str, tuple[int, int]]
    shared: tuple[tuple[str, ...], ...]
    table: str = "model.embed_tokens"
    head: str = "lm_head"
    tied: bool = False
    biases: bool = False

    def build(self) -> Any:
        """A fresh copy, in evaluation mode and frozen."""
        return copy.deepcopy(_build(self.name))

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Path of every linear inside the blocks -> (out_features, in_features)."""
        return {f"{self.blocks}.{i}.{kind}": shape for i in range(BLOCKS) for kind, shape in self.kinds.items()}


ARCHITECTURES = (
    Architecture(
        "llama", "LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "model.layers", GATED, GATED_SHARED, biases=True,
    ),
    Architecture(
        "llama-tied", "LlamaConfig", GROUPED | {"tie_word_embeddings": True},
        "model.layers", GATED, GATED_SHARED, tied=True,
    ),
    Architecture(
        "mistral", "MistralConfig", GROUPED | {"head_dim": HEAD_WIDTH, "sliding_window": 8},
        "model.layers", GATED, GATED_SHARED,
    ),
    Architecture(
        "qwen2", "Qwen2Config", GROUPED | {"tie_word_embeddings": True},
        "model.layers", GATED, GATED_SHARED, tied=True, biases=True,
    ),
    Architecture(
        "qwen3", "Qwen3Config", GROUPED | {"head_dim": HEAD_WIDTH, "tie_word_embeddings": False},
        "model.layers", GATED, GATED_SHARED,
    ),
    Architecture(
        "gemma2", "Gemma2Config", GROUPED | {"head_dim": HEAD_WIDTH, "query_pre_attn_scalar": 8, "sliding_window": 8},
        "model.layers", GATED, GATED_SHARED, tied=True,
    ),
    Architecture(
        "gemma3", "Gemma3TextConfig",
        GROUPED | {"head_dim": HEAD_WIDTH, "query_pre_attn_scalar": 8, "sliding_window": 8},
        "model.layers", GATED, GATED_SHARED, tied=True,
    ),
    Architecture(
        "phi3", "Phi3Config", GROUPED | {"tie_word_embeddings": False},
        "model.layers",
        {
            "self_attn.qkv_proj": (HIDDEN + 2 * KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_up_proj": (2 * INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        },
        (),
    ),
    Architecture(
        "gpt-neox", "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False,
        },
        "gpt_neox.layers",
        {
            "attention.query_key_value": (3 * HIDDEN, HIDDEN),
            "attention.dense": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": (INNER, HIDDEN),
            "mlp.dense_4h_to_h": (HIDDEN, INNER),
        },
        (), table="gpt_neox.embed_in", biases=True,
    ),
    Architecture(
        "opt", "OPTConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": INNER,
            "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS,
        },
        "model.decoder.layers",
        {
            **{f"self_attn.{name}": (HIDDEN, HIDDEN) for name in ("k_proj", "v_proj", "q_proj", "out_proj")},
            "fc1": (INNER, HIDDEN),
            "fc2": (HIDDEN, INNER),
        },
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
        table="model.decoder.embed_tokens", tied=True, biases=True,
    ),
    Architecture(
        "gpt2", "GPT2Config",
        {
            "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": BLOCKS, "n_head": HEADS,
            "n_positions": POSITIONS, "bos_token_id": 0, "eos_token_id": 1,
        },
        "transformer.h",
        {
            "attn.c_attn": (3 * HIDDEN, HIDDEN),
            "attn.c_proj": (HIDDEN, HIDDEN),
            "mlp.c_fc": (INNER, HIDDEN),
            "mlp.c_proj": (HIDDEN, INNER),
        },
        (), table="transformer.wte", tied=True, biases=True,
    ),
)  # fmt: skip

# Attention that keeps buffers which no checkpoint holds; for what loading does with them, and no law beside.
BUFFERED = (
    Architecture(
        "gptj", "GPTJConfig",
        {
            "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": BLOCKS, "n_head": HEADS,
            "n_positions": POSITIONS, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 1,
        },
        "transformer.h",
        {
            **{f"attn.{name}": (HIDDEN, HIDDEN) for name in ("k_proj", "v_proj", "q_proj", "out_proj")},
            "mlp.fc_in": (INNER, HIDDEN),
            "mlp.fc_out": (HIDDEN, INNER),
        },
        (), table="transformer.wte", biases=True,
    ),
    Architecture(
        "codegen", "CodeGenConfig",
        {
            "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": BLOCKS, "n_head": HEADS,
            "n_positions": POSITIONS, "n_ctx": POSITIONS, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 1,
        },
        "transformer.h",
        {
            "attn.qkv_proj": (3 * HIDDEN, HIDDEN),
            "attn.out_proj": (HIDDEN, HIDDEN),
            "mlp.fc_in": (INNER, HIDDEN),
            "mlp.fc_out": (HIDDEN, INNER),
        },
        (), table="transformer.wte", biases=True,
    ),
    Architecture(
        "gpt-neo", "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_layers": BLOCKS,
            "num_heads": HEADS, "attention_types": [[["global", "local"], 1]], "window_size": 8,
            "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 1,
        },
        "transformer.h",
        {
            **{f"attn.attention.{name}": (HIDDEN, HIDDEN) for name in ("k_proj", "v_proj", "q_proj", "out_proj")},
            "mlp.c_fc": (INNER, HIDDEN),
            "mlp.c_proj": (HIDDEN, INNER),
        },
        (), table="transformer.wte", tied=True, biases=True,
    ),
)  # fmt: skip


@cache
def _build(name: str) -> Any:
    row = architecture(name)
    config = getattr(transformers, row.config)(**row.settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    return model.eval().requires_grad_(False)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter with seeded noise: biases and norms too, which start out as zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def architecture(name: str) -> Architecture:
    return next(row for row in (*ARCHITECTURES, *BUFFERED) if row.name == name)


def tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (windows, length)."""
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


# -- tokenizer and text

CHARACTERS = string.ascii_letters + string.digits + " \n.,;:!?'\"()-"


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, at most `VOCABULARY` ids. With ``bos``, every sequence starts with ``<s>``."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *CHARACTERS])}
    assert len(vocabulary) <= VOCABULARY
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=POSITIONS
    )


COMMON = (
    "the of and to in is that it was for on are with as his they at be this from have or by one had not but what all"
    " were when we there can an your which their said if do will each about how up out them then she many some so"
)
WORDS = COMMON.split()


def random_text(characters: int, seed: int = 0) -> str:
    """English-like sentences of random common words, exactly ``characters`` long."""
    chooser = random.Random(seed)
    text = ""
    while len(text) < characters:
        sentence = " ".join(chooser.choice(WORDS) for _ in range(chooser.randint(4, 12)))
        text += sentence.capitalize() + chooser.choice([". ", "? ", ", ", ".\n"])
    return text[:characters]


def save_folder(name: str, folder: Path) -> Path:
    """Save the architecture's model and the tiny tokenizer, as ``save_pretrained`` does, and return the folder."""
    architecture(name).build().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def study_data(folder: Path, text: Path) -> dict[str, Any]:
    """A study of the model in ``folder`` on ``text``, as small as studies go."""
    return {
        "model": {"name": str(folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "length": 32,
            "calibrate": {"text": str(text), "windows": 8},
            "search": {"text": str(text), "windows": 4},
            "report": {"text": str(text), "windows": 4},
        },
        "space": {
            "include": ["*", "lm_head"],
            "methods": ["svd", "asvd", "fwsvd", "svd-llm"],
            "keep": [0.4, 0.7],
            "rank_multiple": 2,
        },
        "objectives": {"perplexity": {}, "parameters": {}},
        "search": {"workers": 0, "trials": 4, "resources": {"cpu": 1}},
    }


def restore(resident: Any) -> None:
    """Make a resident's model dense."""
    resident.compressed.apply(Plan(()))


# -- sites and plans


def single_sites(model: nn.Module) -> dict[Site, Place]:
    """The model's sites of one weight each."""
    return {site: place for site, place in find_sites(model).items() if len(site.weights) == 1}


def linear_site(out_features: int, in_features: int, **more: Any) -> Site:
    return Site("layer", (Weight("weight", "layer", out_features, in_features, **more),))


def rank_option(method: str, rank: int) -> Option:
    return Option.of(method, rank=rank)


def random_plan(resident: Any, seed: int) -> Plan:
    """Each site at one of its options, or dense."""
    chooser = random.Random(seed)
    return Plan.of(
        {
            site.name: chooser.choice([DENSE_OPTION, *options])
            for site, options in resident.compressed.space.wanted().items()
        }
    )


def plan_with(resident: Any, methods: Iterable[str]) -> Plan:
    """A plan that has each of ``methods`` at a site of its own, where one is left, the head and table first."""
    chosen: dict[str, Option] = {}
    taken: set[str] = set()
    wanted = resident.compressed.space.wanted()
    for method in methods:
        for site, options in sorted(wanted.items(), key=lambda pair: ".layers." in pair[0].name):
            paths = {path for weight in site.weights for path in (weight.path, *weight.tied)}
            found = [option for option in options if option.method == method]
            if found and taken.isdisjoint(paths):
                chosen[site.name] = found[0]
                taken |= paths
                break
    return Plan.of(chosen, resident.setup.origin())


def arrived(given):
    """What a module was given, token by token: x (tokens, n) in fp64, or ids (tokens,)."""
    return given.detach().flatten(0, -2).double() if given.is_floating_point() else given.flatten()


def product(matrix, x):
    """W x, or the row of W that a token id looks up."""
    return matrix @ x if x.is_floating_point() else matrix[x]
