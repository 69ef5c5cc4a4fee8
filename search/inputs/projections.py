"""Linears that hold the rows of several projections: which they are, told by names, shapes and configurations.

To cut one anywhere computes the same. Whether it was cut where heads are is for `acceptance` to see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from rankfront.methods import InputError
from rankfront.methods.layers import weight_of
from rankfront.search.inputs.calls import unlike_calls
from rankfront.search.inputs.sites import blocks, is_linear

CODEGEN_GROUPS = 4  # as many as there were parts of the accelerator that it was trained on
Spec = dict[str, Any]


def fused_projections(model: nn.Module) -> dict[str, Spec]:
    """Path -> kind and settings, as `unfused.unfuse` takes them, of each linear of the blocks that can be cut."""
    try:
        prefix, found = blocks(model)
    except InputError:
        return {}
    modules: dict[str, Any] = {f"{prefix}.{name}": m for name, m in found.named_modules(remove_duplicate=False)}
    uses = Counter(id(module.weight) for module in modules.values() if is_linear(module))
    apart = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        kind: Any = type(modules.get(parent))
        if name not in CUT or not is_linear(module) or uses[id(module.weight)] > 1:  # what blocks share stays whole
            continue
        if name not in unlike_calls(kind):
            spec = CUT[name](model, modules[parent], name, weight_of(module).shape[0])
            if spec is not None:
                apart[path] = spec
    return apart


def _query_key_value(model: Any, attention: Any, name: str, rows: int) -> Spec | None:
    """How ``rows`` are cut; None where the configuration's heads are not as many."""
    config, queries, keys, width = _heads(model, attention)
    if not (queries and keys and width) or rows != (queries + 2 * keys) * width or queries % keys:
        return None
    if config.model_type == "codegen":
        each = rows // 3 // CODEGEN_GROUPS
        return {"kind": "query-value-key", "groups": CODEGEN_GROUPS, "q_proj": each, "k_proj": each, "v_proj": each}
    by_head = name == "query_key_value" or getattr(config, "multi_query", None) is False
    groups = keys if by_head else 1
    key = keys * width // groups
    return {
        "kind": "query-key-value",
        "groups": groups,
        "q_proj": queries * width // groups,
        "k_proj": key,
        "v_proj": key,
    }


def _gated_query(model: Any, attention: Any, name: str, rows: int) -> Spec | None:
    """Of heads that have a gate of their outputs beside their query."""
    _, queries, _, width = _heads(model, attention)
    if not width or rows != 2 * queries * width:
        return None
    return {"kind": "query-gate", "groups": queries, "q_proj": width, "output_gate": width}


def _gate_up(model: Any, mlp: Any, name: str, rows: int) -> Spec | None:
    return None if rows % 2 else {"kind": "gate-up", "groups": 1, "gate_proj": rows // 2, "up_proj": rows // 2}


CUT: dict[str, Callable[[Any, Any, str, int], Spec | None]] = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv"), _query_key_value),
    **dict.fromkeys(("gate_up_proj", "input_linear", "Wi"), _gate_up),
    "q_proj": _gated_query,
}


def _heads(model: Any, attention: Any) -> tuple[Any, int, int, int]:
    """The configuration of the text, how many heads queries and keys have, and their width; 0 for what is not said."""
    config = model.config.get_text_config(decoder=True)
    queries = getattr(config, "num_attention_heads", None) or 0
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    width = own if isinstance(own, int) else config.hidden_size // queries if queries else 0
    return config, queries, _key_heads(config, queries), width


def _key_heads(config: Any, queries: int) -> int:
    """As many as there are queries, or fewer, by what configurations call it."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or queries)
