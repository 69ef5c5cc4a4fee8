"""The packages of `search` import one way, without cycles, and what only computes plans does not import torch."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SEARCH = Path(__file__).resolve().parent.parent / "search"
# modules beside the packages that every package may import
LEAVES = {"config", "names", "splits", "choices", "errors", "plain", "atomic"}
BELOW = {  # package -> the packages that it may import
    "inputs": set(),
    "factors": {"inputs"},
    "plans": set(),
    "measure": {"inputs", "factors", "plans"},
    "storage": {"plans"},
    "optimise": {"plans", "storage"},
    "run": {"inputs", "factors", "plans", "measure", "storage", "optimise"},
    "output": {"inputs", "factors", "plans", "measure", "storage", "optimise"},
}
WITHOUT_TORCH = ("plans", "storage", "optimise")
UPWARD = {  # imports against that order that are still to go
    "config -> optimise.halving",
    "config -> optimise.samplers",
    "config -> plans.constraint",
    "config -> storage.urls",
    "optimise.answer -> inputs.model",
    "output.report -> study",
    "output.tables -> study",
    "plans.constraint -> storage.front",
    "plans.limits -> optimise.goal",
    "storage.checked -> optimise.samplers",
    "storage.front -> optimise.samplers",
}
IMPORT_TORCH = {"storage.folder"}  # among those that should not, still to mend


def modules():
    """Module under `search` -> its path: ``plans.menu``, ``config``."""
    found = {".".join(path.relative_to(SEARCH).with_suffix("").parts): path for path in SEARCH.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def imported(path):
    """Full names of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph():
    """Module -> the modules of `search` that it imports."""
    known = modules()
    prefix = "rankfront.search."
    return {
        name: {full.removeprefix(prefix) for full in imported(path)} & known.keys() - {name}
        for name, path in known.items()
    }


def package(module):
    return module.split(".")[0]


def test_imports_point_one_way():
    """Packages import what lies below them; leaves import leaves; only the study and the command stand above."""
    found = set()
    for name, others in graph().items():
        if name in ("study", "__main__"):
            continue
        own = package(name)
        allowed = LEAVES if own in LEAVES else {own} | LEAVES | BELOW[own]
        found |= {f"{name} -> {other}" for other in others if package(other) not in allowed}
    assert found == UPWARD


def test_no_module_imports_itself_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("layer", WITHOUT_TORCH)
def test_what_computes_plans_does_not_import_torch(layer):
    heavy = {"torch", "transformers", "ray"}
    found = {
        name
        for name, path in modules().items()
        if package(name) == layer and heavy & {package(each) for each in imported(path)}
    }
    assert found == {each for each in IMPORT_TORCH if package(each) == layer}
