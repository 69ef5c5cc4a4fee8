"""The door exported models load through: transformers' quantizer registration, quant_method ``rankfront``.

After ``import rankfront.methods``, ``AutoModelForCausalLM.from_pretrained(folder)`` reads the folder's
``quantization_config``, puts each named module's factored form in place before the weights are loaded, and
``save_pretrained`` writes it out again.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfront.methods._errors import InputError
from rankfront.methods.joined import Joined
from rankfront.methods.layers import empty_replacement, set_module
from rankfront.methods.layers_integer import IntegerMatrix
from rankfront.methods.layers_low_rank import LowRankLinear

QUANT_METHOD = "rankfront"
CONFIG_VERSION = 2


def _mapping(found: Any, value: type) -> bool:
    return isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, value) for k, v in found.items())


def _groups(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(group, dict)
        and group.keys() == {"modules", "most"}
        and isinstance(group["modules"], list)
        and all(isinstance(path, str) for path in group["modules"])
        and (group["most"] is None or type(group["most"]) is int)
        for group in found
    )


class RankfrontConfig(QuantizationConfigMixin):
    """Which module runs as what: ``modules[path] = {"kind": "low-rank", "rank": 64}``.

    Attributes:
        modules: module path -> kind of layer and the settings its shapes follow from.
        tied: name of a tensor -> name of the tensor that it is (a tied embedding and head, a basis of several weights).
        joined: modules whose right factors run as one product, ``{"modules": [path, ...], "most": vectors or None}``.
        version: of this format; another one than this code writes raises `InputError`.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        joined: list[dict[str, Any]] | None = None,
        version: int = CONFIG_VERSION,
        **_: Any,
    ) -> None:
        if version != CONFIG_VERSION:
            remedy = "upgrade it" if type(version) is int and version > CONFIG_VERSION else "export again"
            raise InputError(f"the export has format {version=}, this rankfront reads {CONFIG_VERSION}: {remedy}")
        self.quant_method = QUANT_METHOD
        self.modules = modules or {}
        self.tied = tied or {}
        self.joined = joined or []
        self.version = version
        sound = {
            "modules": _mapping(self.modules, dict),
            "tied": _mapping(self.tied, str),
            "joined": _groups(self.joined),
        }
        if not all(sound.values()):  # configurations come from strangers
            wrong = next(name for name, right in sound.items() if not right)
            raise InputError(
                f"the export's quantization_config has no such {wrong!r} as rankfront writes: export it again"
            )


class RankfrontQuantizer(HfQuantizer):
    """Replaces the named modules on the empty skeleton, before transformers loads the tensors into it."""

    def __init__(self, quantization_config: RankfrontConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        base = str(getattr(model, "base_model_prefix", ""))
        if not hasattr(model, base) and any(path.startswith(f"{base}.") for path in self.config.modules):
            raise InputError(
                f"the export is a causal language model: load it by AutoModelForCausalLM, not as {type(model).__name__}"
            )
        for path, spec in self.config.modules.items():
            module = _empty(model, path, spec)
            if not hasattr(module, "weight"):
                # What initialises tensors that no file holds, such as the masks of GPT-Neo, looks up a block's weights
                # by name in GPT-2: it finds one that needs no values. No part of the state: it goes after loading.
                bias = getattr(module, "bias", None)
                stand_in: Any = torch.empty(0 if bias is None else len(bias), 0)  # tying makes the bias as long
                stand_in._is_hf_initialized = True
                vars(module)["weight"] = stand_in
            set_module(model, path, module)
        self._check_names(model)
        # transformers ties parameters alone: what of the tied tensors is a buffer is put in place after loading.
        buffers = self._tied_buffers(model)
        tie_factors(model, self.config, leave_out=buffers)
        ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        model._keys_to_ignore_on_load_missing = ignored | set(map(re.escape, buffers))  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for path in self.config.modules:
            vars(model.get_submodule(path)).pop("weight", None)
        for module in model.modules():
            if isinstance(module, IntegerMatrix):
                module.align()
        for name in self._tied_buffers(model):
            path, own = name.rsplit(".", 1)
            setattr(model.get_submodule(path), own, model.get_buffer(self.config.tied[name]))
        tie_factors(model, self.config)
        for group in self.config.joined:
            Joined([cast(LowRankLinear, model.get_submodule(path)) for path in group["modules"]], group["most"])
        return model

    def _check_names(self, model: nn.Module) -> None:
        """Raise `InputError` where `tied` or `joined` name what the model does not have."""
        tensors = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
        unknown = [name for pair in self.config.tied.items() for name in pair if name not in tensors]
        low_rank = {path for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
        unknown += [path for group in self.config.joined for path in group["modules"] if path not in low_rank]
        if unknown:
            raise InputError(f"the export's quantization_config names {unknown[0]!r}, which its model does not have")

    def _tied_buffers(self, model: nn.Module) -> list[str]:
        known = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        return [name for name in self.config.tied if name in known]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _empty(model: nn.Module, path: str, spec: dict[str, Any]) -> nn.Module:
    """What ``spec`` puts at ``path``, without values; `InputError` where the model has nothing there that it fits."""
    settings = {name: value for name, value in spec.items() if name != "kind"}
    try:
        dense = model.get_submodule(path)
        if not isinstance(dense, nn.Linear | nn.Embedding | Conv1D):
            raise InputError(f"it is a {type(dense).__name__}, no linear or embedding")
        return empty_replacement(dense, str(spec.get("kind")), settings)
    except (InputError, AttributeError) as error:
        raise InputError(f"the export's quantization_config does not fit its model at {path!r} ({error})") from error


def tie_factors(model: Any, config: RankfrontConfig, leave_out: Collection[str] = ()) -> None:
    """Tell transformers which tensors are ``tied``, instead of the dense weights of their modules."""
    if not config.tied:
        return
    dense = {f"{path}.weight" for path in config.modules}
    keys = {name: source for name, source in dict(model._tied_weights_keys or {}).items() if name not in dense}
    keys |= {name: source for name, source in config.tied.items() if name not in leave_out}
    model._tied_weights_keys = keys
    model.all_tied_weights_keys = dict(keys)


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import of this file must not raise
    register_quantization_config(QUANT_METHOD)(RankfrontConfig)
    register_quantizer(QUANT_METHOD)(RankfrontQuantizer)
