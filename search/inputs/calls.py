"""Which linears a class uses otherwise than by calling them, read from its source: no forward pass is needed.

Factors stand in for what is called and takes a gradient. That could not be tried on a skeleton: mixtures of experts
look at values, which it has none of.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

TENSORS = ("weight", "bias")
UNMET = ("self.training", "input_ids is None")  # in conditions of what is never run here


@cache
def unlike_calls(kind: Any) -> frozenset[str]:
    """Names of the children whose weight or bias the code of a class reads itself, as Mamba's mixers do of ``dt_proj``;
    of all children where its forward takes no gradients, as that of an indexer does.

    What is read in training alone, by fused kernels, counts as called, and so does what one branch reads and the other
    calls, as in BLOOM; nor does it matter what is done without token ids.
    """
    body = _source(kind)
    if any(_ungraded(node) for node in ast.walk(body)):
        return frozenset(name for node in ast.walk(body) for name in _own(node))
    return frozenset(name for name in _read(body))


@cache
def read_below(kind: Any) -> frozenset[str]:
    """Names of the modules further down whose weight the code of a class reads, as Gemma 4's does of its table."""
    return frozenset(
        node.value.attr
        for node in ast.walk(_source(kind))
        if isinstance(node, ast.Attribute) and node.attr in TENSORS
        if isinstance(node.value, ast.Attribute) and isinstance(node.value.value, ast.Attribute)
    )


@cache
def looked_into(kind: Any) -> frozenset[str] | None:
    """Names of the children of which the code of a class reads anything, rather than only calling them; None where its
    source is not to be had."""
    body = _source(kind)
    if not body.body:
        return None
    return frozenset(name for node in ast.walk(body) if isinstance(node, ast.Attribute) for name in _own(node.value))


def _source(kind: Any) -> ast.Module:
    """The syntax tree of a class; an empty one where its source is not to be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return ast.Module([], [])


def _ungraded(node: ast.AST) -> bool:
    """Whether it is a forward under ``no_grad``."""
    return (
        isinstance(node, ast.FunctionDef)
        and node.name == "forward"
        and any("no_grad" in ast.unparse(each) for each in node.decorator_list)
    )


def _read(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If):
        yield from _read_in_branches(node)
        return
    if isinstance(node, ast.Attribute) and node.attr in TENSORS:
        yield from _own(node.value)
    for child in ast.iter_child_nodes(node):
        yield from _read(child)


def _read_in_branches(node: ast.If) -> Iterator[str]:
    """What a branch reads and the other calls is one way of many to run it, and not that of today's checkpoints."""
    body, other = ast.Module(node.body, []), ast.Module(node.orelse, [])
    if not any(unmet in ast.unparse(node.test) for unmet in UNMET):
        yield from set(_read(body)) - set(_called(other))
    yield from set(_read(other)) - set(_called(body))
    yield from _read(node.test)


def _called(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Call):
            yield from _own(each.func)


def _own(node: ast.AST) -> Iterator[str]:
    """NAME of ``self.NAME``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        yield node.attr
