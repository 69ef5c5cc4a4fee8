"""The plugin of vLLM: exports opened as they are, their factors in vLLM's own model classes.

vLLM calls `register` in each of its processes, by the entry point group ``vllm.general_plugins``. What an export holds
it takes for a method of quantisation, which ``compression_config`` of the configuration names (see `FactoredConfig`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankfront.methods import InputError
from rankfront.search.plain import several

if TYPE_CHECKING:  # which imports torch
    from rankfront.methods.loading import Replacements

KINDS = ("low-rank", "plain", "absent", "heads", "from-heads")  # of layers that are products and nothing else
BASES = {  # model type -> vLLM's class of it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of their blocks


def register() -> None:
    """Make exports known to this process; any number of times."""
    importlib.import_module("rankfront.methods.checkpoint")  # to transformers, by which vLLM reads configurations
    importlib.import_module("rankfront.search.serve.vllm_linear")  # to vLLM


def check_base(base: Any) -> None:
    """Raise `InputError` where no plan of a model of type ``base`` runs there."""
    if base not in BASES:
        raise InputError(f"vLLM runs factors of {', '.join(BASES)} models and this is a {base!r}: use --format dense")


def check_export(base: Any, wanted: Replacements) -> None:
    """Raise `InputError` where vLLM cannot run a model of type ``base`` with ``wanted`` in the place of its modules."""
    check_base(base)
    outside = [path for path in wanted.modules if path.rpartition(".")[2] not in PROJECTIONS]
    if outside:
        raise InputError(
            f"vLLM runs factors of projections in blocks and the plan has some at {several(outside)}: use --format"
            " nemotron-nas or dense, which multiply them out"
        )
    others = [path for path, spec in wanted.modules.items() if spec.get("kind") not in KINDS or "bits" in spec]
    if others:
        specs = [wanted.modules[path] for path in others]
        kinds = ", ".join(sorted({f"{s.get('kind')}{' in integers' * ('bits' in s)}" for s in specs}))
        raise InputError(
            f"vLLM runs {', '.join(KINDS)} layers and the plan has {kinds} at {several(others)}: use --format"
            " nemotron-nas or dense, which multiply them out"
        )
