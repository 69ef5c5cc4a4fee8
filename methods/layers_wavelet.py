"""Low rank in the bands of a wavelet transform: transform, thin products band by band, transform back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfront.methods._sizes import BYTE, index_width, packed_bits
from rankfront.methods._support import unpack
from rankfront.methods._training import balance_pair
from rankfront.methods.layers import Settings, Shapes, layer, optional_parameter, parameter

BANDS = ("ll", "hl", "lh", "hh")  # outputs' band, inputs' band; those of the low inputs first


Filters = tuple[tuple[float, ...], tuple[float, ...]]


LOW_PASS = {  # vanishing moments -> taps of the Daubechies wavelet's low-pass filter, as PyWavelets has them
    1: (0.7071067811865476, 0.7071067811865476),
    2: (-0.12940952255126037, 0.2241438680420134, 0.8365163037378079, 0.48296291314453416),
}


def filters(moments: int) -> Filters:
    """The low-pass and high-pass filter of the Daubechies wavelet with so many vanishing moments; one is Haar's.

    Of the low-pass taps h_0, ..., h_{F-1} the high-pass ones are (−1)^{k+1} h_{F−1−k}. KeyError for moments without.
    """
    low = LOW_PASS[moments]
    return low, tuple(tap if k % 2 else -tap for k, tap in enumerate(reversed(low)))


def even(size: int) -> int:
    """The size after padding."""
    return size + size % 2


def analyse(x: Tensor, pair: Filters) -> tuple[Tensor, Tensor]:
    """One level of the periodised transform of x (..., n), n even: bands low and high, (..., n/2) each.

    low_i = Σ_k f_k x_{2i + F/2 − k mod n} with a filter f of length F, as PyWavelets' ``periodization``; orthonormal.
    """
    phases = x[..., ::2], x[..., 1::2]
    bands = []
    for taps in pair:
        band = torch.zeros_like(phases[0])
        for k, tap in enumerate(taps):
            step, phase = divmod(len(taps) // 2 - k, 2)
            band = band + tap * (phases[phase].roll(-step, -1) if step else phases[phase])
        bands.append(band)
    return bands[0], bands[1]


def synthesise(low: Tensor, high: Tensor, pair: Filters) -> Tensor:
    """The inverse of `analyse`, which is its transpose: two bands (..., n/2) to (..., n)."""
    phases = [torch.zeros_like(low), torch.zeros_like(low)]
    for taps, band in zip(pair, (low, high), strict=True):
        for k, tap in enumerate(taps):
            step, phase = divmod(len(taps) // 2 - k, 2)
            phases[phase] = phases[phase] + tap * (band.roll(step, -1) if step else band)
    both: Tensor = torch.stack(phases, -1).flatten(-2)
    return both


def pad(x: Tensor) -> Tensor:
    """A zero after the last dimension where it is odd."""
    return nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x


@layer("wavelet")
class WaveletLinear(nn.Module):
    """y = T_mᵀ (Σ_ab left_ab (right_ab (T_n x)_b))_a + bias, for bands a of the outputs and b of the inputs.

    left (⌈m/2⌉, k) and right (k, ⌈n/2⌉) hold the bands' factors side by side in the order of `BANDS`, k = Σ ranks; x
    (..., n) to y (..., m). Where an order was learned, ``order`` says which input stands at each place, packed.
    """

    order: Tensor | None
    factors = ("left", "right")

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        settings: Settings,
        size: tuple[int, int],
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.left, self.right = parameter(left), parameter(right)
        self.bias = optional_parameter(bias)
        self.register_buffer("order", order)
        self.out_features, self.in_features = size
        self.moments = settings["moments"]
        self.filters = filters(self.moments)
        self.ranks = [settings[band] for band in BANDS]

    def balance(self) -> None:
        balance_pair(self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, unpack(self.order, index_width(self.in_features), self.in_features))
        low, high = analyse(pad(x), self.filters)
        ll, hl, lh, hh = self.left.split(self.ranks, 1)
        inner = self.ranks[0] + self.ranks[1]
        from_low = nn.functional.linear(low, self.right[:inner]).split(self.ranks[:2], -1)
        from_high = nn.functional.linear(high, self.right[inner:]).split(self.ranks[2:], -1)
        y = synthesise(
            from_low[0] @ ll.T + from_high[0] @ lh.T,  # (..., ⌈m/2⌉)
            from_low[1] @ hl.T + from_high[1] @ hh.T,
            self.filters,
        )[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    @staticmethod
    def formula(settings: Settings) -> str:
        return (
            "(transform(outputs, moments).T @ banded(left, right, (ll, hl, lh, hh)) @ transform(inputs, moments))"
            "[:m, :n]" + "[:, numbers(order, max(1, (n - 1).bit_length()), n).argsort()]" * bool(settings["ordered"])
        )

    @staticmethod
    def build(dense: nn.Module, tensors: Mapping[str, Tensor], bias: Tensor | None, settings: Settings) -> nn.Module:
        size = (settings["outputs"], settings["inputs"])
        return WaveletLinear(**tensors, bias=bias, settings=settings, size=size)

    def matrix(self) -> Tensor:
        lefts, rights = self.left.float().split(self.ranks, 1), self.right.float().split(self.ranks, 0)
        ll, hl, lh, hh = (left @ right for left, right in zip(lefts, rights, strict=True))
        half = [synthesise(a, b, self.filters) for a, b in ((ll, lh), (hl, hh))]  # rows' bands, (⌈m/2⌉, n)
        whole = synthesise(half[0].T, half[1].T, self.filters).T[: self.out_features, : self.in_features]
        if self.order is not None:
            whole = whole[:, unpack(self.order, index_width(self.in_features), self.in_features).argsort()]
        return whole

    def full_bias(self) -> Tensor | None:
        return self.bias

    def multiplications(self) -> int:
        """The transforms, a few additions a feature, are not counted."""
        return self.left.numel() + self.right.numel()

    @staticmethod
    def shapes(rows: int, columns: int, settings: Settings, bias: bool) -> Shapes:
        rank = sum(settings[band] for band in BANDS)
        found: Shapes = {"left": ((even(rows) // 2, rank), None), "right": ((rank, even(columns) // 2), None)}
        if settings["ordered"]:
            found["order"] = ((packed_bits(columns, index_width(columns)) // BYTE,), torch.uint8)
        return found

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{band}={rank}" for band, rank in zip(BANDS, self.ranks, strict=True))
        return f"{self.in_features}, {self.out_features}, moments={self.moments}, {ranks}, bias={self.bias is not None}"
