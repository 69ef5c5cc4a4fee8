"""Block dictionaries: each block of inputs goes through its small basis, then each output sums a few atoms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._scatter import columns_of, dense_of, packed_columns, support_bytes
from rankfront.methods._unpacked import Unpacked
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter


@layer("block-dictionary")
class BlockDictionaryLinear(Unpacked):
    """y = Σ_b Z_b (D_b x_b) + bias: ``basis`` [D_1, ..., D_B] (k, n), ``values`` (m, B s) of [Z_1, ..., Z_B].

    Each Z_b (m, k) has N nonzeros in a row's every M atoms, s = N k / M, at places that ``support`` holds packed. Z
    made dense (m, B k) would be about as large as the weight, so the product (m, n) is made at the first use and kept
    beside what is stored: as fast as the weight itself, and more memory than it.
    """

    support: Tensor
    factors = ("basis", "values")

    def __init__(self, basis: Tensor, values: Tensor, support: Tensor, bias: Tensor | None, settings: Settings) -> None:
        super().__init__()
        self.basis = parameter(basis)
        self.values = parameter(values)
        self.bias = optional_parameter(bias)
        self.register_buffer("support", support)
        self.block, self.group, self.nonzeros = settings["block"], settings["group"], settings["nonzeros"]
        self.out_features, (self.atoms, self.in_features) = len(values), basis.shape
        self.blocks = -(-self.in_features // self.block)

    def columns(self) -> Tensor:
        """Columns (m, B s) among the B k atoms; the support has no values before a model is loaded."""
        support = self.support
        return self.places(lambda: self._columns(support), support)

    def _columns(self, support: Tensor) -> Tensor:
        groups = self.blocks * self.atoms // self.group
        inside = columns_of(support, self.out_features * groups, self.group, self.nonzeros)
        starts = self.group * torch.arange(groups, device=inside.device)[:, None]  # (groups, 1)
        columns: Tensor = (inside.view(self.out_features, groups, self.nonzeros) + starts).flatten(1)
        return columns

    def _codes(self, values: Tensor) -> Tensor:
        """[Z_1, ..., Z_B], (m, B k)."""
        return dense_of(values, self.columns(), self.blocks * self.atoms)

    def codes(self) -> Tensor:
        """[Z_1, ..., Z_B], (m, B k), dense."""
        return self._codes(self.values)

    def coded(self, codes: Tensor, x: Tensor) -> Tensor:
        """What the module makes of x (..., n) with ``codes`` (m, B k) in the place of Z."""
        return nn.functional.linear(x, self._product(codes, self.basis), self.bias)

    def largest(self, codes: Tensor) -> Tensor:
        """The places of the entries of ``codes`` of largest size, N in a row's every M atoms: bool (m, B k)."""
        grouped = codes.abs().unflatten(1, (-1, self.group))
        chosen = grouped.topk(self.nonzeros, dim=-1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, chosen, True).flatten(1)

    @torch.no_grad()
    def keep_codes(self, codes: Tensor, places: Tensor) -> None:
        """Store the entries of ``codes`` at ``places``, which `largest` gave."""
        self.values.copy_(codes[places].view_as(self.values))
        inside = places.unflatten(1, (-1, self.group)).flatten(0, 1).nonzero()[:, 1]
        self.support = packed_columns(inside.view(-1, self.nonzeros), self.group)

    def _split(self, rows: Tensor) -> Tensor:
        """(..., n) to (..., B, n_b), the last block filled with zeros."""
        padded = nn.functional.pad(rows, (0, self.blocks * self.block - self.in_features))
        split: Tensor = padded.unflatten(-1, (self.blocks, self.block))
        return split

    @torch.no_grad()
    def balance(self) -> None:
        """Atoms of norm 1 in every block, their scales in the coefficients."""
        norms = self._split(self.basis).norm(dim=-1).T  # (B, k)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.basis.div_(norms.repeat_interleave(self.block, 0)[: self.in_features].T)
        self.values.mul_(norms.flatten()[self.columns()])

    normalise = balance

    def forward(self, x: Tensor) -> Tensor:
        sources = (self.basis, self.values, self.support)
        weight = self.kept(lambda: self.matrix().to(self.values.dtype), *sources)
        return nn.functional.linear(x, weight, self.bias)

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "torch.cat([z @ d for z, d in zip(codes(values, support, -(-n // block) * atoms, group, nonzeros)"
            ".split(atoms, 1), basis.split(block, 1))], 1)"
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        return BlockDictionaryLinear(**tensors, bias=bias, settings=settings)

    def matrix(self) -> Tensor:
        return self._product(self._codes(self.values.float()), self.basis.float())

    def _product(self, codes: Tensor, basis: Tensor) -> Tensor:
        """[Z_1 D_1, ..., Z_B D_B], (m, n)."""
        joined = torch.einsum("mbk,kbj->mbj", codes.unflatten(1, (self.blocks, self.atoms)), self._split(basis))
        return joined.flatten(1)[:, : self.in_features]

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        return self.out_features * self.in_features

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        if not 0 < settings["block"] <= columns:  # inputs are filled up to whole blocks
            raise ValueError(f"blocks of {settings['block']} inputs")
        groups = -(-columns // settings["block"]) * settings["atoms"] // settings["group"]
        return {
            "basis": ((settings["atoms"], columns), None),
            "values": ((rows, groups * settings["nonzeros"]), None),
            "support": ((support_bytes(rows * groups, settings["group"], settings["nonzeros"]),), torch.uint8),
        }

    def extra_repr(self) -> str:
        pattern = f"{self.nonzeros}:{self.group}"
        return f"{self.in_features}, {self.out_features}, {self.blocks} blocks of {self.atoms} atoms, {pattern}"
