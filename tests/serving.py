"""Tiny compressed decoders for what is served, in plans of several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from common import POSITIONS, architecture, random_text, randomise, study_data
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rankfront.methods import Option
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

VOCABULARY, BLOCKS = 320, 4
SETTINGS: dict[str, dict[str, Any]] = {  # model -> what its configuration has beside those of `common`
    "llama": {},
    "llama-tied": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
}  # fmt: skip
METHODS = ["svd-llm", "lama", "vo-svd", "nystrom", "drop-block"]


@cache
def bpe_tokenizer(sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """Byte pairs of a random text: of words split as GPT-2 does, or as SentencePiece has them."""
    special = ["<unk>", "<s>", "</s>"]
    if sentencepiece:
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special + alphabet, show_progress=False)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    raw.train_from_iterator([random_text(4000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS
    )


def decoder(name: str, **more: Any) -> Any:
    """A tiny random model of four blocks, which never says what is no whole character: llama.cpp holds that back."""
    row = architecture(name)
    settings = {**row.settings, "vocab_size": VOCABULARY, "num_hidden_layers": BLOCKS, **SETTINGS.get(name, {}), **more}
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, row.config)(**settings))
    randomise(model)
    tokenizer = bpe_tokenizer()
    for number in range(VOCABULARY):
        if number >= len(tokenizer) or number < 3 or "\ufffd" in tokenizer.decode([number]):
            model.lm_head.weight.data[number] = 0
    return model.eval().requires_grad_(False)


def attention(block: int) -> str:
    return f"model.layers.{block}.self_attn.q_proj+k_proj+v_proj+o_proj"


def mlp(block: int) -> str:
    return f"model.layers.{block}.mlp.gate_proj+up_proj+down_proj"


GONE = Option.of("drop-block")


def narrow(neurons: int) -> Option:
    return Option.of("nystrom", neurons=neurons)


LOW_RANK = {
    "model.layers.0.self_attn.q_proj": Option.of("svd-llm", rank=6),
    "model.layers.3.self_attn.k_proj+q_proj": Option.of("lama", width=4),
    "model.layers.0.self_attn.v_proj+o_proj": Option.of("vo-svd", width=4),
    "model.layers.3.self_attn.o_proj": Option.of("svd-llm", rank=8),
}
PLANS: dict[str, dict[str, Option]] = {
    "dense": {},
    "one width": {mlp(block): narrow(32) for block in range(BLOCKS)},
    "one width, a block gone": {
        **LOW_RANK, **{mlp(block): narrow(24) for block in (0, 1, 3)}, attention(2): GONE, mlp(2): GONE,
    },
    "widths": {
        **LOW_RANK, mlp(0): narrow(24), mlp(2): narrow(32), "model.layers.3.mlp.up_proj": Option.of("svd-llm", rank=8),
    },
    "halves gone": {
        **LOW_RANK, mlp(0): narrow(40), attention(1): GONE, mlp(2): GONE,
        "model.layers.1.mlp.gate_proj": Option.of("svd-llm", rank=8),
    },
    "a block and halves gone": {attention(1): GONE, mlp(1): GONE, mlp(3): GONE, mlp(2): narrow(16)},
    "the first attention gone": {attention(0): GONE, mlp(1): narrow(32)},
    "the first block gone": {attention(0): GONE, mlp(0): GONE, mlp(1): narrow(32)},
}  # fmt: skip
MIXED = ("one width, a block gone", "halves gone")  # enough for models that differ little from others
PAIRS = [(name, plan) for name in SETTINGS for plan in (PLANS if name in ("llama", "qwen2") else MIXED)]
PLAIN = ("dense", "one width", "one width, a block gone")  # plans that have a plain configuration


class World:
    """A tiny model and what its study has prepared; ``run`` makes it run a plan."""

    def __init__(self, name: str, folder: Path, text: Path, methods: Sequence[str] = METHODS, **more: Any) -> None:
        decoder(name, **more).save_pretrained(folder)
        self.tokenizer = bpe_tokenizer()
        self.tokenizer.save_pretrained(folder)
        data = study_data(folder, text)
        data["space"] = {"include": ["*"], "methods": list(methods), "keep": [0.5], "rank_multiple": 2}
        self.setup = Study(data).setup()
        self.compressed = CompressedModel(self.setup)

    def run(self, plan: str) -> Any:
        """The model with a plan of `PLANS`."""
        return self.runs(PLANS[plan])

    def runs(self, options: dict[str, Option]) -> Any:
        """The model with ``options``, by site."""
        self.compressed.apply(Plan.of(options, self.setup.origin()))
        return self.compressed.model


def make_worlds(factory: Any, text: Path) -> Callable[[str], World]:
    """A function from the name of a model to its world, each made once."""
    made: dict[str, World] = {}

    def make(name: str) -> World:
        if name not in made:
            made[name] = World(name, factory.mktemp(name) / "model", text)
        return made[name]

    return make
