"""What a model card says of the tensors of a factored export: their names, shapes, and how they give W."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankfront.methods import formulas
from rankfront.methods.layers import formula
from rankfront.methods.loading import Replacements

TITLE = "## Tensors"


def tensor_section(folder: Path, wanted: Replacements, sizes: Mapping[str, Sequence[int]]) -> str:
    """The section of the card in ``folder``; ``sizes`` are the dense weights' (m, n) by path.

    Formulas are the layers' own. They and the functions beside them need torch and NumPy alone.
    """
    shapes = _shapes(folder)
    rows: list[str] = []
    written: dict[str, list[str]] = {}  # formula -> paths
    for path, spec in wanted.modules.items():
        settings = {name: value for name, value in spec.items() if name != "kind"}
        written.setdefault(formula(spec["kind"], settings), []).append(path)
        own = {name.removeprefix(f"{path}."): shape for name, shape in shapes.items() if name.startswith(f"{path}.")}
        tensors = ", ".join(f"{name} {shape}" for name, shape in own.items())
        values = ", ".join(f"{name}={value}" for name, value in settings.items())
        m, n = sizes[path]
        rows.append(f"| `{path}` | {spec['kind']} | {m} x {n} | {tensors} | {values} |")
    numbers = {path: place for place, paths in enumerate(written.values(), 1) for path in paths}
    lines = [f"| {place} | `{text}` |" for place, text in enumerate(written, 1)]
    rows = [row[:-1] + f"| {numbers[path]} |" for row, path in zip(rows, wanted.modules, strict=True)]
    ties = "".join(f"| `{name}` | `{source}` |\n" for name, source in wanted.tied.items() if name not in shapes)
    return f"""{TITLE}

Instead of `weight`, a treated module stores the tensors below under its path. By its formula, in torch, they give
W (m, n) in fp32, y = W x; an embedding table's rows are tokens. Settings are numbers by name. A `bias` is stored
as it is, with as many entries as the module has outputs left.

| formula | W |
| --- | --- |
{chr(10).join(lines)}

{_functions(written)}| module | kind | W | tensors | settings | formula |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
{_tied(ties)}"""


def without_section(card: str) -> str:
    """``card`` without the section that `tensor_section` wrote, which is about the tensors of another folder."""
    before, _, after = card.partition(f"{TITLE}\n")
    return before + after[after.index("\n## ") + 1 :] if "\n## " in after else before


def before_section(card: str, text: str) -> str:
    """``card`` with ``text`` before that section, or at its end."""
    before, title, after = card.partition(f"{TITLE}\n")
    return f"{before.rstrip()}\n\n{text.rstrip()}\n\n{title}{after}".rstrip() + "\n"


def _shapes(folder: Path) -> dict[str, str]:
    """Name of every tensor in the folder -> its shape."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: " x ".join(map(str, tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    return found


def _functions(written: Mapping[str, Any]) -> str:
    """The source of what the formulas call, and of what that calls, as a block of Python; nothing for none."""
    known = {name: inspect.getsource(value) for name, value in vars(formulas).items() if inspect.isfunction(value)}
    wanted: set[str] = set()
    waiting = list(written)
    while waiting:
        called = set(re.findall(r"\b(\w+)\(", waiting.pop())) & known.keys()
        waiting += [known[name] for name in called - wanted]
        wanted |= called
    if not wanted:
        return ""
    imports = "import numpy as np\n" * ("drawn" in wanted) + "import torch\n"
    source = "\n\n".join(source for name, source in known.items() if name in wanted)
    return f"```python\n{imports}\n\n{source}```\n\n"


def _tied(ties: str) -> str:
    return f"\n| tensor | is stored as |\n| --- | --- |\n{ties}" if ties else ""
