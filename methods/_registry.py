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
from typing import Any

from rankfront.methods._errors import check_choice
from rankfront.methods._method import METHODS, Method

FOLDER = Path(__file__).parent
CATALOGUE = FOLDER / "catalogue.json"
DESCRIBED = ("name", "paper", "family", "geometry", "metric", "formula", "needs", "nested")
Description = dict[str, Any]


def method_names() -> list[str]:
    """Every name, in the order of the files; `dense` is an option everywhere and not among them."""
    return [*dict.fromkeys([*_file_of(), *METHODS])]


def get_method(name: str) -> Method:
    """The method called ``name``; `InputError` names the known ones and the nearest."""
    if name not in METHODS:
        check_choice("method", name, method_names())
        _load(_file_of()[name])
    return METHODS[name]


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
