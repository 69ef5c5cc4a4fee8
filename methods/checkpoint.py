"""What transformers loads exports by, once rankfront is imported: classes of models, and a quantiser.

After ``import rankfront.methods``, ``AutoModel`` and the automatic class of the model's head, one of `AUTO`, build the
model that a folder's ``config.json`` describes by the code installed here, not by the folder's own: no
``trust_remote_code`` is needed.

Exports of format 2, which have no code of their own, were described as quantised by ``rankfront``: the configuration of
the dense model with a ``quantization_config``. They load by `RankfrontQuantizer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import AutoModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES
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
CAUSAL = "AutoModelForCausalLM"  # what exports are loaded by that do not say so
AUTO = {  # -> what transformers' mapping is called by
    CAUSAL: "CAUSAL_LM",
    "AutoModelForMaskedLM": "MASKED_LM",
    "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
}


def contents(config: Any) -> dict[str, Any] | None:
    """``modules``, ``tied`` and ``joined`` of an export, by its configuration, to read and to change; else None."""
    found = getattr(config, KEY, None)
    if isinstance(found, dict):
        return found
    older = getattr(config, "quantization_config", None)
    return older.__dict__ if isinstance(older, RankfrontConfig) else None


def describe(folder: Path, model: Any, wanted: Replacements, auto: str | None = None) -> None:
    """Make the folder that a dense class of ``model`` wrote one that loads with ``wanted``: its configuration, and the
    code that it names. ``auto`` is the automatic class that loads the model, where several know its class."""
    base = _base_of(model, AUTO if auto is None else (auto,))
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("quantization_config", None)
    data |= {
        "model_type": base.factored_type,
        "architectures": [factored_name(base.whole)],
        "auto_map": data.get("auto_map", {}) | base.auto_map,
        KEY: {"base": base.model_type, **_said_auto(base.auto), **wanted.described},
    }
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CODE_FILE).write_text(folder_code(base, wanted.modules, wanted.unfused), encoding="utf-8")


def _said_auto(auto: str) -> dict[str, str]:
    """What an export says of how it is loaded: causal language models, all that there were once, say nothing."""
    return {} if auto == CAUSAL else {"auto": auto}


def _ending(auto: str) -> str:
    """Of the names of what several heads share, their configuration and the model without one: "" for causal ones."""
    return auto.removeprefix("AutoModel") if auto != CAUSAL else ""


def _models(auto: str) -> Any:
    """Configuration class -> model class, of those that the automatic class ``auto`` knows."""
    return getattr(modeling_auto, f"MODEL_FOR_{AUTO[auto]}_MAPPING")


def whole_class(config: type, auto: str) -> Any:
    """The class that ``auto`` builds of ``config``, or None.

    Of a few types, such as Emu3 and Mllama, it builds a class of the text's part of the configuration that it knows."""
    found = _first(_models(auto).get(config, None))
    outer = model_type_to_module_name(config.model_type)  # type: ignore[attr-defined]
    if found is None and outer in CONFIG_MAPPING:
        found = _first(_models(auto).get(CONFIG_MAPPING[outer], None))
        return found if getattr(found, "config_class", None) is config else None
    return found


def _base_of(model: Any, autos: Iterable[str]) -> Base:
    """What ``model``, which is dense by its class, is to transformers, and which of ``autos`` loads it."""
    config, whole = type(model.config), type(model)
    if config.model_type in CONFIG_MAPPING and CONFIG_MAPPING[config.model_type] is config:
        for auto in autos:
            if whole_class(config, auto) is whole:
                return Base(config.model_type, config, whole, _first(MODEL_MAPPING.get(config, None)), auto)
    mapped = getattr(model.config, "auto_map", None) or {}
    named = [auto for auto in autos if str(mapped.get(auto)).rpartition(".")[2] == whole.__name__]
    return Base(None, config, whole, None, [*named, *autos][0])


class Classes(NamedTuple):
    """The factored classes of a model type: its configuration, the model with its head, the model without one."""

    config: Any
    whole: Any
    headless: Any


def classes(base: Any, auto: Any = CAUSAL) -> Classes:
    """Those of the model type ``base`` of transformers that ``auto`` loads; `InputError` where it has none such."""
    if (
        not isinstance(base, str)
        or auto not in AUTO
        or base not in CONFIG_MAPPING
        or whole_class(CONFIG_MAPPING[base], auto) is None
    ):
        what = "causal language model" if auto == CAUSAL else f"model for {shown(auto)}"
        raise InputError(
            f"the export is of model type {shown(base)}, of which this transformers has no {what}: upgrade transformers"
        )
    return _classes(base, auto)


def _dense(base: str, auto: str) -> tuple[Any, Any, Any]:
    """The classes of transformers that those of `Classes` extend; None where there is no such."""
    config = CONFIG_MAPPING[base]
    return config, whole_class(config, auto), _first(MODEL_MAPPING.get(config, None))


@cache
def _classes(base: str, auto: str) -> Classes:
    config, whole, headless = _dense(base, auto)
    named = Base(base, config, whole, headless, auto)
    of = _ending(auto)

    class Config(FactoredConfig, config):  # type: ignore[valid-type, misc]
        def code(self) -> str:
            found = contents(self) or {}
            return folder_code(named, found.get("modules", {}), found.get("unfused"))

    found = _named(Config, config, of)
    models = [
        _named(type("Model", (FactoredModel, dense), {"config_class": found}), dense, end) if dense else None
        for dense, end in ((whole, ""), (headless, of))
    ]
    for loader, model in zip((getattr(transformers, auto), AutoModel), models, strict=True):
        if model is not None:
            loader.register(found, model, exist_ok=True)
    return Classes(found, *models)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """A factored class by its name: unpickling looks it up, in processes that have not loaded such a model too."""
    for auto, kind in AUTO.items():
        heads = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        for base, config in CONFIG_MAPPING_NAMES.items():
            whole = heads.get(base) or heads.get(model_type_to_module_name(base))
            shared = (config, MODEL_MAPPING_NAMES.get(base)) if whole else ()
            named = (whole, *(f"{each}{_ending(auto)}" for each in shared if isinstance(each, str)))
            if any(isinstance(each, str) and name == f"Rankfront{each}" for each in named) and name in _own(base, auto):
                _classes(base, auto)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _own(base: str, auto: str) -> set[str]:
    """The names of those of `_classes` that no other type has as well: InternLM3's models are Llama's classes."""
    dense, of = _dense(base, auto), _ending(auto)
    if dense[1] is None:
        return set()
    return {
        f"{factored_name(each)}{end}"
        for each, end in zip(dense, (of, "", of), strict=True)
        if each is not None and getattr(each, "config_class", each).model_type == base
    }


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple | list) else found


def _named(made: type, dense: type, of: str = "") -> type:
    """``made``, under the name that it has in a folder's code, by which this module has it too: it is pickled so.

    ``of`` tells apart those that extend one class for several heads."""
    made.__name__ = made.__qualname__ = f"{factored_name(dense)}{of}"
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
