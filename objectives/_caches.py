"""What models keep between tokens, whatever they call it."""

from __future__ import annotations

from typing import Any

CACHES = ("past_key_values", "cache_params", "state")  # keys and values; states of a fixed size, as Mamba's and RWKV's


def cache_of(out: Any) -> dict[str, Any]:
    """The cache in a model's output, by the name of the argument that takes it; empty where there is none."""
    return next(({name: out[name]} for name in CACHES if out.get(name) is not None), {})
