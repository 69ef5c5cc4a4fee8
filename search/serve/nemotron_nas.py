"""``nemotron-nas``: `DeciLMForCausalLM`, a Llama whose blocks differ, with code of its own for transformers.

vLLM (``model_executor/models/nemotron_nas.py``) takes ``ffn.intermediate_size`` or ``ffn.ffn_mult``; SGLang, mlx-lm and
TensorRT-LLM take ``ffn_mult`` alone, and round the width that it stands for up to a multiple of 256. So widths that are
such multiples, all of them, are written as ``ffn_mult``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rankfront.search.serve import modeling_nemotron_nas as code
from rankfront.search.serve.folder import save
from rankfront.search.serve.llama_like import check, has_attention
from rankfront.search.serve.structure import Structure

INSIDE = 0.5  # neurons below the width that ffn_mult stands for, so that it rounds up to it whatever the digits


def write_nemotron_nas(structure: Structure, folder: Path) -> int:
    """Write ``structure`` to ``folder``; how many values it stores. Raises `InputError` where it is no such Llama."""
    check(structure, "nemotron-nas")
    config = structure.config
    data = config.to_dict()
    rope = data.get("rope_parameters") or {}
    for name in ("model_type", "architectures", "layer_types", "sliding_window", "use_sliding_window"):
        data.pop(name, None)
    data |= {"num_hidden_layers": len(structure.blocks), "block_configs": block_configs(structure)}
    if config.model_type == "qwen2":
        data["qkv_bias"] = True
    with torch.device("meta"):
        target = code.DeciLMForCausalLM(code.NemotronNASConfig(**data))
    values = save(structure, target, folder)
    _finish(folder, rope)
    return values


def steps_of_256(structure: Structure) -> bool:
    """Whether every engine takes the widths as they are."""
    return all(block.width % code.STEP == 0 for block in structure.blocks)


def block_configs(structure: Structure) -> list[dict[str, dict[str, Any]]]:
    """``block_configs`` of the configuration."""
    config = structure.config
    group = config.num_attention_heads // config.num_key_value_heads
    stepped = steps_of_256(structure)
    found = []
    for place, block in enumerate(structure.blocks):
        attention = has_attention(structure, place)
        ffn: dict[str, Any] = {"no_op": not block.width, "replace_with_linear": False}
        if block.width and stepped:
            ffn["ffn_mult"] = round(1.5 * (block.width - INSIDE) / config.hidden_size, 6)
        elif block.width:
            ffn["intermediate_size"] = block.width
        heads = {"no_op": not attention, "replace_with_linear": False, "n_heads_in_group": group if attention else None}
        found.append({"attention": heads, "ffn": ffn})
    return found


def _finish(folder: Path, rope: dict[str, Any]) -> None:
    """Write the code, and name it in the configuration, with rotary positions as older readers look for them."""
    source = Path(code.__file__)
    (folder / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    module = source.stem
    data["auto_map"] = {
        "AutoConfig": f"{module}.{code.NemotronNASConfig.__name__}",
        "AutoModelForCausalLM": f"{module}.{code.DeciLMForCausalLM.__name__}",
    }
    data["rope_theta"] = rope.get("rope_theta")
    scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
    data["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaled
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
