"""What a search makes of a mixture of experts: one of about ten million values, trained here, then searched.

    python studies/mixture.py TEXT [--tokens 600k] [--trials 40] [--threads 2]

A Qwen3-MoE of `BLOCKS` blocks with `EXPERTS` experts, of which a token is given to `CHOSEN`, trains on the first three
quarters of TEXT, tokenized by a byte-pair tokenizer of `VOCABULARY` tokens that is trained on them too. A search
calibrates there, measures trials on the next eighth, and is reported on the last one. The model and the run stay in
studies/results/runs/mixture: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_page
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rankfront.methods import DENSE_OPTION
from rankfront.objectives import score
from rankfront.search import Plan, Study
from rankfront.search.heal.settings import parse_tokens
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import cost_of
from rankfront.search.storage.front import Row

VOCABULARY, WIDTH, INNER, BLOCKS, HEADS, LENGTH = 2_048, 192, 256, 6, 6, 128
EXPERTS, CHOSEN = 8, 2
TRAINED = 0.75  # of the text
BATCH, RATE, WARM_UP = 1_024, 2e-3, 0.05  # tokens; of Adam, falling to a tenth along a cosine; share of the steps
METHODS = ("svd-llm", "nystrom", "hola-experts", "expert-prune", "vo-svd")
KEEPS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RUN = RESULTS / "runs" / "mixture"
PAGE = """# A mixture of experts

A Qwen3-MoE of {values} million values, {blocks} blocks with {experts} experts each of which {chosen} run for a token,
trained on {tokens} tokens of WikiText-2 and searched in {trials} trials; how is said at the top of
`studies/mixture.py`. Perplexity is of a token of its own tokenizer, on windows that neither training nor the search
reads. "blocks" is `block_parameters`, "active" `active_parameters`. To the left one method at one kept fraction
wherever it is offered; to the right the best plan of the search that keeps no more of the blocks, and at how many
sites it has which method.

| uniform | keep | blocks | active | perplexity | searched: blocks | active | perplexity | methods |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def tokenizer_of(text: str) -> Any:
    """A byte-pair tokenizer trained on ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def train(text: str, tokens: int, folder: Path) -> None:
    """Train the mixture on so many ``tokens`` of ``text``, passes counted, and save it with its tokenizer."""
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].unflatten(0, (-1, LENGTH))  # (W, L)
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * INNER, moe_intermediate_size=INNER,
            num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS,
            num_experts=EXPERTS, num_experts_per_tok=CHOSEN, decoder_sparse_step=1, norm_topk_prob=True,
            max_position_embeddings=4 * LENGTH, tie_word_embeddings=True, router_aux_loss_coef=0.01,
            bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    steps = tokens // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step / steps))
    order: list[Tensor] = []
    began = time.monotonic()
    for step in range(steps):
        if not order:
            order = list(torch.randperm(len(windows)).split(BATCH // LENGTH))
        batch = windows[order.pop()]
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rate(done: float) -> float:
    """Of the highest rate, at a share of the steps."""
    return done / WARM_UP if done < WARM_UP else 0.55 + 0.45 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


def settings(text: str, trials: int, threads: int) -> dict[str, Any]:
    """The study."""
    return {
        "model": {"name": str(RUN / "model")},
        "data": {
            "length": LENGTH,
            "calibrate": {"text": text, "windows": 128, "part": [0.0, TRAINED]},
            "search": {"text": text, "windows": 96, "part": [TRAINED, (1 + TRAINED) / 2]},
            "report": {"text": text, "windows": 192, "part": [(1 + TRAINED) / 2, 1.0]},
            "control": {"windows": 0},
        },
        "space": {"methods": list(METHODS), "keep": list(KEEPS)},
        "objectives": {"perplexity": {}, "block_parameters": {}, "active_parameters": {}},
        "search": {"workers": 0, "trials": trials, "resources": {"cpu": threads}},
    }


def uniform(compressed: CompressedModel, method: str, keep: float) -> Plan:
    """``method`` at ``keep`` wherever it is offered."""
    choices = compressed.space.choices.items()
    found = {site.name: own.options.get((method, keep), DENSE_OPTION) for site, own in choices}
    return Plan.of(found, compressed.setup.origin())


def lines(study: Study) -> Iterator[str]:
    """A line for each uniform plan, with the best plan of the search that keeps no more of the blocks."""
    setup = study.setup()
    compressed, best = CompressedModel(setup), [row for row in study.rows() if row.state == "complete"]
    sites, size = inside_blocks(compressed.sites), compressed.dense_values
    block_values = setup.outline.coverage.block_values
    known: dict[str, float] = {}

    def measured(plan: Plan) -> float:
        if plan.key not in known:
            compressed.apply(plan)
            known[plan.key] = score(compressed.model, setup.tokens["report"]).perplexity
        return known[plan.key]

    dense = measured(Plan(()))
    yield f"| dense | | 1 | 1 | {dense:.2f} | | | | |"
    for method in METHODS:
        for keep in (0.9, 0.7, 0.5):
            plan = uniform(compressed, method, keep)
            cost = cost_of(plan, sites, size, 4, block_values)
            mean = measured(plan)
            within = [row for row in best if row.figure("block_parameters") <= cost.block_parameters]
            yield (
                f"| {method} | {keep:g} | {cost.block_parameters:.3f} | {cost.active_parameters:.3f} | {mean:.2f} |"
                + _searched(min(within, key=lambda row: row.figure("perplexity"), default=None), measured)
            )


def _searched(row: Row | None, measured: Callable[[Plan], float]) -> str:
    if row is None:
        return " none | | | |"
    used = Counter(option.method for _, option in row.plan.choices)
    named = ", ".join(f"{method} at {count}" for method, count in used.most_common())
    sizes = f" {row.figure('block_parameters'):.3f} | {row.values['active_parameters']:.3f} |"
    return f"{sizes} {measured(row.plan):.2f} | {named} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--tokens", default="600k")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    text = Path(asked.text).read_text(encoding="utf-8")
    if not (RUN / "model").is_dir():
        train(text[: int(TRAINED * len(text))], parse_tokens(asked.tokens), RUN / "model")
    study = Study(settings(asked.text, asked.trials, asked.threads), RUN / "run")
    study.launch(Console(quiet=True), report=False)
    sizes = {"values": f"{study.setup().outline.parameters / 1e6:.1f}", "blocks": str(BLOCKS)}
    sizes |= {"experts": str(EXPERTS), "chosen": str(CHOSEN)}
    write_page("mixture", PAGE, lines(study), tokens=asked.tokens, trials=str(asked.trials), **sizes)


if __name__ == "__main__":
    main()
