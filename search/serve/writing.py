"""Writing a model in the format of an engine, and what that costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfront.methods import DENSE, Option
from rankfront.search.choices import Format
from rankfront.search.servable import holds
from rankfront.search.serve.folder import save
from rankfront.search.serve.llama_like import check_graph, check_model
from rankfront.search.serve.plain import width_key, write_plain
from rankfront.search.serve.structure import Structure
from rankfront.search.serve.vllm_plugin import check_base

SERVED: tuple[Format, ...] = ("plain", "nemotron-nas", "gguf", "openvino")


@dataclass(frozen=True)
class Written:
    """What a folder holds: its stored values, and what the user should know of it, a line each."""

    values: int
    notes: tuple[str, ...] = ()


def write(
    model: Any, form: Format, folder: Path, kind: str = "F16", tokenizer: Any = None, original: Path | None = None
) -> Written:
    """Write ``model``, dense or compressed, to ``folder``, where the format has one with its ``tokenizer``; of ``gguf``
    its weights as ``kind``, with the tokenizer of the GGUF file ``original`` where there is one.

    Raises `InputError` where the format cannot hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if form == "dense":
        structure = Structure(model, whole=True)
        return Written(save(structure, structure.skeleton, folder))
    structure = Structure(model)
    if form == "plain":
        return Written(write_plain(structure, folder))
    if form == "nemotron-nas":
        from rankfront.search.serve.nemotron_nas import steps_of_256, write_nemotron_nas

        values = write_nemotron_nas(structure, folder)
        stepped = steps_of_256(structure)
        others = [] if stepped else ["vLLM takes its MLP widths; SGLang, mlx-lm and TensorRT-LLM want multiples of 256"]
        return Written(values, (*others, *_zeros(structure)))
    if form == "openvino":
        from rankfront.search.serve.openvino_graph import write_openvino

        return Written(write_openvino(structure, folder, tokenizer))
    from rankfront.search.serve.gguf_file import write_gguf

    values, unrounded = write_gguf(structure, folder, kind, tokenizer, original)
    notes = list(_zeros(structure))
    if unrounded:
        notes.append(f"{len(unrounded)} tensors are F16: their rows fit no block of {kind}, such as {unrounded[0]}")
    return Written(values, tuple(notes))


def check_servable(config: Any, forms: Collection[Format]) -> None:
    """Raise `InputError` where one of ``forms`` cannot describe a model of this configuration, whatever the plan."""
    for form in forms:
        if form == "plain":
            width_key(config)
        elif form in ("nemotron-nas", "gguf"):
            check_model(config, form)
        elif form == "openvino":
            check_graph(config)
        elif form == "vllm":
            check_base(config.model_type)


def _zeros(structure: Structure) -> list[str]:
    """Where engines want an attention, which is written as zeros."""
    if structure.blocks[0].attention:
        return []
    return [f"{structure.blocks[0].attention_site} is written as zeros: engines want attention in the first block"]


def multiplied_out(options: Mapping[str, Option], form: Format) -> str | None:
    """What of a plan, site name -> option, ``form`` holds as dense weights, in a line; None where there is nothing."""
    lost: dict[str, int] = {}
    for option in options.values():
        if option.method != DENSE and holds(form, option.method) is None:
            lost[option.method] = lost.get(option.method, 0) + 1
    if not lost:
        return None
    named = ", ".join(f"{method} at {count} sites" for method, count in sorted(lost.items()))
    return f"multiplied out to dense weights, heads whole: {named}"
