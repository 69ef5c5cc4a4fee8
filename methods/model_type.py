"""What transformers has for the model type ``rankfront`` once rankfront is imported: no torch is, before it is used."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

KEY = "rankfront"  # in a configuration, and the model type of one that has it


class AnyFactoredConfig(PreTrainedConfig):
    """Makes a configuration of the class that extends the dense model's own, see `checkpoint.classes`."""

    model_type = KEY

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **named: Any) -> Any:
        from rankfront.methods.checkpoint import CAUSAL, classes

        found = config_dict.get(KEY)
        base, auto = (found.get("base"), found.get("auto", CAUSAL)) if isinstance(found, dict) else (None, CAUSAL)
        return classes(base, auto).config.from_dict(config_dict, **named)


AutoConfig.register(KEY, AnyFactoredConfig, exist_ok=True)
