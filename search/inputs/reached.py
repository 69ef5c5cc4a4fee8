"""What a text reaches: weights that run for some token, and to whose outputs the gradient of the logits comes back.

Decoders of encoder-decoders keep the cross-attention, which runs only beside an encoder. What chooses positions, as
indexers do, runs and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import InputError, Site
from rankfront.methods.unfused_experts import is_expert
from rankfront.objectives import CAUSAL, Task
from rankfront.search.errors import reason_of
from rankfront.search.inputs.device import out_of_memory

UNREACHED = "no token of text reaches it"
UNFELT = "no gradient comes back to it"
TOKENS = 24  # that are run first; where they leave something out, the whole window is
# The largest difference by root mean square, as a share of the whole, that is rounding: guesses. In `acceptance` a norm
# in between makes 0.3 to 0.7 of it; where all is well it was under 1e-4 in fp32, and 0.04 in bf16.
ROUNDING = {torch.float64: 1e-3, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
Hook = tuple[str, Callable[..., None]]  # module path, forward hook


@contextmanager
def differentiated(model: Any, hooks: Iterable[Hook] = (), gradients: bool = True) -> Iterator[None]:
    """Within, ``gradients`` reach the output of every module from the embeddings on, though weights are frozen, and
    ``hooks`` are in place."""

    def start(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(gradients).clone()  # some models scale it in place, and a leaf cannot be

    handles = [model.get_input_embeddings().register_forward_hook(start)]
    try:
        handles += [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks]
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise `InputError` where a model that is to predict the next token has seen it: another last token changes the
    logits of those before it."""
    table = model.get_input_embeddings()
    middle = table.num_embeddings // 2  # where no special tokens are: what pads is seen by none
    ids = ((middle + torch.arange(TOKENS, device=table.weight.device)) % table.num_embeddings)[None]
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    before, after = (CAUSAL.logits(model, each).float()[:, : TOKENS - 1] for each in (ids, other))
    if (after - before).norm() > ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16]) * before.norm():
        raise InputError(
            f"{type(model).__name__} is not causal, for its logits at a token change with those after it: rankfront"
            " takes causal language models, and encoders where model.task says so"
        )


def unreached(model: Any, sites: Iterable[Site], windows: Tensor, task: Task = CAUSAL) -> dict[str, str]:
    """Name of each of ``sites`` with a weight that the first of ``windows`` (W, L) does not reach -> why.

    Experts of a mixture count as reached: which of them a token is given to, differs from text to text.
    """
    weights = [weight for site in sites for weight in site.weights if weight.kind == "linear"]
    paths = {path for weight in weights for path in weight.paths if not is_expert(model, path)}
    why: dict[str, str] = {}
    for length in (TOKENS, windows.shape[1]):
        why = _unreached(model, paths, windows[:1, :length], task)
        if not why:
            return {}
    found = {weight: why[weight.path] for weight in weights if all(path in why for path in weight.paths)}
    return {site.name: found[weight] for site in sites for weight in site.weights if weight in found}


def _unreached(model: Any, paths: Iterable[str], ids: Tensor, task: Task) -> dict[str, str]:
    """Path of each module that ``ids`` (1, L) do not reach -> why."""
    why = dict.fromkeys(paths, UNREACHED)

    felt: set[str] = set()

    def hook(path: str) -> Callable[..., None]:
        def ran(module: nn.Module, inputs: Any, output: Any) -> None:
            why[path] = UNFELT
            for tensor in (output,) if isinstance(output, Tensor) else output:  # a router gives several
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: felt.add(path))

        return ran

    with differentiated(model, [(path, hook(path)) for path in why]):
        total = task.logits(model, ids.to(next(model.parameters()).device)).float().sum()
        try:
            total.backward()
        except (AssertionError, NotImplementedError, RuntimeError) as error:  # of the model's own code
            if out_of_memory(error):
                raise
            kind = type(model).__name__
            raise InputError(
                f"{kind} lets no gradient through ({reason_of(error)}), which a search needs: search another model"
            ) from error
    return {path: each for path, each in why.items() if path not in felt}
