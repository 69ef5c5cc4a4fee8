"""The packages of `search` import one way, without cycles, and what only computes plans does not import torch."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from rankfront.search import attributes

SEARCH = Path(__file__).resolve().parent.parent / "search"
# modules beside the packages that every package may import
LEAVES = {
    "attributes", "tuning", "config", "constraint", "names", "splits", "choices", "errors", "plain", "atomic", "urls",
    "quantities", "importing",
    "servable", "without_decoding",
}  # fmt: skip
BELOW = {  # package -> the packages that it may import
    "inputs": set(),
    "factors": {"inputs"},
    "plans": set(),
    "measure": {"inputs", "factors", "plans", "serve"},
    "heal": {"inputs", "factors", "plans", "measure"},
    "storage": {"plans"},
    "optimise": {"plans", "storage"},
    "run": {"inputs", "factors", "plans", "measure", "storage", "optimise", "serve"},
    "serve": {"inputs"},
    "estimate": {"inputs", "factors", "plans", "measure", "heal", "serve"},
    "output": {"inputs", "factors", "plans", "measure", "heal", "storage", "optimise", "serve"},
}
WITHOUT_TORCH = ("plans", "storage", "optimise")


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
    """Packages import what lies below them; leaves import leaves; only the study and what is made of it stand above."""
    found = set()
    for name, others in graph().items():
        own = package(name)
        if own in ("study", "compress", "commands", "__main__"):
            continue
        allowed = LEAVES if own in LEAVES else {own} | LEAVES | BELOW[own]
        found |= {f"{name} -> {other}" for other in others if package(other) not in allowed}
    assert found == set()


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
    assert found == set()


STORED = {"user_attrs", "attributes"}  # what trials and rows have their attributes under
UNMISTAKABLE = {name for name in attributes.DECIDING if "_" in name} | {attributes.PROMOTED}


def literals_of_attributes(path):
    """Literals by which a file reads, writes or queues attributes of trials and of the study, and those that can be
    nothing but their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Subscript) and named(node.value):
            found = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            reads = node.func.attr in ("get", "pop") and named(node.func.value)
            if reads or node.func.attr in ("set_user_attr", "set_study_user_attr", "set_trial_user_attr"):
                found = node.args[-2:] if len(node.args) > 2 else node.args[:1]
            queued = [keyword.value for keyword in node.keywords if keyword.arg == "user_attrs"]
            found += [key for asked in queued if isinstance(asked, ast.Dict) for key in asked.keys]
        elif isinstance(node, ast.Compare) and any(named(each) for each in node.comparators):
            found = [node.left]
        elif isinstance(node, ast.Constant) and node.value in UNMISTAKABLE:
            found = [node]
        yield from (ast.unparse(each) for each in found if isinstance(each, ast.Constant | ast.JoinedStr))


def named(node):
    """Whether an expression is something's attributes, as they are called here."""
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)) in STORED


def test_one_module_alone_knows_the_names_of_stored_attributes():
    found = {
        f"{name}: {literal}"
        for name, path in modules().items()
        if name != "attributes"
        for literal in literals_of_attributes(path)
    }
    assert found == set()


PROPOSING = {"run.rankfront_strategy"}  # beside the packages plans and optimise
# Guards against rounding, stand-ins for infinity, units, facts: nothing to tune.
UNTUNED = {
    "TINY", "NEVER", "UNLIKELY", "LARGEST", "FAR", "ROUNDING", "FINE", "SLACK", "DEVIATION", "DENSE_KEEP", "PASSES",
    "VERSION", "HALF", "EARLIER_TOKENS",
}  # fmt: skip


def numeric(node):
    """Whether an expression holds a number."""
    return any(isinstance(each, ast.Constant) and type(each.value) in (int, float) for each in ast.walk(node))


def test_what_proposes_plans_has_its_constants_in_one_place():
    found = {
        f"{name}: {ast.unparse(target)}"
        for name, path in modules().items()
        if package(name) in ("plans", "optimise") or name in PROPOSING
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and numeric(node.value)
        for target in node.targets
        if ast.unparse(target) not in UNTUNED
    }
    assert found == set()
