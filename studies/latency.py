"""Compressed weights against dense ones by the clock: prefill and decode, and what memory bandwidth allows.

    python studies/latency.py [--models smollm2-135m,llama-1.1b] [--batches 1,8] [--rows 'low rank 0.5,int8']

Every linear of the blocks runs as said, the rest dense, in bf16. Factors are random: time does not depend on what they
hold. Right factors of one input are joined where that is faster, but not in rows "apart". In rows "compiled" both
models run through torch.compile with a static cache. llama-1.1b is a Llama configuration of 22 blocks and hidden size
2048, initialised at random. In rows "prepacked" the weights of both are in the layout that oneDNN reads fastest; in
"dense prepacked" the dense model's are, against itself as it was. Attention is transformers' "sdpa", in rows "eager"
the "eager" one, of both models; in "dense eager" of one. Decoding takes 64 tokens after a prompt of 256, the compressed
and the dense model taking turns token by token, each with a cache of its own; prefill, whole prompts in turns, 20
rounds and no more than 90 seconds. Ratios are medians over turns, with the interquartile range. The bound is the
weights that one decoding step reads, in bytes, over the dense model's: what a model that does nothing but read would
take. Finished rows are kept in studies/results/latency.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Cell, keep_cells, origin, provenance, read_cells
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from rankfront.methods import prepack, undo_prepack
from rankfront.methods._integers import rounded
from rankfront.methods.layers import replacement, set_module, weight_of
from rankfront.objectives import compiled
from rankfront.objectives.latency import Latency
from rankfront.search.factors.calibration import shared_inputs
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites
from rankfront.search.inputs.source import cache_folder
from rankfront.search.measure.joining import join_faster
from rankfront.search.measure.timing import Stopwatches

RESULTS = Path(__file__).parent / "results"
PROMPT, DECODE, ROUNDS, SECONDS = 256, 64, 20, 90.0
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
WARM_UP = 3  # steps
RANK_MULTIPLE = 32


def llama() -> nn.Module:
    """1.1B parameters in bf16, initialised at random."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = LlamaForCausalLM(config).eval().requires_grad_(False)
        return model
    finally:
        torch.set_default_dtype(before)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smollm2-135m": lambda: load_model(resolve("smollm2-135m"), torch.bfloat16, "cpu"),
    "llama-1.1b": llama,
}


def low_rank(keep: float, bits: int | None) -> Callable[[nn.Module], nn.Module]:
    """Two factors of the rank at which they store ``keep`` of the weight."""

    def made(dense: nn.Module) -> nn.Module:
        m, n = weight_of(dense).shape
        rank = max(RANK_MULTIPLE, RANK_MULTIPLE * round(keep * m * n / (m + n) / RANK_MULTIPLE))
        left, right = torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5
        if bits is None:
            tensors = {"left": left.bfloat16(), "right": right.bfloat16()}
            return replacement(dense, "low-rank", tensors, {"rank": rank})
        sides = {side: rounded(matrix, bits) for side, matrix in (("left", left), ("right", right))}
        tensors = {f"{side}.{name}": _narrow(t) for side, each in sides.items() for name, t in each._asdict().items()}
        return replacement(dense, "low-rank", tensors, {"rank": rank, "bits": bits})

    return made


def integers(bits: int) -> Callable[[nn.Module], nn.Module]:
    """The dense weight rounded."""

    def made(dense: nn.Module) -> nn.Module:
        found = rounded(weight_of(dense), bits)._asdict()
        return replacement(
            dense, "integer", {f"stored.{name}": _narrow(t) for name, t in found.items()}, {"bits": bits}
        )

    return made


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Row:
    """What runs at every linear of the blocks, and how.

    Attributes:
        made: the dense linear to the module in its place.
        joined: whether right factors of one input are one product where that is faster.
        compiled: whether both models are.
        prepacked: whether the compressed model is, and the dense one.
        attention: transformers' implementation of it, in the compressed model and in the dense one.
    """

    made: Callable[[nn.Module], nn.Module]
    joined: bool = True
    compiled: bool = False
    prepacked: tuple[bool, bool] = (False, False)
    attention: tuple[str, str] = ("sdpa", "sdpa")


ROWS: dict[str, Row] = {
    **{f"low rank {keep}": Row(low_rank(keep, None)) for keep in KEEPS},
    "int8": Row(integers(8)),
    "int4": Row(integers(4)),
    **{f"low rank {keep} int8": Row(low_rank(keep, 8)) for keep in (0.7, 0.5)},
    "low rank 0.5 int4": Row(low_rank(0.5, 4)),
    **{f"low rank {keep} apart": Row(low_rank(keep, None), joined=False) for keep in (0.7, 0.5, 0.3)},
    **{f"low rank {keep} compiled": Row(low_rank(keep, None), compiled=True) for keep in (0.5, 0.3)},
    "dense eager": Row(copy.deepcopy, attention=("eager", "sdpa")),
    **{f"low rank {keep} eager": Row(low_rank(keep, None), attention=("eager", "eager")) for keep in (0.7, 0.5, 0.3)},
    "dense prepacked": Row(copy.deepcopy, prepacked=(True, False)),
    **{f"low rank {keep} prepacked": Row(low_rank(keep, None), joined=False, prepacked=(True, True)) for keep in KEEPS},
}


class Pair:
    """One model dense, and compressed: the same tensors but for the linears of the blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.dense: Any = model
        held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.ours: Any = copy.deepcopy(model, held)
        places = find_sites(model).items()
        paths = {weight.path for site, place in places if place.block is not None for weight in site.weights}
        self.paths = [path for path, _ in model.named_modules() if path in paths]
        self.inputs = shared_inputs(model, self.paths, torch.zeros(1, 4, dtype=torch.long))
        self.watches = Stopwatches(cache_folder(), "cpu", torch.bfloat16)

    def compress(self, row: Row, batch: int) -> None:
        """Put in place what runs at every linear."""
        torch.manual_seed(0)
        for path in self.paths:
            set_module(self.ours, path, row.made(self.dense.get_submodule(path)))
        if row.joined:
            modules = {path: self.ours.get_submodule(path) for path in self.paths}
            join_faster(modules, self.inputs, Latency(batch=batch, prompt=PROMPT), self.watches)

    @contextmanager
    def laid_out(self, row: Row) -> Iterator[None]:
        """Within, the weights of both are as the row says."""
        chosen = [model for model, wanted in zip((self.ours, self.dense), row.prepacked, strict=True) if wanted]
        head = self.ours.get_output_embeddings()
        if len(chosen) == 1 and head.weight is not self.ours.get_input_embeddings().weight:
            self.ours.set_output_embeddings(copy.deepcopy(head))  # for the dense model's stays plain
        for model, attention in zip((self.ours, self.dense), row.attention, strict=True):
            model.set_attn_implementation(attention)
        try:
            prepack(*chosen)
            yield
        finally:
            undo_prepack(*chosen)
            self.ours.set_output_embeddings(head)

    def forwards(self, row: Row) -> dict[bool, Callable[..., Any]]:
        """What runs the compressed model, and the dense one."""
        torch._dynamo.reset()
        return {ours: compiled(model) if row.compiled else model for ours, model in self.models.items()}

    @property
    def models(self) -> dict[bool, Any]:
        return {True: self.ours, False: self.dense}

    def cache(self, row: Row) -> Any:
        """One for a whole turn; None for one that grows."""
        return StaticCache(config=self.dense.config, max_cache_len=PROMPT + WARM_UP + DECODE) if row.compiled else None


def bytes_read(model: Any) -> int:
    """Bytes of weights that a decoding step reads: all but the embedding table, unless it is the head as well."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.state_dict().values()]}
    return int(sum(held.values()) - (0 if table is head else table.nbytes))


@torch.inference_mode()
def decoded(pair: Pair, row: Row, ids: Tensor) -> Iterator[tuple[float, float]]:
    """Seconds of ours and of dense, token by token, after a prompt (batch, PROMPT)."""
    forwards, last = pair.forwards(row), {}
    for ours, forward in forwards.items():
        last[ours] = forward(input_ids=ids, past_key_values=pair.cache(row), use_cache=True, logits_to_keep=1)
    for step in range(WARM_UP + DECODE):
        seconds = {}
        for ours in (True, False) if step % 2 else (False, True):
            token, cache = last[ours].logits[:, -1:].argmax(-1), last[ours].past_key_values
            started = time.perf_counter()
            last[ours] = forwards[ours](input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds[ours] = time.perf_counter() - started
        if step >= WARM_UP:
            yield seconds[True], seconds[False]


@torch.inference_mode()
def prefilled(pair: Pair, row: Row, ids: Tensor) -> Iterator[tuple[float, float]]:
    """Seconds of ours and of dense for the whole prompt, in turns."""
    forwards, begun = pair.forwards(row), time.perf_counter()
    for turn in range(ROUNDS + 1):
        seconds = {}
        for ours in (True, False) if turn % 2 else (False, True):
            cache = pair.cache(row)
            started = time.perf_counter()
            forwards[ours](input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds[ours] = time.perf_counter() - started
        if turn:
            yield seconds[True], seconds[False]
        if turn > 2 and time.perf_counter() - begun > SECONDS:
            return


def ratio(pairs: Iterator[tuple[float, float]]) -> dict[str, float]:
    """Median of ours over dense, its interquartile range, how many, and the dense median in milliseconds."""
    ours, dense = np.array(list(pairs)).T
    low, middle, high = np.percentile(ours / dense, [25, 50, 75])
    return {"ratio": middle, "range": high - low, "turns": len(ours), "dense_ms": 1000 * float(np.median(dense))}


def measure(pair: Pair, name: str, batch: int) -> Cell:
    """Both phases at one batch size."""
    row = ROWS[name]
    pair.compress(row, batch)
    ids = torch.randint(1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    with pair.laid_out(row):
        decode, prefill = ratio(decoded(pair, row, ids)), ratio(prefilled(pair, row, ids))
    bound = bytes_read(pair.ours) / bytes_read(pair.dense)
    return {"row": name, "batch": batch, "bound": bound, "decode": decode, "prefill": prefill, "from": provenance()}


def table(cells: list[Cell]) -> str:
    """A line a row."""
    head = ("model", "batch", "row", "decode", "range", "bound", "decode over bound", "prefill", "range", "turns")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    order = list(ROWS)
    for cell in sorted(cells, key=lambda c: (list(MODELS).index(c["model"]), c["batch"], order.index(c["row"]))):
        decode, prefill = cell["decode"], cell["prefill"]
        shown = (
            *(f"{decode[name]:.3f}" for name in ("ratio", "range")),
            f"{cell['bound']:.3f}",
            f"{decode['ratio'] / cell['bound']:.2f}",
            *(f"{prefill[name]:.3f}" for name in ("ratio", "range")),
            f"{prefill['turns']}",
        )
        lines.append(f"| {cell['model']} | {cell['batch']} | {cell['row']} | {' | '.join(shown)} |")
    return "\n".join(lines)


PAGE = """# Latency against dense, and against bandwidth

How each figure is made is said at the top of `studies/latency.py`: ratios to the dense model in the same turns, smaller
is faster; "turns" are those of prefill, decoding has 64.

{table}

{dense}

Command: `python studies/latency.py --models ... --batches ... --rows ...`

{sources}
"""


def page(cells: list[Cell]) -> str:
    """The table with what it was made by."""
    dense = [
        f"{model} at batch {batch} {np.median(own['decode']):.0f} ms a step, {np.median(own['prefill']):.0f} a prompt"
        for model in MODELS
        for batch in sorted({cell["batch"] for cell in cells})
        if (
            own := {
                phase: [c[phase]["dense_ms"] for c in cells if (c["model"], c["batch"]) == (model, batch)]
                for phase in ("decode", "prefill")
            }
        )["decode"]
    ]
    return PAGE.format(
        table=table(cells),
        dense="Dense: " + "; ".join(dense) + ".",
        sources="\n".join(f"- commit {where}" for where in sorted(set(map(origin, cells)))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rows", default=",".join(ROWS))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "latency.jsonl"
    cells = read_cells(file)
    known = {(cell["model"], cell["row"], cell["batch"]) for cell in cells}
    for name in arguments.models.split(","):
        batches = [int(batch) for batch in arguments.batches.split(",")]
        missing = [row for row in arguments.rows.split(",") if any((name, row, b) not in known for b in batches)]
        pair = Pair(MODELS[name]()) if missing else None
        for row in missing:
            assert pair is not None
            for batch in (b for b in batches if (name, row, b) not in known):
                cells.append({"model": name, **measure(pair, row, batch)})
                keep_cells(file, cells[-1:])
                print(table(cells[-1:]).splitlines()[-1], flush=True)
    (RESULTS / "latency.md").write_text(page(cells), encoding="utf-8")
    print(page(cells))


if __name__ == "__main__":
    main()
