"""What is reported of a model: perplexity on the report split and on a second corpus, and what it says when asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankfront.objectives import score
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.plans.job import Record
from rankfront.search.splits import PROMPTS

CONTINUED = 12  # tokens


@torch.inference_mode()
def continuations(model: Any, tokenizer: Any) -> list[str]:
    """What follows each of `PROMPTS`: the likeliest token, `CONTINUED` times or until the end token.

    All at once, shorter ones filled up behind their end, where no causal model looks.
    """
    device = next(model.parameters()).device
    room = (capacity_of(model).positions or CONTINUED + 512) - CONTINUED
    prompts = [tokenizer(prompt)["input_ids"][-room:] for prompt in PROMPTS]
    rows, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(CONTINUED):
        longest = max(map(len, rows))
        filled = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
        likeliest = model(input_ids=filled, use_cache=False).logits.argmax(-1)
        for number, row in enumerate(rows):
            token = int(likeliest[number, len(row) - 1])
            ended[number] |= token == tokenizer.eos_token_id
            if not ended[number]:
                row.append(token)
        if all(ended):
            break
    return [str(tokenizer.decode(row[len(prompt) :])) for row, prompt in zip(rows, prompts, strict=True)]


def reported(model: Any, tokens: Mapping[str, Tensor], tokenizer: Any) -> Record:
    """Of what runs now: ``perplexity`` on the report split, ``control`` on the control text where there is one, and
    the ``continuations`` of `PROMPTS`; ``failure`` alone where the first is not finite."""
    scores = score(model, tokens["report"])
    if not math.isfinite(scores.perplexity):
        return {"failure": f"perplexity on the report split is {scores.perplexity}"}
    record: Record = {"perplexity": scores.perplexity, "tokens": scores.tokens}
    if "control" in tokens:
        control = score(model, tokens["control"]).perplexity
        record |= {"control": control} if math.isfinite(control) else {"control_failure": str(control)}
    return record | {"continuations": continuations(model, tokenizer)}
