"""What transformers loads exports by, once rankfront is imported: classes of models, and a quantiser.

After ``import rankfront.methods``, ``AutoModelForCausalLM`` and ``AutoModel`` build the model that a folder's
``config.json`` describes by the code installed here, not by the folder's own: no ``trust_remote_code`` is needed.

Exports of format 2, which have no code of their own, were described as quantised by ``rankfront``: the configuration of
the dense model with a ``quantization_config``. They load by `RankfrontQuantizer`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfront.methods._errors import InputError, shown
from rankfront.methods.factored import FactoredConfig, FactoredModel
from rankfront.methods.folder_code import Base, factored_name, folder_code
from rankfront.methods.loading import (
    CODE_FILE,
    KEY,
    Replacements,
    place,
    settle,
)

QUANT_METHOD = "rankfront"
CONFIG_VERSION = 2


def contents(config: Any) -> dict[str, Any] | None:
    """``modules``, ``tied`` and ``joined`` of an export, by its configuration, to read and to change; else None."""
    found = getattr(config, KEY, None)
    if isinstance(found, dict):
        return found
    older = getattr(config, "quantization_config", None)
    return older.__dict__ if isinstance(older, RankfrontConfig) else None


def describe(folder: Path, model: Any, wanted: Replacements) -> None:
    """Make the folder that a dense class of ``model`` wrote one that loads with ``wanted``: its configuration, and the
    code that it names."""
    base = _base_of(model)
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("quantization_config", None)
    data |= {
        "model_type": base.factored_type,
        "architectures": [factored_name(base.causal)],
        "auto_map": data.get("auto_map", {}) | base.auto_map,
        KEY: {"base": base.model_type, **wanted.described},
    }
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CODE_FILE).write_text(folder_code(base, wanted.modules, wanted.unfused), encoding="utf-8")


def _base_of(model: Any) -> Base:
    """What ``model``, which is dense by its class, is to transformers."""
    config, causal = type(model.config), type(model)
    name = config.model_type
    known = name in CONFIG_MAPPING and CONFIG_MAPPING[name] is config
    if known and _first(MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)) is causal:
        return Base(config.model_type, config, causal, _first(MODEL_MAPPING.get(config, None)))
    return Base(None, config, causal, None)


class Classes(NamedTuple):
    """The factored classes of a model type: its configuration, the causal language model, the model without a head."""

    config: Any
    causal: Any
    headless: Any


def classes(base: Any) -> Classes:
    """Those of the model type ``base`` of transformers; `InputError` where it has no causal language model of it."""
    if (
        not isinstance(base, str)
        or base not in CONFIG_MAPPING
        or CONFIG_MAPPING[base] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise InputError(
            f"the export is of model type {shown(base)}, of which this transformers has no causal language model:"
            " upgrade transformers"
        )
    return _classes(base)


@cache
def _classes(base: str) -> Classes:
    config = CONFIG_MAPPING[base]
    causal, headless = _first(MODEL_FOR_CAUSAL_LM_MAPPING[config]), _first(MODEL_MAPPING.get(config, None))
    named = Base(base, config, causal, headless)

    class Config(FactoredConfig, config):  # type: ignore[valid-type, misc]
        def code(self) -> str:
            found = contents(self) or {}
            return folder_code(named, found.get("modules", {}), found.get("unfused"))

    found = _named(Config, config)
    models = [
        _named(type("Model", (FactoredModel, dense), {"config_class": found}), dense) if dense else None
        for dense in (causal, headless)
    ]
    for auto, model in zip((AutoModelForCausalLM, AutoModel), models, strict=True):
        if model is not None:
            auto.register(found, model, exist_ok=True)
    return Classes(found, *models)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """A factored class by its name: unpickling looks it up, in processes that have not loaded such a model too."""
    for base, causal in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        named = (causal, CONFIG_MAPPING_NAMES.get(base), MODEL_MAPPING_NAMES.get(base))
        if any(isinstance(each, str) and name == f"Rankfront{each}" for each in named):
            _classes(base)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple | list) else found


def _named(made: type, dense: type) -> type:
    """``made``, under the name that it has in a folder's code, by which this module has it too: it is pickled so."""
    made.__name__ = made.__qualname__ = factored_name(dense)
    made.__module__ = __name__
    globals()[made.__name__] = made
    return made


class RankfrontConfig(QuantizationConfigMixin):
    """What format 2 says of an export: the fields of `Replacements`, and ``version``.

    Raises `InputError` for another version.
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
        self.replacements()

    def replacements(self) -> Replacements:
        """The same as the newer format has them; `InputError` where they are none."""
        return Replacements(self.modules, self.tied, self.joined)


class RankfrontQuantizer(HfQuantizer):
    """Replaces the named modules on the empty skeleton, before transformers loads the tensors into it."""

    def __init__(self, quantization_config: RankfrontConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        place(model, self.config.replacements().within(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        settle(model, self.config.replacements().within(model))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second import of this file must not raise
    register_quantization_config(QUANT_METHOD)(RankfrontConfig)
    register_quantizer(QUANT_METHOD)(RankfrontQuantizer)
