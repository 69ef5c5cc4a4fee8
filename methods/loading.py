"""Loading a compressed model: layers that run what is stored, in the place of a transformers model's dense modules.

    model_type "rankfront", "rankfront": {"version": 3, "base": "llama", "modules": ..., "tied": ..., "joined": ...}

with "unfused" beside them where modules were taken apart, is what ``config.json`` says beside the settings of the
dense model, and all that is needed to build the empty model which the tensors are loaded into: see `factored` for the
classes that do so.

Every export carries this file, the files of its layers and what they import, as one file (see `folder_code`). So
these import the standard library, NumPy, torch and transformers alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfront.methods._errors import InputError, check_choice
from rankfront.methods.adaptable import make_adaptable
from rankfront.methods.joined import Joined
from rankfront.methods.layers import empty_replacement, set_module, weight_of
from rankfront.methods.unfused import unfuse, unfused_in

KEY = "rankfront"  # in a configuration, and the model type of one that has it
FOLDER_FORMAT = 3
UNFUSED_FORMAT = 4  # of a folder some of whose modules were taken apart
CODE_FILE = "modeling_rankfront.py"  # of a folder


@dataclass(frozen=True)
class Replacements:
    """Which module runs as what.

    Attributes:
        modules: path -> kind of layer and the settings its shapes follow from, ``{"kind": "low-rank", "rank": 64}``.
        tied: name of a tensor -> name of the tensor that it is (a tied embedding and head, a basis of several weights).
        joined: modules whose right factors run as one product, ``{"modules": [path, ...], "most": vectors or None}``.
        unfused: path of a module that holds several matrices in one tensor -> how it is taken apart, see `unfused`.
    """

    modules: dict[str, dict[str, Any]]
    tied: dict[str, str]
    joined: list[dict[str, Any]]
    unfused: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound = {
            "modules": _mapping(self.modules, dict),
            "tied": _mapping(self.tied, str),
            "joined": _groups(self.joined),
            "unfused": _mapping(self.unfused, dict),
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
        if version not in (FOLDER_FORMAT, UNFUSED_FORMAT):
            newer = type(version) is int and version > UNFUSED_FORMAT
            remedy = "upgrade rankfront" if newer else "export it again"
            raise InputError(f"the export has format {version=}, this code reads {UNFUSED_FORMAT}: {remedy}")
        return Replacements(
            found.get("modules"),  # type: ignore[arg-type]
            found.get("tied"),  # type: ignore[arg-type]
            found.get("joined"),  # type: ignore[arg-type]
            found.get("unfused", {}),
        )

    @property
    def described(self) -> dict[str, Any]:
        """What a configuration says of them, under `KEY`."""
        taken = {"unfused": self.unfused} if self.unfused else {}
        version = UNFUSED_FORMAT if self.unfused else FOLDER_FORMAT
        return {"version": version, "modules": self.modules, "tied": self.tied, "joined": self.joined, **taken}

    def within(self, model: nn.Module) -> Replacements:
        """Those of ``model``, which may be the part without a head of the causal language model that paths begin at."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        named = (*self.modules, *self.tied, *self.unfused)
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
            {short(path): spec for path, spec in self.unfused.items() if ours(path)},
        )

    def sharing(self, paths: Collection[str]) -> set[str]:
        """``paths`` and those of every module that shares a tensor with one of them; `InputError` for unknown ones."""
        for path in paths:
            check_choice("compressed module", path, self.modules)
        found: set[str] = set()
        more = set(paths)
        while more:
            found |= more
            pairs = [{self._owner(name), self._owner(source)} for name, source in self.tied.items()]
            more = set().union(*(pair for pair in pairs if pair & found)) - found
        return found

    def _owner(self, name: str) -> str:
        return next((path for path in self.modules if name.startswith(f"{path}.")), "")

    def without(self, paths: Collection[str]) -> Replacements:
        """The same but for the modules at ``paths``."""
        return Replacements(
            {path: spec for path, spec in self.modules.items() if path not in paths},
            {name: source for name, source in self.tied.items() if self._owner(name) not in paths},
            [group for group in self.joined if not set(group["modules"]) & set(paths)],
            self.unfused,
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
    unfuse(model, wanted.unfused)
    head = getattr(model, "get_output_embeddings", lambda: None)()  # which adapters leave alone, as of dense models
    shared = {*wanted.tied, *wanted.tied.values()}
    for path, spec in wanted.modules.items():
        module = _empty(model, path, spec)
        dense = model.get_submodule(path)
        if dense is not head and isinstance(dense, nn.Linear | Conv1D):
            own = {name.removeprefix(f"{path}.") for name in shared if name.startswith(f"{path}.")}
            make_adaptable(module, weight_of(dense).shape, own)
        _stand_in(module)
        set_module(model, path, module)
    for apart in unfused_in(model).values():
        _stand_in(apart)
    _check_names(model, wanted)
    # transformers ties parameters alone: what of the tied tensors is a buffer is put in place after loading.
    buffers = _tied_buffers(model, wanted)
    tie_factors(model, wanted, leave_out=buffers)
    ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    model._keys_to_ignore_on_load_missing = ignored | set(map(re.escape, buffers))


def _stand_in(module: nn.Module) -> None:
    """Give ``module`` a weight if it has none, for as long as it is loaded; it is no part of the state.

    What initialises tensors that no file holds, such as the masks of GPT-Neo, looks up a block's weights by name in
    GPT-2 and ModernBERT: it finds one that needs no values."""
    if hasattr(module, "weight"):
        return
    bias = getattr(module, "bias", None)
    empty: Any = torch.empty(0 if bias is None else len(bias), 0)  # tying makes the bias as long
    empty._is_hf_initialized = True
    vars(module)["weight"] = empty


def settle(model: Any, wanted: Replacements) -> None:
    """Make what needs values: integers where kernels may read them, tied buffers, joined right factors."""
    for module in (*map(model.get_submodule, wanted.modules), *unfused_in(model).values()):
        vars(module).pop("weight", None)
    for module in model.modules():
        if hasattr(module, "loaded"):
            module.loaded()
    for name in _tied_buffers(model, wanted):
        share(model, name, wanted.tied[name])
    tie_factors(model, wanted)
    for group in wanted.joined:
        Joined([model.get_submodule(path) for path in group["modules"]], group["most"])


def tie_factors(model: Any, wanted: Replacements, leave_out: Collection[str] = ()) -> None:
    """Tell transformers which tensors are ``tied``, instead of the dense weights of their modules."""
    if not wanted.tied:
        return
    dense = {f"{path}.weight" for path in wanted.modules}
    keys = {name: source for name, source in model.all_tied_weights_keys.items() if name not in dense}
    keys |= {name: source for name, source in wanted.tied.items() if name not in leave_out}
    model._tied_weights_keys = keys
    model.all_tied_weights_keys = dict(keys)


def share(model: nn.Module, name: str, source: str) -> None:
    """Let the tensor called ``name`` be the one called ``source``."""
    (path, own), (place, shared) = (each.rsplit(".", 1) for each in (name, source))
    setattr(model.get_submodule(path), own, getattr(model.get_submodule(place), shared))


def _empty(model: nn.Module, path: str, spec: dict[str, Any]) -> nn.Module:
    """What ``spec`` puts at ``path``, without values; `InputError` where the model has nothing there that it fits."""
    settings = {name: value for name, value in spec.items() if name != "kind"}
    try:
        dense = model.get_submodule(path)
        if not isinstance(dense, nn.Linear | nn.Embedding | Conv1D) and spec.get("kind") != "router":
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
