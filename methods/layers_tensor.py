"""Tensor formats: networks of small tensors that the input is contracted with, one after the other.

A class here only says which indices its tensors have. Rows of W are the indices m1, m2, …, columns n1, n2, …, and every
other index is summed: a rank between two tensors, or a number of terms that all tensors share. Where the modes multiply
to more than W's size, inputs are padded with zeros and outputs cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfront.methods._training import balance_cores
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter, weight_of

LARGEST = 2**24  # values of an intermediate result; more tokens than fit go in several runs
TOKENS = "tokens"
Indices = tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """An order of contraction.

    Attributes:
        equations: (name of the tensor, einsum of what is there with it), in order.
        multiplications: of them all, a token.
        largest: values of the largest intermediate result, a token.
    """

    equations: tuple[tuple[str, str], ...]
    multiplications: int
    largest: int


@cache
def best_order(
    start: Indices, tensors: tuple[tuple[str, Indices], ...], output: Indices, sizes: tuple[tuple[str, int], ...]
) -> Steps:
    """Of all orders of taking ``tensors`` one at a time, beginning from ``start``, one of fewest multiplications."""
    found = (_steps(start, order, output, dict(sizes)) for order in itertools.permutations(tensors))
    return min(found, key=lambda steps: (steps.multiplications, steps.largest))


def _steps(start: Indices, order: tuple[tuple[str, Indices], ...], output: Indices, sizes: dict[str, int]) -> Steps:
    letters = {index: chr(ord("a") + place) for place, index in enumerate([TOKENS, *sizes])}
    state, equations, multiplications, largest = start, [], 0, 1
    for place, (name, indices) in enumerate(order):
        met = tuple(dict.fromkeys((*state, *indices)))
        wanted = set(output).union(*(later for _, later in order[place + 1 :]))
        after = output if place + 1 == len(order) else tuple(index for index in met if index in wanted)
        equation = ["".join(letters[index] for index in indices) for indices in (state, indices, after)]
        equations.append((name, f"{equation[0]},{equation[1]}->{equation[2]}"))
        multiplications += math.prod(sizes.get(index, 1) for index in met)
        largest = max(largest, math.prod(sizes.get(index, 1) for index in after))
        state = after
    return Steps(tuple(equations), multiplications, largest)


MERGED = "merged"


@dataclass(frozen=True)
class Plan:
    """Some tensors contracted with each other, once for all tokens, and the rest with the input and that.

    Attributes:
        merge: the steps of the former; none where x meets every tensor itself.
        steps: the steps of the latter, which know the former's result as `MERGED`.
    """

    merge: Steps
    steps: Steps

    def multiplications(self, tokens: int) -> int:
        return self.merge.multiplications + tokens * self.steps.multiplications


@cache
def plans(
    start: Indices, tensors: tuple[tuple[str, Indices], ...], output: Indices, sizes: tuple[tuple[str, int], ...]
) -> tuple[Plan, ...]:
    """One for each set of tensors that may be merged: none, several, or all, which is W itself."""
    found = [Plan(Steps((), 0, 1), best_order(start, tensors, output, sizes))]
    for count in range(2, len(tensors) + 1):
        for chosen in itertools.combinations(tensors, count):
            rest = tuple(tensor for tensor in tensors if tensor not in chosen)
            outside = {*start, *output}.union(*(indices for _, indices in rest))
            seen = dict.fromkeys(index for _, indices in chosen for index in indices)
            kept = tuple(index for index in seen if index in outside)
            steps = best_order(start, (*rest, (MERGED, kept)), output, sizes)
            found.append(Plan(best_order((), chosen, kept, sizes), steps))
    return tuple(found)


class Network(nn.Module):
    """y = W x + bias, W the contraction of the class's tensors, x (..., n) to y (..., m).

    x meets one tensor at a time, in the order of fewest multiplications. Where tokens are many it may pay to contract
    some tensors with each other before, or all of them: then W exists while the product runs.

    Attributes:
        indices: tensor -> the names of its indices.
    """

    indices: ClassVar[dict[str, Indices]]

    def __init__(self, tensors: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__()
        for name in self.indices:
            setattr(self, name, parameter(tensors[name]))
        self.bias = optional_parameter(bias)
        self.out_features, self.in_features = rows, columns
        self.sizes = self.settings(tensors)
        self.row_modes, self.column_modes = (tuple(sorted(i for i in self.sizes if i[0] == side)) for side in "mn")
        named = tuple(self.indices.items())
        sizes = tuple(self.sizes.items())
        self.plans = plans((TOKENS, *self.column_modes), named, (TOKENS, *self.row_modes), sizes)
        self.whole = best_order((), named, (*self.row_modes, *self.column_modes), sizes)

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(self.indices)

    def balance(self) -> None:
        balance_cores([getattr(self, name) for name in self.indices])

    @classmethod
    def settings(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Index -> its size."""
        found: dict[str, int] = {}
        for name, indices in cls.indices.items():
            found |= zip(indices, tensors[name].shape, strict=True)
        return dict(sorted(found.items()))

    def forward(self, x: Tensor) -> Tensor:
        modes = [self.sizes[index] for index in self.column_modes]
        tokens = nn.functional.pad(x.reshape(-1, self.in_features), (0, math.prod(modes) - self.in_features))
        plan = self.plan(len(tokens))
        tensors = {name: getattr(self, name) for name in self.indices}
        if plan.merge.equations:
            tensors[MERGED] = contracted(tokens.new_ones(()), tensors, plan.merge)
        runs = tokens.unflatten(-1, modes).split(max(1, LARGEST // plan.steps.largest))
        y = torch.cat([contracted(run, tensors, plan.steps) for run in runs]).flatten(1)[:, : self.out_features]
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def plan(self, tokens: int) -> Plan:
        """The one of fewest multiplications for that many tokens."""
        best = self.plans[0]
        for plan in self.plans[1:]:  # spelt out, for torch.compile does not know min with a key
            if plan.multiplications(tokens) < best.multiplications(tokens):
                best = plan
        return best

    @classmethod
    def formula(cls, settings: Settings) -> str:
        named = list(dict.fromkeys(index for indices in cls.indices.values() for index in indices))
        letters = {index: chr(ord("a") + place) for place, index in enumerate(named)}
        rows, columns = ([index for index in sorted(named) if index[0] == side] for side in "mn")
        inputs = ",".join("".join(letters[index] for index in indices) for indices in cls.indices.values())
        output = "".join(letters[index] for index in (*rows, *columns))
        whole = f'torch.einsum("{inputs}->{output}", {", ".join(cls.indices)})'
        return f"{whole}.reshape({' * '.join(rows)}, {' * '.join(columns)})[:m, :n]"

    @classmethod
    def build(
        cls, dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings
    ) -> nn.Module:
        rows, columns = weight_of(dense).shape
        return cls(tensors, rows, columns, bias)

    def matrix(self) -> Tensor:
        one = next(self.parameters()).new_ones((), dtype=torch.float32)
        tensors = {name: getattr(self, name).float() for name in self.indices}
        whole = contracted(one, tensors, self.whole)  # (m1, m2, ..., n1, n2, ...)
        matrix = whole.flatten(0, len(self.row_modes) - 1).flatten(1)
        return matrix[: self.out_features, : self.in_features]

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        """Token by token, as in decoding; with more of them a plan may be cheaper."""
        return self.plan(1).multiplications(1)

    @classmethod
    def shapes(cls, rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return {name: (tuple(settings[i] for i in indices), None) for name, indices in cls.indices.items()}

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{index}={size}" for index, size in self.sizes.items())
        return f"{self.in_features}, {self.out_features}, {sizes}, bias={self.bias is not None}"


def contracted(state: Tensor, tensors: Mapping[str, Tensor], steps: Steps) -> Tensor:
    """``state`` with one of ``tensors`` after the other."""
    for name, equation in steps.equations:
        state = torch.einsum(equation, state, tensors[name])
    return state


@layer("kronecker")
class KroneckerLinear(Network):
    """W = Σ_r left_r ⊗ right_r."""

    indices: ClassVar = {"left": ("rank", "m1", "n1"), "right": ("rank", "m2", "n2")}


@layer("cp")
class CPLinear(Network):
    """W = Σ_r first_r ⊗ second_r ⊗ third_r."""

    indices: ClassVar = {
        "first": ("rank", "m1", "n1"),
        "second": ("rank", "m2", "n2"),
        "third": ("rank", "m3", "n3"),
    }


@layer("tensor-train")
class TensorTrainLinear(Network):
    """W[(i1 i2), j] = Σ first[i1, a] second[a, i2, b] third[b, j]."""

    indices: ClassVar = {"first": ("m1", "r1"), "second": ("r1", "m2", "r2"), "third": ("r2", "n1")}


@layer("tensor-ring")
class TensorRingLinear(Network):
    """W[(i1 i2 i3), (j1 j2 j3)] = tr(first[:, i1, j1, :] second[:, i2, j2, :] third[:, i3, j3, :])."""

    indices: ClassVar = {
        "first": ("r0", "m1", "n1", "r1"),
        "second": ("r1", "m2", "n2", "r2"),
        "third": ("r2", "m3", "n3", "r0"),
    }


@layer("tucker")
class TuckerLinear(Network):
    """W[(i1 i2), j] = Σ core[a, b, c] first[i1, a] second[i2, b] third[c, j]."""

    indices: ClassVar = {
        "core": ("r1", "r2", "r3"),
        "first": ("m1", "r1"),
        "second": ("m2", "r2"),
        "third": ("r3", "n1"),
    }


@layer("block-term")
class BlockTermLinear(Network):
    """W = Σ_b Σ core_b[p, q, s] first_b[p] ⊗ second_b[q] ⊗ third_b[s]."""

    indices: ClassVar = {
        "core": ("blocks", "r1", "r2", "r3"),
        "first": ("blocks", "r1", "m1", "n1"),
        "second": ("blocks", "r2", "m2", "n2"),
        "third": ("blocks", "r3", "m3", "n3"),
    }
