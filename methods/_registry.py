"""The methods by name: their files are imported when they are used, and described without.

``catalogue.json`` holds what every file registers, as the methods describe themselves; ``make catalogue`` writes it. A
file that it does not list yet is imported whenever the methods are listed.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rankfront.methods._errors import check_choice
from rankfront.methods._method import METHODS, Method, Option, Site
from rankfront.methods._sizes import INTEGER_BITS

if TYPE_CHECKING:  # which imports torch
    from rankfront.methods._rounded import Rounded

FOLDER = Path(__file__).parent
CATALOGUE = FOLDER / "catalogue.json"
DESCRIBED = ("name", "paper", "family", "geometry", "metric", "formula", "needs", "nested")
Description = dict[str, Any]


def method_names() -> list[str]:
    """Every name, in the order of the files; `dense` is an option everywhere and not among them."""
    return [*dict.fromkeys([*_file_of(), *METHODS])]


def get_method(name: str) -> Method:
    """The method called ``name``; `InputError` names the known ones and the nearest.

    ``svd-llm-int4`` is ``svd-llm`` with its matrices in 4 bits, and so of every method whose factors have any.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in method_names() and (narrow := _in_fewer_bits(name)) is not None:
        return narrow
    check_choice("method", name, method_names())
    _load(_file_of()[name])
    return METHODS[name]


def narrow_name(name: str, bits: int) -> str:
    """What ``name`` is called with its matrices in fewer bits."""
    return f"{name}-int{bits}"


def whole_name(name: str) -> str:
    """The name of what is rounded in ``name``: itself where the bits are its own."""
    return name if name in method_names() else name.rpartition("-int")[0]


def narrowed(name: str, bits: int) -> Method | None:
    """The method ``name`` with its matrices in fewer bits; None where it has none, or holds them so itself."""
    return None if name in method_names() and "-int" in name else _in_fewer_bits(narrow_name(name, bits))


def narrow_of(method: Method) -> Rounded | None:
    """The method as one that rounds another; None where it does not."""
    return cast("Rounded", method) if hasattr(method, "plain") else None


def rounding_whole(bits: int) -> tuple[str, str]:
    """The methods that round the dense weight, the better first; only the other treats a table alone."""
    return narrow_name("gptq", bits), narrow_name("rtn", bits)


def measured_as(site: Site, option: Option) -> Option:
    """What stands for ``option`` where the effect of a site is looked at its anchor: of several weights in fewer bits
    the same in all bits, for rounding is an effect of every single one."""
    narrow = narrow_of(get_method(option.method)) if len(site.weights) > 1 else None
    return option if narrow is None else narrow.plain(option)


@cache
def _in_fewer_bits(name: str) -> Method | None:
    """The method that ``name`` is with its matrices in fewer bits; None where it is none."""
    base, _, bits = name.rpartition("-int")
    if base not in method_names() or not hasattr(get_method(base), "matrices"):
        return None
    if bits not in map(str, INTEGER_BITS):
        return None
    narrow: Method = importlib.import_module(f"{__package__}._rounded").Rounded(get_method(base), int(bits))
    return narrow


def describe_methods() -> list[Description]:
    """`DESCRIBED` of every method, in the order of `method_names`; the caller's to change."""
    listed = {described["name"]: described for methods in _catalogue().values() for described in methods}
    return [copy.deepcopy(listed[name]) if name in listed else _described(METHODS[name]) for name in method_names()]


def _load(file: str) -> None:
    importlib.import_module(f"{__package__}.{file}")


def _described(method: Method) -> Description:
    found = {key: getattr(method, key) for key in DESCRIBED}
    return found | {"needs": list(found["needs"])}


@cache
def _catalogue() -> dict[str, list[Description]]:
    """File -> the descriptions of its methods."""
    found: dict[str, list[Description]] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return found


@cache
def _file_of() -> dict[str, str]:
    """Name -> the file that registers it, of those in the catalogue; the others are imported."""
    for file in _files():
        if file not in _catalogue():
            _load(file)
    return {described["name"]: file for file, methods in _catalogue().items() for described in methods}


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.name.startswith("_")]


def _registered() -> dict[str, list[Description]]:
    """Every file -> the methods that it registers; of a process that has imported none of them."""
    found = {}
    for file in _files():
        before = set(METHODS)
        _load(file)
        found[file] = [_described(method) for name, method in METHODS.items() if name not in before]
    return found


def write_catalogue() -> None:
    CATALOGUE.write_text(json.dumps(_registered(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
