"""Does training from scratch put full rank, SLTrain and low rank in the order of the SLTrain paper?

    python studies/from_scratch.py TEXT [--rows full,sltrain,low-rank] [--seeds 0,1] [--tokens 500k] [--threads 1]

A tiny Llama trains from a fresh initialisation on the first three quarters of TEXT and is reported on the last one; a
byte-pair tokenizer of 1,024 tokens is trained on the former too. Rank and density of `sltrain` are those of the paper's
smallest model: a quarter of the width, and 3% of the entries. `low-rank` stores as many values: instead of entries it
has more rank. Every row sees the same windows at the same rate. Finished cells are kept in
studies/results/from_scratch.jsonl and never measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cell, finish, has, read_cells, sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfront.methods.layers import replacement, set_module
from rankfront.search.heal.healing import Healing
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.logits import HeldOut
from rankfront.search.heal.loss import Head
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.scratch import initialise
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.heal.teacher import Beside

ROWS = ("full", "sltrain", "low-rank")
VOCABULARY, WIDTH, INNER, BLOCKS, HEADS, LENGTH = 1_024, 128, 352, 4, 4, 128
RANK, DENSITY = WIDTH // 4, 0.03
BATCH = 1_024  # tokens
HELD_OUT = 0.01  # of the windows; a cell keeps the best of eight states on them
TRAINED = 0.75  # of the text


def tokens_of(text: str) -> tuple[Tensor, Tensor]:
    """Windows (W, L) to train on and to report on."""
    cut = text.index("\n", int(TRAINED * len(text)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text[:cut]], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    parts = [torch.tensor(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:])]
    train, report = (ids[: len(ids) // LENGTH * LENGTH].unflatten(0, (-1, LENGTH)) for ids in parts)
    return train, report


def model_of(row: str) -> Any:
    """The model in the form of a row, not initialised."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    linears = {path: module for path, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    for path, dense in linears.items() if row != "full" else ():
        m, n = dense.weight.shape
        nonzeros = round(DENSITY * n)
        rank = RANK if row == "sltrain" else RANK + round(nonzeros * m / (m + n))
        tensors = {"left": torch.zeros(m, rank), "right": torch.zeros(rank, n)}
        if row == "sltrain":
            values, seed = {"values": torch.zeros(m, nonzeros)}, zlib.crc32(path.encode())
            module = replacement(dense, "low-rank-sparse", tensors | values, {"seed": seed})
        else:
            module = replacement(dense, "low-rank", tensors)
        set_module(model.model.layers, path, module)
    return model


def measure(text: str, row: str, seed: int, tokens: int) -> Cell:
    train, report = tokens_of(text)
    model = model_of(row)
    initialise(model, seed)
    settings = HealSettings(
        tokens, ("logits",), loss="ce", batch=BATCH, held_out=HELD_OUT, dtype="float32", seed=seed, from_scratch=True
    )  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (result,) = Healing(model, model, train, settings, Keeper(Path(folder), {})).run()
    plain = Precision("cpu", "float32")
    seconds = time.monotonic() - began
    held_out = HeldOut(Beside(model, plain), report, plain, "ce")
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return {
        "row": row, "seed": seed, "tokens": tokens, "blocks": blocks, "unique": train.numel(),
        "held_out": result.after, "report": held_out.mean(Head(model)),
        "seconds": seconds, "note": result.note,
    }  # fmt: skip


def table(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| row | tokens seen | values in the blocks | seeds | perplexity | by seed |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for tokens, row in product(sorted({cell["tokens"] for cell in cells}), ROWS):
        own = sorted((c for c in cells if (c["row"], c["tokens"]) == (row, tokens)), key=lambda c: c["seed"])
        if own:
            mean = math.exp(sum(c["report"] for c in own) / len(own))
            each = ", ".join(f"{math.exp(c['report']):.2f}" for c in own)
            yield f"| {row} | {tokens:,} | {own[0]['blocks']:,} | {len(own)} | {mean:.2f} | {each} |"


PAGE = """# From scratch

A Llama {width} wide, with {blocks} blocks, on WikiText-2 validation text, tokenized by a byte-pair tokenizer of
{vocabulary:,} tokens; how is said at the top of `studies/from_scratch.py`. The three quarters of the text that are
trained on have {unique:,} tokens. Perplexity is a token's, on the last quarter, as a geometric mean over seeds. The
paper reports full rank and SLTrain close together, both well below low rank, after more than a billion tokens. So few
tokens as here show how each starts to learn, and no more.

{tables}

Command: `python studies/from_scratch.py TEXT`

{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    text, tokens = Path(asked.text).read_text(encoding="utf-8"), parse_tokens(asked.tokens)
    file = RESULTS / "from_scratch.jsonl"
    cells = read_cells(file)
    for seed, row in product(map(int, asked.seeds.split(",")), asked.rows.split(",")):
        key = {"row": row, "seed": seed, "tokens": tokens}
        if not has(cells, key):
            cells = finish(file, measure(text, row, seed, tokens))
    page = PAGE.format(
        width=WIDTH, blocks=BLOCKS, vocabulary=VOCABULARY, unique=cells[0]["unique"], tables="\n".join(table(cells)),
        sources=sources(cells, lambda c: f"{c['row']} {c['tokens']:,} seed {c['seed']}"),
    )  # fmt: skip
    (RESULTS / "from_scratch.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
