"""Matrices in 8 or 4 bits: one, the two of a low rank, or all three; by torch's packed kernels where those are fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods._packed_integers import Integers, aligned, halves, restored
from rankfront.methods._sizes import group_size, padded_width
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter, row_scale, weight_of

ROWS = 16  # that torch's kernel for four bits takes at a time
CORRECTION_BITS = 8  # of a low rank beside a matrix in fewer
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # which torch 2.6 does not have
FEW_TOKENS = 16  # up to which the packed kernels of a CPU beat a product with the matrix restored


class IntegerMatrix(nn.Module):
    """W (m, n) as `Integers`: ``integers`` a buffer, ``scales`` a parameter; x (..., n) to x Wᵀ + bias (..., m).

    A few tokens at a time, as in decoding, on a CPU: torch's packed kernels, that for four bits on a copy in its own
    order, made at the first use and not saved, as large as the integers again. Otherwise, and where gradients are
    wanted, a product with W restored.
    """

    integers: Tensor
    packed: Tensor | None

    def __init__(self, integers: Tensor, scales: Tensor, bits: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("packed", None, persistent=False)
        self.scales = parameter(scales)
        self.bits, self.columns, self.width = bits, columns, padded_width(columns, bits)

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
        few = 0 < x.numel() <= FEW_TOKENS * self.columns
        grads = torch.is_grad_enabled() and (x.requires_grad or self.scales.requires_grad)
        return few and not grads and x.device.type == "cpu" and x.dtype == self.scales.dtype

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
    def shapes(name: str, rows: int, columns: int, bits: int) -> Shapes:
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


@layer("integer")
class IntegerLinear(nn.Module):
    """y = W x + bias, W (m, n) an `IntegerMatrix`."""

    def __init__(self, stored: IntegerMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stored(x, self.bias)
        return y

    @staticmethod
    def formula(settings: Settings) -> str:
        return "whole(stored, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        columns = weight_of(dense).shape[1]
        if isinstance(dense, nn.Embedding):
            table = IntegerTable.of("stored", tensors, settings["bits"], columns)
            return IntegerEmbedding(table, settings.get("scale", row_scale(dense)))
        return IntegerLinear(IntegerMatrix.of("stored", tensors, settings["bits"], columns), bias)

    def matrix(self) -> Tensor:
        return self.stored.matrix()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return len(self.stored.integers) * self.stored.columns

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        return IntegerMatrix.shapes("stored", rows, columns, settings["bits"])


class IntegerEmbedding(nn.Module):
    """Rows of E (vocabulary, width), an `IntegerTable`: ids (...) to (..., width), times ``scale`` if there is one."""

    def __init__(self, stored: IntegerTable, scale: float | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.num_embeddings, self.embedding_dim = len(stored.integers), stored.columns
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.stored(ids)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def matrix(self) -> Tensor:
        return self.stored.matrix()

    def full_bias(self) -> Tensor | None:
        return None

    def multiplications(self) -> int:
        return 0


@layer("integer-low-rank")
class IntegerLowRankLinear(nn.Module):
    """y = left (right x) + bias: left (m, r) and right (r, n), each an `IntegerMatrix`."""

    def __init__(self, left: IntegerMatrix, right: IntegerMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x), self.bias)
        return y

    @staticmethod
    def formula(settings: Settings) -> str:
        return "whole(left, rank) @ whole(right, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        left = IntegerMatrix.of("left", tensors, settings["bits"], settings["rank"])
        right = IntegerMatrix.of("right", tensors, settings["bits"], weight_of(dense).shape[1])
        return IntegerLowRankLinear(left, right, bias)

    def matrix(self) -> Tensor:
        return self.left.matrix() @ self.right.matrix()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.left.columns * (len(self.left.integers) + self.right.columns)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        bits, rank = settings["bits"], settings["rank"]
        return IntegerMatrix.shapes("left", rows, rank, bits) | IntegerMatrix.shapes("right", rank, columns, bits)


@layer("integer-corrected")
class CorrectedLinear(nn.Module):
    """y = W x + left (right x) + bias: W (m, n) in few bits, left (m, r) and right (r, n) in `CORRECTION_BITS`."""

    def __init__(
        self, stored: IntegerMatrix, left: IntegerMatrix, right: IntegerMatrix, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.stored, self.left, self.right = stored, left, right
        self.bias = optional_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stored(x, self.bias) + self.left(self.right(x))
        return y

    @staticmethod
    def formula(settings: Settings) -> str:
        return "whole(stored, n) + whole(left, rank) @ whole(right, n)"

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        columns = weight_of(dense).shape[1]
        stored = IntegerMatrix.of("stored", tensors, settings["bits"], columns)
        left = IntegerMatrix.of("left", tensors, CORRECTION_BITS, settings["rank"])
        return CorrectedLinear(stored, left, IntegerMatrix.of("right", tensors, CORRECTION_BITS, columns), bias)

    def matrix(self) -> Tensor:
        return self.stored.matrix() + self.left.matrix() @ self.right.matrix()

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        rows, columns = len(self.stored.integers), self.stored.columns
        return rows * columns + self.left.columns * (rows + columns)

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        rank = settings["rank"]
        found = IntegerMatrix.shapes("stored", rows, columns, settings["bits"])
        found |= IntegerMatrix.shapes("left", rows, rank, CORRECTION_BITS)
        return found | IntegerMatrix.shapes("right", rank, columns, CORRECTION_BITS)
