"""Registers the loader of exports with transformers no sooner than transformers has somewhere to register it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = "transformers.quantizers.auto"  # which imports torch, and most of transformers
LOADER = "rankfront.methods.checkpoint"


class _AfterTables(MetaPathFinder):
    """Finds `TABLES` as it would be found anyway, once, and imports `LOADER` when they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(LOADER)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def open_door() -> None:
    """Import `LOADER` now where transformers' tables are there, else as soon as they are."""
    if TABLES in sys.modules:
        importlib.import_module(LOADER)
    elif not any(isinstance(finder, _AfterTables) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTables())
