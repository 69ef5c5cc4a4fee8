"""From a compressed model back to a dense one: factors multiplied out, and the class of the dense model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfront.methods._errors import InputError
from rankfront.methods.adaptable import check_unadapted
from rankfront.methods.layers import Factored, set_module


def multiplied_out(module: Factored, dense: Any, own: str) -> Tensor:
    """The weight or the bias of ``dense`` that ``module`` stands for, in fp32; `InputError` where there is no such."""
    if hasattr(module, "undense"):
        raise InputError(str(module.undense))
    shape = getattr(dense, own).shape
    if own == "bias":
        bias = module.full_bias()
        return torch.zeros(shape) if bias is None else _padded(bias, shape)
    inputs_first = type(dense).__name__ == "Conv1D"
    found = _padded(module.matrix(), shape[::-1] if inputs_first else shape)
    return found.T if inputs_first else found


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` with zeros after it up to ``shape``."""
    padding = [zeros for size, wanted in zip(tensor.shape, shape, strict=True) for zeros in (wanted - size, 0)]
    return nn.functional.pad(tensor, padding[::-1])


@torch.no_grad()
def put_dense(model: Any, skeleton: nn.Module, paths: Collection[str], dtype: torch.dtype) -> None:
    """Multiply out the factors at ``paths`` of ``model``, into modules as ``skeleton`` has them without values.

    Those that share all their tensors share the weight. Raises `InputError` where an adapter stands at the factors, or
    tensors are not in memory.
    """
    check_unadapted(model)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise InputError("some weights are offloaded: load the model without a disk or CPU offload first")
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for path in paths:
        layer, dense = model.get_submodule(path), cast(Any, skeleton.get_submodule(path))
        device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), model.device)
        joined = getattr(layer, "joined", None)
        if joined is not None:
            joined.part_ways()
        if any(buffer.is_meta for buffer in dense.buffers()):  # the scale of a table
            model._init_weights(dense.to_empty(device=device))
        key = tuple(id(each) for name, each in layer.named_parameters() if name != "bias") or (id(layer),)
        if key not in weights:
            weights[key] = nn.Parameter(multiplied_out(layer, dense, "weight").to(device, dtype).contiguous())
        if getattr(dense, "bias", None) is not None:
            dense.bias = nn.Parameter(multiplied_out(layer, dense, "bias").to(device, dtype))
        dense.weight = weights[key]
        set_module(model, path, dense.train(layer.training))
