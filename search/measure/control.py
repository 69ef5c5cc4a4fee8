"""What is reported of a model: perplexity on the report split and on a second corpus, and what it says when asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankfront.methods import InputError
from rankfront.objectives import CAUSAL, Task, score
from rankfront.objectives.tasks import Tasks
from rankfront.search.errors import reason_of
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.device import out_of_memory
from rankfront.search.plans.job import Record
from rankfront.search.splits import PROMPTS

CONTINUED = 12  # tokens
TaskSettings = Mapping[str, Any] | None


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


def reported(
    model: Any, tokens: Mapping[str, Tensor], tokenizer: Any, tasks: TaskSettings = None, task: Task = CAUSAL
) -> Record:
    """Of what runs now: ``perplexity`` on the report split, ``control`` on the control text where there is one, the
    ``continuations`` of `PROMPTS` where it makes any, and scores of ``tasks``; ``failure`` alone where the first is not
    finite."""
    scores = score(model, tokens["report"], task=task, errors=task.labelled)
    if not math.isfinite(scores.perplexity):
        return {"failure": f"perplexity on the report split is {scores.perplexity}"}
    record: Record = {"perplexity": scores.perplexity, "tokens": scores.tokens}
    if task.labelled:
        record["error_rate"] = scores.error_rate
    if "control" in tokens:
        control = score(model, tokens["control"], task=task).perplexity
        record |= {"control": control} if math.isfinite(control) else {"control_failure": str(control)}
    record |= _said(model, tokenizer) if task.generates else {"continuations": []}
    return record if tasks is None else record | {"tasks": task_scores(model, tokenizer, tasks)}


def _said(model: Any, tokenizer: Any) -> Record:
    """The continuations, or why there are none: the figures stand without."""
    try:
        return {"continuations": continuations(model, tokenizer)}
    except Exception as error:
        if out_of_memory(error):
            raise
        return {"continuations_failure": reason_of(error)}


def task_scores(model: Any, tokenizer: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What was ``asked``, and the ``scores`` by task, or one line of why there are none as ``failure``.

    `InputError` where lm-eval has no such task or metric; what says that memory is short is raised too."""
    asked = {"asked": dict(tasks)}
    try:
        return asked | {"scores": Tasks(**tasks).scores(model, tokenizer)}
    except InputError:
        raise
    except Exception as error:  # another library's, or its data's: the rest of the report stands
        if out_of_memory(error):
            raise
        return asked | {"failure": (str(error).strip().splitlines() or [type(error).__name__])[0]}
