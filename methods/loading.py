"""Loading a compressed model: layers that run what is stored, in the place of a transformers model's dense modules.

    model_type "rankfront", "rankfront": {"version": 3, "base": "llama", "modules": ..., "tied": ..., "joined": ...}

is what ``config.json`` says beside the settings of the dense model, and all that is needed to build the empty model
which the tensors are loaded into. `FactoredModel` and `FactoredConfig` make that of any model class of transformers.

Every export carries this file, the files of its layers and what they import, as one file (see `folder_code`). So
these import the standard library, NumPy, torch and transformers alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfront.methods._errors import InputError
from rankfront.methods.adaptable import make_adaptable
from rankfront.methods.joined import Joined
from rankfront.methods.layers import empty_replacement, set_module, weight_of

KEY = "rankfront"  # in a configuration, and the model type of one that has it
FOLDER_FORMAT = 3
CODE_FILE = "modeling_rankfront.py"  # of a folder


@dataclass(frozen=True)
class Replacements:
    """Which module runs as what.

    Attributes:
        modules: path -> kind of layer and the settings its shapes follow from, ``{"kind": "low-rank", "rank": 64}``.
        tied: name of a tensor -> name of the tensor that it is (a tied embedding and head, a basis of several weights).
        joined: modules whose right factors run as one product, ``{"modules": [path, ...], "most": vectors or None}``.
    """

    modules: dict[str, dict[str, Any]]
    tied: dict[str, str]
    joined: list[dict[str, Any]]

    def __post_init__(self) -> None:
        sound = {
            "modules": _mapping(self.modules, dict),
            "tied": _mapping(self.tied, str),
            "joined": _groups(self.joined),
        }
        if not all(sound.values()):  # configurations come from strangers
            wrong = next(name for name, right in sound.items() if not right)
            raise InputError(f"the export's configuration has no such {wrong!r} as rankfront writes: export it again")

    @staticmethod
    def of(config: Any) -> Replacements | None:
        """Those that a transformers configuration asks for; None where it asks for none.

        Raises `InputError` where they are of another format, or none at all.
        """
        found = getattr(config, KEY, None)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise InputError("the export's configuration has no such 'rankfront' as it writes: export it again")
        version = found.get("version")
        if version != FOLDER_FORMAT:
            newer = type(version) is int and version > FOLDER_FORMAT
            remedy = "upgrade rankfront" if newer else "export it again"
            raise InputError(f"the export has format {version=}, this code reads {FOLDER_FORMAT}: {remedy}")
        return Replacements(found.get("modules"), found.get("tied"), found.get("joined"))  # type: ignore[arg-type]

    def within(self, model: nn.Module) -> Replacements:
        """Those of ``model``, which may be the part without a head of the causal language model that paths begin at."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        named = (*self.modules, *self.tied)
        if prefix == "." or hasattr(model, prefix[:-1]) or not any(name.startswith(prefix) for name in named):
            return self

        def ours(name: str) -> bool:
            return name.startswith(prefix)

        def short(name: str) -> str:
            return name.removeprefix(prefix)

        return Replacements(
            {short(path): spec for path, spec in self.modules.items() if ours(path)},
            {short(name): short(source) for name, source in self.tied.items() if ours(name) and ours(source)},
            [
                {"modules": [short(path) for path in group["modules"]], "most": group["most"]}
                for group in self.joined
                if all(ours(path) for path in group["modules"])
            ],
        )


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


def place(model: Any, wanted: Replacements) -> None:
    """Put the layers in place, without values, on the device of the dense modules; `settle` once they have some.

    Raises `InputError` where ``wanted`` does not fit ``model``.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()  # which adapters leave alone, as of dense models
    shared = {*wanted.tied, *wanted.tied.values()}
    for path, spec in wanted.modules.items():
        module = _empty(model, path, spec)
        dense = model.get_submodule(path)
        if dense is not head and not isinstance(dense, nn.Embedding):
            own = {name.removeprefix(f"{path}.") for name in shared if name.startswith(f"{path}.")}
            make_adaptable(module, weight_of(dense).shape, own)
        if not hasattr(module, "weight"):
            # What initialises tensors that no file holds, such as the masks of GPT-Neo, looks up a block's weights
            # by name in GPT-2: it finds one that needs no values. No part of the state: it goes after loading.
            bias = getattr(module, "bias", None)
            stand_in: Any = torch.empty(0 if bias is None else len(bias), 0)  # tying makes the bias as long
            stand_in._is_hf_initialized = True
            vars(module)["weight"] = stand_in
        set_module(model, path, module)
    _check_names(model, wanted)
    # transformers ties parameters alone: what of the tied tensors is a buffer is put in place after loading.
    buffers = _tied_buffers(model, wanted)
    tie_factors(model, wanted, leave_out=buffers)
    ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    model._keys_to_ignore_on_load_missing = ignored | set(map(re.escape, buffers))


def settle(model: Any, wanted: Replacements) -> None:
    """Make what needs values: integers where kernels may read them, tied buffers, joined right factors."""
    for path in wanted.modules:
        vars(model.get_submodule(path)).pop("weight", None)
    for module in model.modules():
        if hasattr(module, "loaded"):
            module.loaded()
    for name in _tied_buffers(model, wanted):
        _share(model, name, wanted.tied[name])
    tie_factors(model, wanted)
    for group in wanted.joined:
        Joined([model.get_submodule(path) for path in group["modules"]], group["most"])


def tie_factors(model: Any, wanted: Replacements, leave_out: Collection[str] = ()) -> None:
    """Tell transformers which tensors are ``tied``, instead of the dense weights of their modules."""
    if not wanted.tied:
        return
    dense = {f"{path}.weight" for path in wanted.modules}
    keys = {name: source for name, source in dict(model._tied_weights_keys or {}).items() if name not in dense}
    keys |= {name: source for name, source in wanted.tied.items() if name not in leave_out}
    model._tied_weights_keys = keys
    model.all_tied_weights_keys = dict(keys)


def _share(model: nn.Module, name: str, source: str) -> None:
    """Let the tensor called ``name`` be the one called ``source``."""
    (path, own), (place, shared) = (each.rsplit(".", 1) for each in (name, source))
    setattr(model.get_submodule(path), own, getattr(model.get_submodule(place), shared))


def _empty(model: nn.Module, path: str, spec: dict[str, Any]) -> nn.Module:
    """What ``spec`` puts at ``path``, without values; `InputError` where the model has nothing there that it fits."""
    settings = {name: value for name, value in spec.items() if name != "kind"}
    try:
        dense = model.get_submodule(path)
        if not isinstance(dense, nn.Linear | nn.Embedding | Conv1D):
            raise InputError(f"it is a {type(dense).__name__}, no linear or embedding")
        return empty_replacement(dense, str(spec.get("kind")), settings)
    except (InputError, AttributeError) as error:
        raise InputError(f"the export's configuration does not fit its model at {path!r} ({error})") from error


def _check_names(model: nn.Module, wanted: Replacements) -> None:
    """Raise `InputError` where `tied` or `joined` name what the model does not have."""
    tensors = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    unknown = [name for pair in wanted.tied.items() for name in pair if name not in tensors]
    can_join = {path for path, module in model.named_modules() if hasattr(module, "joined")}
    unknown += [path for group in wanted.joined for path in group["modules"] if path not in can_join]
    if unknown:
        raise InputError(f"the export's configuration names {unknown[0]!r}, which its model does not have")


def _tied_buffers(model: nn.Module, wanted: Replacements) -> list[str]:
    known = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [name for name in wanted.tied if name in known]


class FactoredConfig:
    """The configuration of a dense model class, with what stands in the place of its modules under `KEY`.

    To stand before that configuration's class among the bases.
    """

    model_type = KEY

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
        super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        wanted = Replacements.of(config)
        if wanted is None:
            return
        model = cast(nn.Module, self)
        wanted = wanted.within(model)
        place(model, wanted)
        if not any(parameter.is_meta for parameter in model.parameters()):  # nobody is going to load anything
            for name, source in wanted.tied.items():
                _share(model, name, source)
            _draw(model, wanted, float(getattr(config, "initializer_range", 0.02)))
            settle(model, wanted)

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
    def _can_set_attn_implementation(cls) -> bool:  # transformers reads the file that the class is in
        return bool(_dense_class(cls)._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(_dense_class(cls)._can_set_experts_implementation())


def _dense_class(factored: type) -> Any:
    return next(base for base in factored.__mro__ if not issubclass(base, FactoredModel))


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
