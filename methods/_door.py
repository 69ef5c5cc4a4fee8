"""Registers what loads exports with transformers no sooner than transformers has somewhere to register it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LOADERS = {  # a table of transformers' -> what registers itself there
    "transformers.models.auto.configuration_auto": "rankfront.methods.model_type",
    "transformers.quantizers.auto": "rankfront.methods.checkpoint",  # which imports torch, and most of transformers
}


class _AfterTable(MetaPathFinder):
    """Finds a ``table`` as it would be found anyway, once, and imports its loader when it has been executed."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.table:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(LOADERS[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def open_door() -> None:
    """Import every loader now where transformers' table is there, else as soon as it is."""
    waiting = {finder.table for finder in sys.meta_path if isinstance(finder, _AfterTable)}
    for table, loader in LOADERS.items():
        if table in sys.modules:
            importlib.import_module(loader)
        elif table not in waiting:
            sys.meta_path.insert(0, _AfterTable(table))
