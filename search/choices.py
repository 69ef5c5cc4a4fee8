"""Choices by the names that study files, the command line and Python have for them."""

from typing import Literal

Format = Literal["factored", "dense", "plain", "nemotron-nas", "gguf", "openvino", "vllm"]
Servable = Literal["factored", "plain", "nemotron-nas", "gguf", "openvino", "vllm"]  # hold plans at their size
AS_FACTORS: tuple[Format, ...] = ("factored", "vllm")  # folders alike; vLLM runs all that the second holds
Refit = Literal["none", "sequential"]
Stage = Literal["blocks", "logits"]
STAGES: tuple[tuple[Stage, ...], ...] = (("blocks",), ("logits",), ("blocks", "logits"))
Loss = Literal["kl", "ce", "both"]
BlockError = Literal["relative", "fisher"]
Window = Literal["block", "half"]
TeacherChoice = Literal["auto", "beside", "cached"]
ModelTask = Literal["causal-lm", "masked-lm", "sequence-classification"]
OURS = "rankfront"
SAMPLERS = (OURS, "random", "tpe", "nsga2", "nsga3", "gp")
Effort = Literal["auto", "quick", "normal"]
