"""What is reported of a model: perplexity on the report split and on a second corpus, and what it says when asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankfront.objectives import score
from rankfront.search.attributes import Report
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.splits import PROMPTS

CONTINUED = 12  # tokens


@torch.inference_mode()
def continuations(model: Any, tokenizer: Any) -> list[str]:
    """What follows each of `PROMPTS`: the likeliest token, `CONTINUED` times or until the end token."""
    device = next(model.parameters()).device
    room = (capacity_of(model).positions or CONTINUED + 512) - CONTINUED
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"][-room:]], device=device)
        length = ids.shape[1]
        for _ in range(CONTINUED):
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            if int(likeliest) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, likeliest], dim=1)
        found.append(str(tokenizer.decode(ids[0, length:].tolist())))
    return found


def reported(model: Any, tokens: Mapping[str, Tensor], tokenizer: Any) -> Report:
    """Of what runs now: ``perplexity`` on the report split, ``control`` on the control text where there is one, and
    the ``continuations`` of `PROMPTS`; ``failure`` alone where the first is not finite."""
    scores = score(model, tokens["report"])
    if not math.isfinite(scores.perplexity):
        return {"failure": f"perplexity on the report split is {scores.perplexity}"}
    record: dict[str, Any] = {"perplexity": scores.perplexity, "tokens": scores.tokens}
    if "control" in tokens:
        control = score(model, tokens["control"]).perplexity
        record |= {"control": control} if math.isfinite(control) else {"control_failure": str(control)}
    return record | {"continuations": continuations(model, tokenizer)}
