"""Does cutting the latents of latent attention pay against low ranks of its weights, one by one?

    python studies/latent.py TEXT [--steps 400] [--threads 1]

A tiny DeepSeek-V3 without experts trains on the first three quarters of TEXT and is reported on the last one. Its
attention is y = B c / s with latents c = A x, s² = mean(c²) + ε and the gains of the norm in B; keys and values have
such a pair, and queries another. Three ways to store ρ of the r latents, at equal values in both weights:

* joint: B is cut to rank ρ in its metric, and V (ρ, r) are orthonormal rows that span what is left. Latents are V c,
  B' = B Vᵀ after the cut, and s² keeps its form: ‖V c‖² / r and a constant for the mean of what is gone;
* without the constant: s² of the latents that are left alone;
* apart: A and B each of a low rank, in the same metric. The values go to the two in the best of several splits.

Metrics are those of `svd-llm` (inputs) and of `kfac-svd` (inputs and gradients at outputs). Rotary keys stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import on_text, write_page
from from_scratch import BATCH, LENGTH, VOCABULARY, tokens_of
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from rankfront.methods._algebra import root_and_inverse
from rankfront.objectives import score

WIDTH, INNER, BLOCKS, HEADS, LATENT, QUERY_LATENT = 256, 512, 3, 8, 64, 96
RATE, CALIBRATED, REPORTED = 2e-3, 48, 48  # of Adam; windows
KEEPS, SPLITS = (0.75, 0.5, 0.25), (0.3, 0.4, 0.5, 0.6, 0.7)  # of latents; of the values, to A
PAIRS = (("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"), ("q_a_proj", "q_a_layernorm", "q_b_proj"))
PAGE = """# Latents

How is said at the top of `studies/latent.py`. A DeepSeek-V3 of {blocks} blocks of {width} dimensions, {latent} latents
of keys and values and {queries} of queries, trained on {tokens} tokens; perplexity of its own tokens on unseen windows,
dense {dense}. With every latent kept in another basis, no logit moves by more than {moved} of the largest.

| metric | latents kept | joint | without the constant | apart |
| --- | --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def trained(windows: Tensor, steps: int) -> Any:
    """The model after so many ``steps`` on ``windows`` (W, L)."""
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
            first_k_dense_replace=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=LATENT,
            q_lora_rank=QUERY_LATENT, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
            max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH // LENGTH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f}", flush=True)
    return model.eval()


def statistics(model: Any, windows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> (Gram of inputs, Gram of gradients at outputs) of the linears of `PAIRS`, in fp64."""
    found: dict[str, list[Tensor]] = {}

    def watch(path: str, module: Any, given: Any, out: Tensor) -> None:
        x = given[0].detach().flatten(0, -2).double()
        found[path][0] += x.T @ x

        def arrived(g: Tensor) -> None:
            rows = g.flatten(0, -2).double()
            found[path][1] += rows.T @ rows

        out.register_hook(arrived)

    handles = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in {name for pair in PAIRS for name in (pair[0], pair[2])}:
            m, n = module.weight.shape
            found[path] = [torch.zeros(n, n, dtype=torch.float64), torch.zeros(m, m, dtype=torch.float64)]
            handles.append(module.register_forward_hook(lambda *given, path=path: watch(path, *given)))
    for window in windows.split(8):
        model(input_ids=window, labels=window).loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return {path: (inputs, outputs) for path, (inputs, outputs) in found.items()}


def cut(weight: Tensor, rank: int, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """L (m, ρ) and R (ρ, n) of the least ‖G^{1/2} (W − L R) C^{1/2}‖_F."""
    into, back = root_and_inverse(inputs)
    out, forth = root_and_inverse(outputs)
    u, s, vh = torch.linalg.svd(out @ weight.double() @ into, full_matrices=False)
    return forth @ u[:, :rank] * s[:rank], vh[:rank] @ back


def pairs(model: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    """(path, A, norm, B) of every pair."""
    for path, module in model.named_modules():
        for names in PAIRS if hasattr(module, "kv_a_layernorm") else ():
            yield path, *(getattr(module, name) for name in names)


def joint(model: Any, known: dict[str, tuple[Tensor, Tensor]], keep: float, fisher: bool, constant: bool) -> None:
    """Cut the latents of every pair, in place: those that are gone are zeros, which the norm and B read as nothing."""
    for path, first, norm, second in pairs(model):
        r = norm.weight.numel()
        kept, gains = round(keep * r), norm.weight.double()
        inputs, outputs = of(known, path, second, model, fisher)
        left, right = cut(second.weight * gains, kept, inputs / gains / gains[:, None], outputs)
        basis, upper = torch.linalg.qr(right.T)  # (r, ρ), (ρ, ρ): R = upperᵀ basisᵀ
        gram = of(known, path, first, model, fisher)[0]
        latents = first.weight[:r].double()
        gone = latents - basis @ (basis.T @ latents)
        first.weight[:r], second.weight[:], norm.weight[:] = 0, 0, 1
        first.weight[:kept] = (basis.T @ latents).float()
        second.weight[:, :kept] = (left @ upper.T).float()
        if constant and kept < r:
            first.bias = torch.nn.Parameter(torch.zeros(len(first.weight)), requires_grad=False)
            first.bias[kept] = math.sqrt(torch.trace(gone @ gram @ gone.T).item() / (CALIBRATED * LENGTH))


def apart(model: Any, known: dict[str, tuple[Tensor, Tensor]], keep: float, fisher: bool, share: float) -> None:
    """Both weights of every pair at low ranks, in place, of as many values as `joint` stores with rotary keys."""
    for path, first, norm, second in pairs(model):
        r = norm.weight.numel()
        rows, n = first.weight.shape
        m = second.weight.shape[0]
        values = round(keep * r) * (n + m) + (rows - r) * n
        ranks = int(share * values / (rows + n)), int((1 - share) * values / (m + r))
        for module, rank in zip((first, second), ranks, strict=True):
            if rank < min(module.weight.shape):
                left, right = cut(module.weight, rank, *of(known, path, module, model, fisher))
                module.weight[:] = (left @ right).float()


def of(known: Any, path: str, module: Any, model: Any, fisher: bool) -> tuple[Tensor, Tensor]:
    """The statistics of a ``module`` below ``path``; without ``fisher``, every output counts alike."""
    name = next(name for name, child in model.get_submodule(path).named_children() if child is module)
    inputs, outputs = known[f"{path}.{name}"]
    return inputs, outputs if fisher else torch.eye(len(outputs), dtype=torch.float64)


def main() -> None:
    asked = on_text(__doc__, steps=400)
    train, report = tokens_of(Path(asked.text).read_text(encoding="utf-8"))
    model = trained(train, asked.steps)
    known, report = statistics(model, train[:CALIBRATED]), report[:REPORTED]
    model.requires_grad_(False)

    def changed(way: Any, *given: Any) -> Any:
        student = copy.deepcopy(model)
        way(student, known, *given)
        return student

    def measured(way: Any, *given: Any) -> float:
        return score(changed(way, *given), report).perplexity

    with torch.no_grad():
        logits, same = (each(input_ids=report[:1]).logits for each in (model, changed(joint, 1.0, False, True)))
    lines = []
    for fisher in (False, True):
        for keep in KEEPS:
            ways = [measured(joint, keep, fisher, constant) for constant in (True, False)]
            ways.append(min(measured(apart, keep, fisher, share) for share in SPLITS))
            figures = " | ".join(f"{value:.2f}" for value in ways)
            lines.append(f"| {'kfac-svd' if fisher else 'svd-llm'} | {keep:g} | {figures} |")
            print(lines[-1], flush=True)
    write_page(
        "latent", PAGE, lines, dense=f"{score(model, report).perplexity:.2f}", blocks=str(BLOCKS), width=str(WIDTH),
        latent=str(LATENT), queries=str(QUERY_LATENT), tokens=f"{asked.steps * BATCH:,}",
        moved=f"{((logits - same).abs().max() / logits.abs().max()).item():.0e}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
