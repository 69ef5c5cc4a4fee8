"""Weights in the order in which oneDNN's products read them fastest, on a CPU: prepacked, as oneDNN calls it.

A plain matrix is laid out for no product in particular: with few inputs at a time it is read well below the bandwidth
of the memory, and with many it is brought into blocks anew at every call. Prepacked it is stored in blocks once. Values
stay what they are, and so do results, up to the order of additions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods._unpacked import Unpacked

READ_ONLY = "a prepacked weight cannot be written to"
TURNS, CALLS = 5, 4  # of timing a matrix in both layouts: guesses
WRITERS = (cast(Any, Tensor.data).__set__, cast(Any, Tensor.requires_grad).__set__, Tensor.requires_grad_)


class Prepacked(Tensor):
    """A parameter W (m, n) that exists in oneDNN's layout alone.

    ``linear(x, W)`` reads it as it is, unless gradients are wanted. All else sees a plain copy, made for the occasion;
    what would write to it raises `RuntimeError`.
    """

    blocks: Tensor
    number: torch.dtype  # the same as dtype, which takes longer to ask for
    plain_parameter: nn.Parameter | None

    @staticmethod
    def __new__(cls, weight: Tensor) -> Prepacked:
        made: Prepacked = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )
        return made

    def __init__(self, weight: Tensor) -> None:
        self._is_param = True  # which makes it an nn.Parameter
        self.number = weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.plain_parameter = weight if isinstance(weight, nn.Parameter) else None

    def plain(self) -> Tensor:
        """W (m, n), laid out row by row."""
        with torch.inference_mode(False), torch.no_grad():
            return self.blocks.to_dense()

    def data_ptr(self) -> int:
        """What tells one from another: the layout has no address to read from."""
        return id(self.blocks)

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacked:
        if id(self) not in memo:
            memo[id(self)] = Prepacked(nn.Parameter(self.plain(), requires_grad=False))
        copied: Prepacked = memo[id(self)]
        _empty(cast(nn.Parameter, copied.plain_parameter))
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = _arguments(*args, **(kwargs or {}))
            if _readable(x, weight, bias):
                return torch.ops.mkldnn._linear_pointwise(x, cast(Prepacked, weight).blocks, bias, "none", [], "")
        if func in WRITERS and not any(
            value is False or value is args[0] for value in (*args, *(kwargs or {}).values())[1:]
        ):
            raise RuntimeError(f"{READ_ONLY}, moved, converted or trained: undo_prepack(model) first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(f"{READ_ONLY}, and {func} would: undo_prepack(model) first")
        plain = torch.utils._pytree.tree_map_only(Prepacked, Prepacked.plain, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def prepack(*models: nn.Module) -> int:
    """Prepack the weights of ``models`` that do nothing but multiply inputs; how many bytes they are.

    Those of ``nn.Linear`` and of our layers, and matrices that layers keep multiplied out, on CPUs where oneDNN has
    products in their dtype, and of sizes at which one token takes less time so. That is measured once for each size in
    this process (`faster`), for on some processors small matrices are read faster as they are. What an embedding table
    shares, and GPT-2's ``Conv1D``, stay as they are; right factors that were `joined` run apart. No memory is held
    beside the new layout. Gradients reach inputs and biases, not what is prepacked: `undo_prepack` before training.
    Models that share weights go together.
    """
    modules = [module for model in models for module in model.modules()]
    ways: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name in module._parameters:
            ways.setdefault(id(getattr(module, name)), []).append((module, name))
    packed = 0
    for own in ways.values():
        if all(name in products(module) for module, name in own) and _packable(getattr(*own[0])):
            module, name = own[0]
            joined = getattr(module, "joined", None)
            if joined is not None:
                joined.part_ways()
            weight = getattr(module, name)
            blocks = Prepacked(weight)
            _empty(weight)
            packed += blocks.nbytes
            for module, name in own:
                module._parameters[name] = cast(nn.Parameter, blocks)
    for module in modules:
        if isinstance(module, Unpacked):
            module.keep_as(_kept)
    return packed


def undo_prepack(*models: nn.Module) -> None:
    """The very same parameters again, with the very same values."""
    for module in (module for model in models for module in model.modules()):
        for name, weight in module._parameters.items():
            if isinstance(weight, Prepacked) and weight.plain_parameter is not None:
                if not weight.plain_parameter.numel():
                    weight.plain_parameter.data = weight.plain()
                module._parameters[name] = weight.plain_parameter
        if isinstance(module, Unpacked):
            module.keep_as(None)


@contextmanager
def prepacked(*models: nn.Module) -> Iterator[None]:
    """Within, ``models`` are prepacked."""
    try:
        prepack(*models)
        yield
    finally:
        undo_prepack(*models)


def products(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of ``module`` that multiply inputs, by ``linear``, and do nothing else."""
    return ("weight",) if type(module) is nn.Linear else getattr(module, "products", ())


def _kept(matrix: Tensor) -> Tensor:
    return Prepacked(matrix) if _packable(matrix) else matrix


def faster(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether one token through W (rows, columns) takes less time prepacked, with the threads that torch has now."""
    return _measured(rows, columns, dtype, torch.get_num_threads())


@cache
def _measured(rows: int, columns: int, dtype: torch.dtype, threads: int) -> bool:
    with torch.inference_mode():
        plain, x = torch.full((rows, columns), 0.01, dtype=dtype), torch.ones(1, columns, dtype=dtype)
        packed = Prepacked(plain)
        least = [math.inf, math.inf]
        for turn in range(TURNS + 1):  # the first warms up
            for place, weight in enumerate((plain, packed)):
                start = time.perf_counter()
                for _ in range(CALLS):
                    nn.functional.linear(x, weight)
                if turn:
                    least[place] = min(least[place], time.perf_counter() - start)
    return least[1] < least[0]


def _packable(weight: Tensor | None) -> bool:
    if weight is None or not _known(weight):
        return False
    rows, columns = weight.shape
    return faster(rows, columns, weight.dtype)


def _known(weight: Tensor) -> bool:
    """Whether oneDNN has products with ``weight``."""
    if isinstance(weight, Prepacked) or weight.device.type != "cpu":
        return False
    if weight.ndim != 2 or not weight.numel() or not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    return (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and known._is_mkldnn_bf16_supported())
        or (weight.dtype == torch.float16 and known._is_mkldnn_fp16_supported())
    )


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _readable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is one for oneDNN's blocks, with no gradient asked for."""
    if type(weight) is not Prepacked or type(x) is Prepacked or x.dtype is not weight.number or not x.is_cpu:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)
