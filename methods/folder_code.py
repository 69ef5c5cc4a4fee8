"""The code that an export carries, one file: made of this package's own source, so that there is one truth.

It holds `factored`, the layers that the plan's kinds run as, and what these import of this package, in an order in
which each follows what it uses; then the classes of the model at hand.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from rankfront.methods._errors import check_choice
from rankfront.methods.layers import layers
from rankfront.methods.loading import CODE_FILE
from rankfront.methods.unfused import unfused_kinds

OLDEST = (5, 0)  # transformers, below which models tie their tensors in another way
PREFIX = "rankfront.methods."
CUSTOM = "rankfront_custom"  # model type of what extends a model's own code, and loads with that alone


class Base(NamedTuple):
    """The dense model that was compressed.

    Attributes:
        model_type: as transformers calls it; None of a model that comes with code of its own.
        config, whole: its classes; headless is that of the same model without a head, if there is one.
        auto: the automatic class of transformers that loads it.
    """

    model_type: str | None
    config: type
    whole: type
    headless: type | None
    auto: str = "AutoModelForCausalLM"

    @property
    def factored_type(self) -> str:
        """The model type of what was made of it."""
        return CUSTOM if self.model_type is None else "rankfront"

    @property
    def auto_map(self) -> dict[str, str]:
        """What transformers' automatic classes find in `CODE_FILE`."""
        found = {"AutoConfig": self.config, self.auto: self.whole, "AutoModel": self.headless}
        module = Path(CODE_FILE).stem
        return {auto: f"{module}.{factored_name(own)}" for auto, own in found.items() if own is not None}


def factored_name(dense: type) -> str:
    """The name of the class that extends ``dense``."""
    return f"Rankfront{dense.__name__}"


def folder_code(
    base: Base, modules: Mapping[str, Mapping[str, Any]], unfused: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The text of the file for a model with these ``modules`` and ``unfused`` ones, path -> kind and settings."""
    files = set()
    for what, given, known in (
        ("layer kind", modules, layers()),
        ("kind of unfused module", unfused or {}, unfused_kinds()),
    ):
        for kind in {str(spec.get("kind")) for spec in given.values()}:
            check_choice(what, kind, known)
            files.add(known[kind].__module__.removeprefix(PREFIX))
    return _head(base) + _merged(frozenset(files | {"factored"})) + _classes(base)


def _head(base: Base) -> str:
    return f'''"""A {base.whole.__name__} that rankfront {version("rankfront")} compressed: its layers, and loading it.

Made of rankfront's source (Apache-2.0). It imports the standard library, NumPy, torch and transformers.
"""

from __future__ import annotations

import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < {OLDEST}:
    raise ImportError(
        "this model needs transformers {".".join(map(str, OLDEST))} or newer and"
        f" {{transformers.__version__}} is installed: pip install --upgrade transformers"
    )

'''


def _classes(base: Base) -> str:
    wanted: dict[str, list[str]] = {}
    for own in (base.config, base.whole, base.headless):
        if own is not None:
            wanted.setdefault(_module_of(own), []).append(own.__name__)
    imports = "\n".join(f"    from {module} import {', '.join(names)}" for module, names in wanted.items())
    config = factored_name(base.config)
    own_type = "" if base.model_type is not None else f"\n\n    model_type = {CUSTOM!r}"
    text = f'''
# -- this model

try:
{imports}
except ImportError as error:
    raise ImportError(
        f"transformers {{transformers.__version__}} has no {base.whole.__name__} ({{error}}): upgrade transformers"
    ) from error


class {config}(FactoredConfig, {base.config.__name__}):
    """Settings of the dense model, and what stands in the place of its modules."""{own_type}
'''
    for own in (base.whole, base.headless):
        if own is not None:
            text += f"\n\nclass {factored_name(own)}(FactoredModel, {own.__name__}):\n    config_class = {config}\n"
    return text


def _module_of(own: type) -> str:
    """Where the file imports a class from: transformers itself, or a file of the model's own beside it."""
    if getattr(transformers, own.__name__, None) is own:
        return "transformers"
    return own.__module__ if own.__module__.startswith("transformers.") else f".{own.__module__.rpartition('.')[2]}"


@cache
def _merged(files: frozenset[str]) -> str:
    """The sources of ``files`` and of all that they import of this package, one below another, imports first.

    Raises ValueError where two of them use one name for two things.
    """
    sources, waiting = {}, list(files)
    while waiting:
        name = waiting.pop()
        if name not in sources:
            sources[name] = _Source((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
            waiting += sources[name].own
    order = list(TopologicalSorter({name: sorted(sources[name].own) for name in sorted(sources)}).static_order())
    meanings: dict[str, str] = {}
    for name in order:
        for bound, meaning in sources[name].bound(name).items():
            if meanings.setdefault(bound, meaning) != meaning:
                raise ValueError(f"{bound!r} is {meanings[bound]} and {meaning}: give one of them another name")
    imported: dict[str, set[str]] = {}
    for module, name in (each for source in sources.values() for each in source.imports):
        imported.setdefault(module, set()).add(name)
    plain = [f"import {name}" for name in sorted(imported.pop("", ()))]
    named = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imported.items())]
    parts = [f"# -- rankfront/methods/{name}.py\n\n{sources[name].body}\n" for name in order]
    return "\n".join(plain + named) + "\n\n" + "\n".join(parts)


class _Source:
    """One file taken apart: ``own`` files of this package that it imports, its other ``imports``, and the rest."""

    def __init__(self, text: str) -> None:
        tree, lines = ast.parse(text), text.splitlines()
        self.own: list[str] = []
        self.imports: list[tuple[str, str]] = []  # (module, name), or ("", module)
        self._names: dict[str, str] = {}  # imported -> from where
        dropped: set[int] = set()
        for place, node in enumerate(tree.body):
            docstring = place == 0 and isinstance(node, ast.Expr)
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._imported(node)
            elif not docstring:
                self._names |= dict.fromkeys(_defined(node), "")
                continue
            dropped |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
        self.body = "\n".join(line for number, line in enumerate(lines) if number not in dropped).strip("\n")

    def _imported(self, node: ast.Import | ast.ImportFrom) -> None:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if module.startswith(PREFIX):
            self.own.append(module.removeprefix(PREFIX))
        elif module != "__future__":
            self.imports += [(module, ast.unparse(each)) for each in node.names]
            self._names |= {each.asname or each.name: f"{module}.{each.name}" for each in node.names}

    def bound(self, file: str) -> dict[str, str]:
        """Every name that the file binds -> what it is there."""
        return {name: meaning or f"{name} of {file}.py" for name, meaning in self._names.items()}


def _defined(node: ast.stmt) -> Collection[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
