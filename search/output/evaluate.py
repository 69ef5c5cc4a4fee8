"""Evaluate one model, dense or exported: perplexity, parameters, latency."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from rankfront.methods import check_choice, prepack
from rankfront.objectives import CAUSAL, generate, score
from rankfront.objectives._generation import read
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.device import DTYPES, pick_device, pick_dtype
from rankfront.search.inputs.labelled import rows_of
from rankfront.search.inputs.model import count_bytes, count_parameters, load_model, load_tokenizer
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.tasks import LOADING, make_task
from rankfront.search.splits import Split

PROMPT, DECODE, ROUNDS = 128, 16, 5  # tokens, tokens, repetitions of the timing


def evaluate(
    name: str,
    text: str,
    windows: int,
    length: int,
    device: str = "auto",
    dtype: str = "auto",
    prepacked: bool = False,
    trust_remote_code: bool = False,
    task: str = CAUSAL.name,
) -> dict[str, Any]:
    """Perplexity on ``windows`` windows of ``text``, stored parameters, and absolute speed on this machine, of a model
    for this ``task``; no speed of decoding where it decodes nothing.

    ``prepacked``: with weights in the order that a CPU reads fastest, see `prepack`. ``trust_remote_code`` lets Python
    code that comes with the model run.

    Speeds are medians of `ROUNDS` runs after one warm-up; absolute figures compare only within one machine.
    Raises `InputError` for an unknown model or text, or a text too short.
    """
    check_choice("task", task, LOADING)
    source = resolve(name, trust_remote_code, task)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    tokenizer = load_tokenizer(source)
    made = make_task(task, tokenizer)
    tokens = rows_of(source, tokenizer, made, {"evaluate": Split(text, windows)}, length)["evaluate"]
    model = load_model(source, DTYPES[dtype], device, apart=False)
    capacity = capacity_of(model)
    capacity.check_length(length, "--length")
    capacity.check_tokens({"evaluate": tokens})
    stored = {"parameters": count_parameters(model), "bytes": count_bytes(model)}
    if prepacked:
        prepack(model)
    scores = score(model, tokens, task=made, errors=made.labelled)
    positions = capacity.positions or PROMPT + DECODE
    prompt = tokens.flatten()[: max(1, min(PROMPT, positions - DECODE))][None].to(device)
    run = partial(generate, model, decode=DECODE) if made.generates else partial(read, model)
    run(prompt)
    runs = [run(prompt) for _ in range(ROUNDS)]
    speeds = {"prefill_tokens_per_second": prompt.numel() / median(run.prefill for run in runs)}
    if made.generates:
        speeds["decode_ms_per_token"] = 1000 * median(run.decode for run in runs) / DECODE
    return {
        "model": name,
        "text": text,
        "tokens": scores.tokens,
        "perplexity": scores.perplexity,
        **({"error_rate": scores.error_rate} if made.labelled else {}),
        **stored,
        "dtype": dtype,
        "device": device,
        **speeds,
    }
