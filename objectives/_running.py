"""How a model runs: what its modules and its cache hold once a token was decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from rankfront.methods import Unpacked
from rankfront.objectives._caches import cache_of
from rankfront.objectives._subject import Subject

TOKENS = 5  # that are run to see what is kept


def note_running(subject: Subject) -> None:
    """Note, once, how the model runs: ``resident_bytes``; the number of modules that keep a sparse factor or their
    whole weight made dense, ``unpacked``; and of those whose right factor is part of one product, ``joined``."""
    if "resident_bytes" in subject.notes:
        return
    _run(subject)
    modules = list(subject.model.modules())
    held = (tensor for module in modules for tensor in _tensors(vars(module).values()))
    subject.notes |= {
        "resident_bytes": float(sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())),
        "unpacked": float(sum(isinstance(module, Unpacked) and module.unpacked for module in modules)),
        "joined": float(sum(getattr(module, "joined", None) is not None for module in modules)),
    }


@torch.inference_mode()
def _run(subject: Subject) -> None:
    """As far as what it keeps is there: a token was decoded, or where none is, a row was read."""
    if subject.task.generates:
        cache_after(subject)
    else:
        subject.task.logits(subject.model, subject.windows[:1].to(next(subject.model.parameters()).device))


@torch.inference_mode()
def cache_after(subject: Subject) -> Any:
    """The cache after a prompt and one decoded token, `TOKENS` of them together; None where the model has none."""
    model = cast(Any, subject.model)
    window = subject.windows.flatten()
    ids = window.repeat(-(-TOKENS // len(window)))[None, :TOKENS].to(next(model.parameters()).device)
    out = model(input_ids=ids[:, :-1], use_cache=True)
    (cache,) = cache_of(model(input_ids=ids[:, -1:], use_cache=True, **cache_of(out))).values() or (None,)
    return cache


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor among ``values`` and in the containers there; modules count for themselves."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
