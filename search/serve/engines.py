"""Engines that latencies are measured in: what is written for each, and whether they can take a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

from rankfront.methods import InputError
from rankfront.search.choices import Format
from rankfront.search.serve.writing import check_servable

FORMS: Mapping[str, Format] = {"openvino": "openvino", "xllamacpp": "gguf"}
# Engine -> the extra that brings it, and the modules of that.
EXTRAS = {
    "openvino": ("openvino", ("openvino", "openvino_tokenizers")),
    "xllamacpp": ("llama-cpp", ("xllamacpp",)),
}


def check_engines(config: Any, engines: Iterable[str]) -> None:
    """Raise `InputError` where one of ``engines`` is not installed, or cannot run a model of this configuration."""
    for engine in engines:
        check_installed(engine)
        check_servable(config, [FORMS[engine]])


def check_installed(engine: str) -> None:
    """Raise `InputError` where it is not."""
    extra, modules = EXTRAS[engine]
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise InputError(f"{engine} is not installed, which is asked for: pip install 'rankfront[{extra}]'")
