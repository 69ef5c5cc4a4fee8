"""Right factors that read the same input (q/k/v, gate/up), run as one matrix product.

h = [R₁; R₂; …] x, one product instead of one each; every module then multiplies its own slice of h by its left factor.
The first of them that is called on an input makes the product, the others find it. Results are those of separate
products up to rounding. Whether it pays depends on shapes and device: who joins modules has measured it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

MOVES = 3  # times that factors which were moved are gathered again: what moves them oftener does so at every call


class Member(Protocol):
    """What can be joined: a module with a right factor (r, n) that multiplies its input first."""

    right: nn.Parameter
    joined: Joined | None
    place: int  # among those that it is joined with


class Joined:
    """The right factors of ``members``, in the order of their calls, one below another.

    Their parameters become views of the whole, so nothing is stored twice. Members multiply alone while a gradient is
    wanted or a graph is compiled, where the input holds more than ``most`` vectors (None: any number), and where they
    are not on one device in one dtype.
    """

    def __init__(self, members: Sequence[Member], most: int | None = None) -> None:
        self.members = list(members)
        self.most = most
        self._moves = -1
        self._starts: list[int] = []  # of each member, the address of its factor as a part of the whole
        self._product: tuple[Tensor, tuple[Tensor, ...]] | None = None  # the newest input, and every slice of h
        for place, member in enumerate(self.members):
            member.joined, member.place = self, place
        self._gather()

    def _gather(self) -> bool:
        """Put the factors of all members below one another; False where that cannot be."""
        rights = {id(member.right): member.right for member in self.members}  # several may have the very same
        first = self.members[0].right
        alike = len({(right.device, right.dtype, right.shape[1]) for right in rights.values()}) == 1
        self._moves += 1
        if not alike or first.is_meta or self._moves > MOVES:
            return False
        with torch.inference_mode(False), torch.no_grad():
            self._whole = torch.cat([right.detach() for right in rights.values()])
            self._ranks = [len(right) for right in rights.values()]
            for right, part in zip(rights.values(), self._whole.split(self._ranks), strict=True):
                right.data = part
        slots = list(rights)
        self._slots = [slots.index(id(member.right)) for member in self.members]
        self._starts = [member.right.data_ptr() for member in self.members]
        return True

    def part(self, member: Member, x: Tensor) -> Tensor | None:
        """The slice (..., r) of h that is ``member``'s for x (..., n); None where it has to multiply alone."""
        if torch.compiler.is_compiling() or (self.most is not None and x.numel() > self.most * x.shape[-1]):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or member.right.requires_grad):
            return None
        place = member.place
        if (not self._starts or member.right.data_ptr() != self._starts[place]) and not self._gather():
            return None
        product = self._product
        if product is None or product[0] is not x:
            product = x, nn.functional.linear(x, self._whole).split(self._ranks, -1)
        self._product = product if place < len(self.members) - 1 else None  # which would keep the input alive
        return product[1][self._slots[place]]

    def part_ways(self) -> None:
        """Give every member a factor of its own again."""
        with torch.inference_mode(False), torch.no_grad():
            for member in self.members:
                member.right.data = member.right.detach().clone()
        for member in self.members:
            member.joined = None
