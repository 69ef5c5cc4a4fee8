"""The classes of a compressed model: a class of transformers, whose modules its configuration replaces."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from rankfront.methods._errors import InputError
from rankfront.methods.adaptable import unmergeable
from rankfront.methods.dense import put_dense
from rankfront.methods.loading import CODE_FILE, KEY, Replacements, place, settle, share, tie_factors
from rankfront.methods.unfused import fuse, unfuse, unfused_in


class FactoredConfig:
    """The configuration of a dense model class, with what stands in the place of its modules under `KEY`.

    To stand before that configuration's class among the bases.
    """

    model_type = KEY

    @property
    def compression_config(self) -> dict[str, Any] | None:
        """What vLLM and SGLang take for a method of quantisation: they refuse the model unless they know ours.

        Without it they would put linears of their own where our layers have places for adapters, and say nothing.
        """
        found = getattr(self, KEY, None)
        return {"quant_method": KEY, **found} if isinstance(found, dict) else None

    def save_pretrained(self, save_directory: Any, *arguments: Any, **named: Any) -> Any:
        """Write it, and beside it the code that it names: whoever saves a model saves its configuration so."""
        mapped = getattr(self, "auto_map", None) or {}  # of a hub's model it names the repository too
        self.auto_map = {name: str(place).rpartition("--")[2] for name, place in mapped.items()}
        super().save_pretrained(save_directory, *arguments, **named)  # type: ignore[misc]
        (Path(save_directory) / CODE_FILE).write_text(self.code(), encoding="utf-8")

    def code(self) -> str:
        """The text of the folder's `CODE_FILE`: the file that this class is from, if it is one."""
        return Path(__file__).read_text(encoding="utf-8")


class FactoredModel:
    """A model class of transformers, whose modules are replaced as its configuration says.

    To stand before that class among the bases. Values come from safetensors alone: nothing is unpickled.
    """

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        if "add_pooling_layer" in inspect.signature(super().__init__).parameters:  # of a body alone: heads know theirs
            named.setdefault("add_pooling_layer", False)
        super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        wanted = Replacements.of(config)
        if wanted is None:
            return
        model = cast(nn.Module, self)
        wanted = wanted.within(model)
        place(model, wanted)
        if not any(parameter.is_meta for parameter in model.parameters()):  # nobody is going to load anything
            for module in unfused_in(model).values():
                module.apart()
            for name, source in wanted.tied.items():
                share(model, name, source)
            _draw(model, wanted, float(getattr(config, "initializer_range", 0.02)))
            settle(model, wanted)

    @property
    def quantization_method(self) -> str:
        """What a quantiser of transformers has set; else, where adapters cannot be merged, what tells PEFT so."""
        found: str | None = vars(self).get("quantization_method") or unmergeable(cast(nn.Module, self))
        if found is None:
            raise AttributeError("quantization_method")
        return found

    @quantization_method.setter
    def quantization_method(self, method: str) -> None:
        vars(self)["quantization_method"] = method

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **named: Any) -> Any:
        """As any model is loaded. A tensor that is missing, or of another shape, is an `InputError` by its name."""
        named["use_safetensors"] = True
        mismatches = named.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **named
        )
        if not output_loading_info:  # else who asked is told
            _check_loaded(info, mismatches, getattr(model.config, "transformers_version", None))
        wanted = Replacements.of(model.config)
        if wanted is not None:
            settle(model, wanted.within(model))
        return (model, info) if output_loading_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """As of the dense class, which computes some of its buffers while it is loaded, as Falcon-H1 does."""
        return bool(_dense_class(cls).is_custom_code())

    def dequantize(self, dtype: torch.dtype | None = None, only: Collection[str] | None = None) -> Any:
        """Multiply factors out, in place: the model is of the dense class then, and so is all that it saves.

        With ``only``, those of the modules at these paths and of what shares tensors with them; others stay factored.
        Raises `InputError` where adapters have not been merged or weights are offloaded.
        """
        model = cast(Any, self)
        found = Replacements.of(model.config)
        if found is None:
            raise InputError("the model is dense already")
        if dtype is not None:
            model.to(dtype)
        wanted = found.within(model)
        paths = set(wanted.modules) if only is None else wanted.sharing(only)
        own = _dense_class(type(self))
        with torch.device("meta"):
            skeleton = own(dense_config(model.config))
            unfuse(skeleton, wanted.unfused)
        put_dense(model, skeleton, paths, model.dtype)
        whole = {path if path in found.modules else f"{model.base_model_prefix}.{path}" for path in paths}
        if only is None:
            fuse(model)
            model.__class__ = own
            _made_dense(model.config).architectures = [own.__name__]
        else:
            setattr(model.config, KEY, getattr(model.config, KEY) | found.without(whole).described)
        _tie_anew(model, wanted.without(paths))
        return model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **named: Any
    ) -> Any:
        """As of any model; `InputError` where the table or the head is stored compressed, which has no rows to add."""
        model = cast(Any, self)
        outer = (model.get_input_embeddings(), model.get_output_embeddings())
        paths = [path for path, module in model.named_modules() if module in outer and hasattr(module, "matrix")]
        if paths and (new_num_tokens is not None or pad_to_multiple_of is not None):
            raise InputError(f"{paths[0]!r} is stored compressed: model.dequantize(only={paths}) before it is resized")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **named)  # type: ignore[misc]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # transformers reads the file that the class is in
        return bool(_dense_class(cls)._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(_dense_class(cls)._can_set_experts_implementation())


def _dense_class(factored: type) -> Any:
    return next(base for base in factored.__mro__ if not issubclass(base, FactoredModel | FactoredConfig))


def dense_config(config: Any) -> Any:
    """The configuration of the dense model that ``config`` is of, an object of its own."""
    return _made_dense(copy.deepcopy(config))


def _made_dense(config: Any) -> Any:
    own = _dense_class(type(config)) if isinstance(config, FactoredConfig) else type(config)
    ours = [KEY, "quantization_config", "model_type"]  # the class has its own
    if own.__module__.startswith("transformers."):  # of others, it says where their code is
        ours.append("auto_map")
    for name in ours:
        vars(config).pop(name, None)
    config.__class__ = own
    return config


def _tie_anew(model: Any, left: Replacements) -> None:
    """Let ``model`` know which of its tensors are one, now that no more than ``left`` is factored."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(table, "weight") and hasattr(head, "weight"):
        model.config.tie_word_embeddings = head.weight is table.weight
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    tie_factors(model, left)


@torch.no_grad()
def _draw(model: nn.Module, wanted: Replacements, deviation: float) -> None:
    """Values for what `place` left without: those of a model that is yet to be trained, and empty supports."""
    for path in wanted.modules:
        module = model.get_submodule(path)
        for parameter in module.parameters():
            parameter.normal_(0, deviation)
        for buffer in module.buffers():
            buffer.zero_()


def _check_loaded(info: Mapping[str, Any], mismatches: bool, writer: str | None) -> None:
    missing = sorted(info["missing_keys"])
    others = [] if mismatches else sorted(info["mismatched_keys"], key=str)
    if missing or others:
        found = f"has no tensor {missing[0]!r}" if missing else f"has {_shapes(others[0])}"
        raise InputError(
            f"the export {found}, as its config.json asks for: restore its files, or load it by transformers {writer},"
            f" which wrote it (here: {transformers.__version__})"
        )


def _shapes(mismatched: Any) -> str:
    """``name of shape (3, 4), not (4, 4)`` of what transformers tells of a tensor."""
    if isinstance(mismatched, tuple) and len(mismatched) == 3:
        name, found, wanted = mismatched
        return f"a tensor {name!r} of shape {tuple(found)}, not {tuple(wanted)}"
    return f"a tensor {mismatched!r} of another shape"
