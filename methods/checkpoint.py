"""The door exported models load through: transformers' quantizer registration, quant_method ``rankfront``.

After ``import rankfront.methods``, ``AutoModelForCausalLM.from_pretrained(folder)`` reads the folder's
``quantization_config``, puts each named module's factored form in place before the weights are loaded, and
``save_pretrained`` writes it out again.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfront.methods._errors import InputError
from rankfront.methods.layers import empty_replacement, set_module

QUANT_METHOD = "rankfront"
CONFIG_VERSION = 2


class RankfrontConfig(QuantizationConfigMixin):
    """Which module runs as what: ``modules[path] = {"kind": "low-rank", "rank": 64}``.

    Attributes:
        modules: module path -> kind of layer and the settings its shapes follow from.
        tied: name of a tensor -> name of the tensor that it is (a tied embedding and head, a basis of several weights).
        version: of this format; another one than this code writes raises `InputError`.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        version: int = CONFIG_VERSION,
        **_: Any,
    ) -> None:
        if version != CONFIG_VERSION:
            remedy = "upgrade it" if version > CONFIG_VERSION else "export again"
            raise InputError(f"the export has format {version=}, this rankfront reads {CONFIG_VERSION}: {remedy}")
        self.quant_method = QUANT_METHOD
        self.modules = modules or {}
        self.tied = tied or {}
        self.version = version


class RankfrontQuantizer(HfQuantizer):
    """Replaces the named modules on the empty skeleton, before transformers loads the tensors into it."""

    def __init__(self, quantization_config: RankfrontConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path, spec in self.config.modules.items():
            settings = {name: value for name, value in spec.items() if name != "kind"}
            set_module(model, path, empty_replacement(model.get_submodule(path), spec["kind"], settings))
            # Some architectures (GPT-2) initialise a block's weights by name, and would look for the dense one.
            model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        tie_factors(model, self.config.tied)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def tie_factors(model: Any, tied: dict[str, str]) -> None:
    """Tell transformers that tensors are ``tied``, instead of the dense weights of their modules."""
    if not tied:
        return
    keys = dict(model._tied_weights_keys or {})
    for name in (*tied, *tied.values()):
        keys.pop(f"{name.rpartition('.')[0]}.weight", None)
    keys |= tied
    model._tied_weights_keys = keys
    model.all_tied_weights_keys = dict(keys)


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import of this file must not raise
    register_quantization_config(QUANT_METHOD)(RankfrontConfig)
    register_quantizer(QUANT_METHOD)(RankfrontQuantizer)
