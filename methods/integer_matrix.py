"""A matrix in 8 or 4 bits as a module of its own: multiplied by torch's packed kernels where those are fast, looked up
where it is a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfront.methods._packed_integers import Integers, aligned, halves, restored
from rankfront.methods._sizes import INTEGER_BITS, group_size, padded_width

TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # dtype unless the model's
ROWS = 16  # that torch's kernel for four bits takes at a time
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # which torch 2.6 does not have
# By bits: up to which torch's packed kernels beat a product with the matrix restored, in bf16 on an AMD EPYC. In other
# dtypes they are plain loops: in fp32 three to six times as slow there with one token through 1536 x 576, and over a
# hundred times with sixteen.
FEW_TOKENS = {8: 24, 4: 96}


class IntegerMatrix(nn.Module):
    """W (m, n) as `Integers`: ``integers`` a buffer, ``scales`` a parameter; x (..., n) to x Wᵀ + bias (..., m).

    A few tokens at a time, as in decoding, in bf16 on a CPU: torch's packed kernels, that for four bits on a copy in
    its own order, made at the first use and not saved, as large as the integers again. Otherwise, and where gradients
    are wanted, a product with W restored.
    """

    integers: Tensor
    packed: Tensor | None

    def __init__(self, integers: Tensor, scales: Tensor, bits: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("packed", None, persistent=False)
        self.scales = scales if isinstance(scales, nn.Parameter) else nn.Parameter(scales, requires_grad=False)
        self.bits, self.columns, self.width = bits, columns, padded_width(columns, bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.integers), self.columns

    def numel(self) -> int:
        """mn."""
        return len(self.integers) * self.columns

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m, n)."""
        return restored(Integers(self.integers, self.scales), self.bits, self.columns, dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias."""
        if not self._packable(x):
            if self.bits == 8 and self.width == self.columns and x.dtype != torch.float16:  # which would overflow
                y = nn.functional.linear(x, self.integers.to(x.dtype)) * self.scales  # less to scale than the matrix
                return y if bias is None else y + bias
            return nn.functional.linear(x, self.matrix(x.dtype), bias)
        tokens = nn.functional.pad(x.reshape(-1, self.columns), (0, self.width - self.columns)).contiguous()
        if self.bits == 8:
            if not torch.compiler.is_compiling():  # graphs hold tensors of torch's own
                self.integers = aligned(self.integers)
                tokens = aligned(tokens)
            y = torch.ops.aten._weight_int8pack_mm(tokens, self.integers, self.scales)
        else:
            if self.packed is None:
                self.packed = self._pack()
            scales = nn.functional.pad(self.scales, (0, 0, 0, -len(self.integers) % ROWS)).contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, self.packed, group_size(self.columns), scales)
        whole: Tensor = y[:, : len(self.integers)].reshape(*x.shape[:-1], len(self.integers))
        return whole if bias is None else whole + bias

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.packed = None  # of integers that are others now

    def loaded(self) -> None:
        """Called once the values are: scales stay fixed like what they scale, integers go where kernels may read them.

        A step that is small for a weight is larger than a scale.
        """
        self.scales.requires_grad_(False)
        self.integers = aligned(self.integers)

    def _packable(self, x: Tensor) -> bool:
        if exporting():  # to engines without such kernels, and for any number of tokens
            return False
        few = 0 < x.numel() <= FEW_TOKENS[self.bits] * self.columns
        grads = torch.is_grad_enabled() and (x.requires_grad or self.scales.requires_grad)
        return few and not grads and x.device.type == "cpu" and x.dtype == self.scales.dtype == torch.bfloat16

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pack(self) -> Tensor:
        q = halves(self.integers).int()  # (m, n')
        q = nn.functional.pad(q, (0, 0, 0, -len(q) % ROWS))
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        return packed

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], bits: int, columns: int) -> Any:
        """The one of this class whose tensors are called ``name.integers`` and ``name.scales``."""
        return cls(tensors[f"{name}.integers"], tensors[f"{name}.scales"], bits, columns)

    @staticmethod
    def shapes(name: str, rows: int, columns: int, bits: int) -> TensorShapes:
        if bits not in INTEGER_BITS:
            raise ValueError(f"{bits=} are none of {INTEGER_BITS}")
        width = padded_width(columns, bits)
        if bits == 8:
            return {f"{name}.integers": ((rows, width), torch.int8), f"{name}.scales": ((rows,), None)}
        scales = (width // group_size(columns), rows, 2)
        return {f"{name}.integers": ((rows, width // 2), torch.uint8), f"{name}.scales": (scales, None)}

    def extra_repr(self) -> str:
        return f"{self.columns}, {len(self.integers)}, bits={self.bits}"


class IntegerTable(IntegerMatrix):
    """E (vocabulary, width) as `Integers`: ids x (...) to its rows (..., width)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        chosen = x.flatten()
        scales = self.scales[chosen] if self.bits == 8 else self.scales[:, chosen]
        found: Tensor = restored(Integers(self.integers[chosen], scales), self.bits, self.columns, self.scales.dtype)
        return found.view(*x.shape, self.columns)


class FactorModule(nn.Module):
    """A module with ``matrices``, which may be held in integers: their names, and how many columns each has, by an
    expression as in `Factored.formula`.

    `whole` gives their values; `adaptable.multiply` and `look_up` run them as they are stored.
    """

    matrices: ClassVar[Mapping[str, str]] = {}

    def hold(self, name: str, integers: IntegerMatrix) -> None:
        """Put ``integers`` in the place of the parameter ``name``."""
        del self._parameters[name]
        self.add_module(name, integers)

    @property
    def in_full(self) -> bool:
        """Whether none of its matrices is held in integers."""
        return not any(name in self._modules for name in self.matrices)

    def make_full(self) -> None:
        """Hold what the integers stand for instead, in the dtype of their scales."""
        for name in self.matrices:
            held = self.held(name)
            if held is not None:
                del self._modules[name]
                self.register_parameter(name, nn.Parameter(held.matrix(held.scales.dtype), requires_grad=False))

    def held(self, name: str) -> IntegerMatrix | None:
        """The integers that the parameter ``name`` is held in; None where it is a parameter."""
        return cast("IntegerMatrix | None", self._modules.get(name))

    def whole(self, name: str) -> Tensor:
        """Values of the parameter ``name``, in fp32."""
        held = self.held(name)
        return cast(Tensor, getattr(self, name)).float() if held is None else held.matrix()

    def stored(self, *names: str) -> tuple[Tensor, ...]:
        """The tensors that the parameters ``names`` are held in."""
        found: list[Tensor] = []
        for name in names:
            held = self.held(name)
            found += [getattr(self, name)] if held is None else [held.integers, held.scales]
        return tuple(found)

    def look_up(self, name: str, ids: Tensor) -> Tensor:
        """Rows of the parameter ``name`` (vocabulary, n): ids (...) to (..., n)."""
        held = self.held(name)
        rows: Tensor = nn.functional.embedding(ids, getattr(self, name)) if held is None else held(ids)
        return rows
