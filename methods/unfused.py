"""Modules that hold several matrices in one tensor, replaced by ones made of plain linears, and put back.

A fused module keeps E experts as tensors (E, 2I, H) and (E, H, I), or q, k and v as rows of one matrix. What stands for
it here has a linear for each matrix, whose weight is a view of the fused storage: nothing is held twice. So whatever
treats linears treats these, and `Unfused.fused` gives the module back with what the linears hold by then.

A kind says where its linears lie in the fused tensors (`Unfused.views`) and how they run. ``config.json`` names the
modules of an export that are unfused, by path, with their kind and settings (see `loading.Replacements`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankfront.methods._errors import InputError, check_choice
from rankfront.methods.layers import import_files, set_module

_KINDS: dict[str, type[Unfused]] = {}
Kind = TypeVar("Kind", bound="type[Unfused]")


def unfused_kind(name: str) -> Callable[[Kind], Kind]:
    """A decorator: the class is what a module that is unfused by the kind ``name`` runs as."""

    def registered(cls: Kind) -> Kind:
        cls.kind = name
        _KINDS[name] = cls
        return cls

    return registered


@cache
def unfused_kinds() -> dict[str, type[Unfused]]:
    """Name -> class of every kind, the files ``unfused_*.py`` that define them imported."""
    import_files("unfused_")
    return _KINDS


class _Unset(nn.Linear):
    """A linear that is not initialised: a mixture has tens of thousands."""

    def reset_parameters(self) -> None:
        """Nothing."""


class Unfused(nn.Module):
    """A module of plain linears in the place of a fused one.

    A kind is a subclass that puts the `linears` at their paths and runs them.

    Attributes:
        kind: the name it is registered under.
        own: the fused module, no part of the state. Its tensors are on the meta device once the linears have a storage
            of their own.
        settings: what views follow from, beside the shapes of ``own``.
    """

    kind: str
    own: nn.Module

    def __init__(self, own: nn.Module, settings: Mapping[str, int]) -> None:
        super().__init__()
        vars(self)["own"] = own  # nn.Module would make it a child
        self.settings = dict(settings)
        holder = self.holder(own)
        for name, child in own.named_children():
            if child is not holder:
                self.add_module(name, child)
        for name, tensor in self.spare(own, settings).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.train(own.training)

    @classmethod
    def proposals(cls, own: nn.Module) -> Iterator[dict[str, int]]:
        """Settings with which this kind may compute what ``own`` does: whoever takes one checks it by numbers."""
        raise NotImplementedError

    @classmethod
    def holder(cls, own: nn.Module) -> nn.Module:
        """The module that has the fused tensors: ``own``, or a child of it, which runs no more."""
        return own

    @classmethod
    def spare(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        """Name -> view of what the fused tensors hold beside every linear, and nothing reads."""
        return {}

    @classmethod
    def views(cls, own: nn.Module, settings: Mapping[str, int]) -> dict[str, Tensor]:
        """``PATH.weight`` (out, in), and ``PATH.bias`` (out,), of every linear: views of the tensors of ``own``.

        Whatever it raises where ``own`` has no such tensors is an `InputError` of `unfuse`.
        """
        raise NotImplementedError

    def linears(self) -> dict[str, nn.Linear]:
        """A linear on the views for each path."""
        views = self.views(self.own, self.settings)
        found: dict[str, nn.Linear] = {}
        trained = any(tensor.requires_grad for tensor in self.holder(self.own).parameters(recurse=False))
        for path in dict.fromkeys(name.rpartition(".")[0] for name in views):
            weight, bias = views[f"{path}.weight"], views.get(f"{path}.bias")
            found[path] = _Unset(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            found[path].__class__ = nn.Linear
            found[path].weight = nn.Parameter(weight, requires_grad=trained)
            if bias is not None:
                found[path].bias = nn.Parameter(bias, requires_grad=trained)
        return found

    def fused(self) -> nn.Module:
        """The fused module, with what the linears hold by now; where it holds that already, nothing is copied.

        Raises `InputError` where something else than a linear stands here.
        """
        views = self.views(self.own, self.settings)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in views):
            if not isinstance(self.get_submodule(path), nn.Linear):
                raise InputError(f"{path!r} of a fused module is stored compressed: make it dense first")
        if not self._aliased() or any(view.is_meta for view in views.values()):
            held = self.get_parameter(next(iter(views)))
            _allocate(self.holder(self.own), held.device, held.dtype)
            with torch.no_grad():
                for name, view in self._all_views().items():
                    view.copy_(self.get_parameter(name))
        return self.own.train(self.training)

    def _all_views(self) -> dict[str, Tensor]:
        return {**self.views(self.own, self.settings), **self.spare(self.own, self.settings)}

    def _aliased(self) -> bool:
        """Whether every linear, of those that have not been replaced, is a view of the fused storage."""
        for name, view in self._all_views().items():
            path, _, tensor = name.rpartition(".")
            module = self.get_submodule(path)
            if isinstance(module, nn.Linear | Unfused) and getattr(module, tensor).data_ptr() != view.data_ptr():
                return False
        return True

    def apart(self) -> None:
        """Give the linears a storage of their own."""
        self._apply(torch.clone)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module. Once the linears have a storage of their own, the fused one is let go of."""
        super()._apply(fn, recurse)
        if not self._aliased():
            _allocate(self.holder(self.own), torch.device("meta"))
        return self


def _allocate(own: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give ``own``, its children aside, tensors of the shapes that it has, without values."""
    for name, tensor in list(own.named_parameters(recurse=False)):
        empty = torch.empty_like(tensor, device=device, dtype=dtype)
        setattr(own, name, nn.Parameter(empty, requires_grad=tensor.requires_grad))


def unfuse(model: nn.Module, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Unfuse the modules of ``model`` at these paths, by ``kind`` and settings each.

    Raises `InputError` where one is not what its kind unfuses: configurations come from strangers.
    """
    for path, spec in wanted.items():
        settings = {name: value for name, value in spec.items() if name != "kind"}
        check_choice("kind of unfused module", str(spec.get("kind")), unfused_kinds())
        try:
            own = model.get_submodule(path)
            set_module(model, path, unfused_kinds()[spec["kind"]](own, settings))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the export's configuration does not fit its model at {path!r} ({error})") from error


def unfused_in(model: nn.Module) -> dict[str, Unfused]:
    """Those of ``model`` by their paths, in the order of its modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Unfused)}


def described(modules: Mapping[str, Unfused]) -> dict[str, dict[str, Any]]:
    """How each is taken apart, as `unfuse` takes it."""
    return {path: {"kind": module.kind, **module.settings} for path, module in modules.items()}


def fuse(model: nn.Module, but: Collection[str] = ()) -> dict[str, Unfused]:
    """Put every fused module back that is not at one of the paths ``but``; what stood in their places."""
    found = {path: module for path, module in unfused_in(model).items() if path not in but}
    for path, module in found.items():
        set_module(model, path, module.fused())
    return found
