"""What a checkpoint holds, against what its model runs: all of it was loaded, or the model is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rankfront.methods import InputError

# Causal masks and rotary frequencies, which earlier releases of transformers saved and which models compute today.
SAVED_BUFFERS = re.compile(r"(^|\.)attn(\.attention)?\.(bias|masked_bias|causal_mask)$|(^|\.)rotary_emb\.inv_freq$")


def check_whole(name: str, model: nn.Module, info: Mapping[str, Iterable[Any]]) -> None:
    """Raise `InputError`, naming the tensor, unless the checkpoint's tensors are those that ``model`` runs.

    ``info`` is what ``from_pretrained(output_loading_info=True)`` returns beside the model. transformers has left out
    of it what tying explains and what the model's class declares: missing tensors with a fixed initial value, and
    unexpected ones of parts that a causal language model drops (vision towers, multi-token prediction). Buffers that
    older releases saved are let through as well. Any other unexpected tensor is a weight (a bias, a further block)
    that the configuration leaves out, and the model would run without it.
    """
    computed = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if key not in computed and not SAVED_BUFFERS.search(key))
    wrong = [
        *_named("it lacks", missing),
        *_named("it has", unexpected, ", which its architecture does not run"),
        *(
            f"{key!r} is {list(found)} and the configuration makes it {list(wanted)}"
            for key, found, wanted in sorted(info["mismatched_keys"])[:1]
        ),
    ]
    if wrong:
        raise InputError(
            f"the checkpoint of model {name!r} does not fit its configuration: {'; '.join(wrong)}: restore the"
            " checkpoint, or the config.json that belongs to it"
        )


def _named(what: str, keys: list[str], ending: str = "") -> list[str]:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return [f"{what} {keys[0]!r}{more}{ending}"] if keys else []
