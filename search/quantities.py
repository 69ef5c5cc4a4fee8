"""Amounts as people write and read them: bytes, counts, times."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rankfront.methods import InputError

COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
BYTES = {"": 1, "B": 1} | {
    f"{unit}{kind}": base**power
    for power, unit in enumerate("kMGT", start=1)
    for kind, base in (("B", 1000), ("iB", 1024))
}


def parse_count(text: str, what: str) -> int:
    """A whole number from ``"100M"``, ``"1.1B"`` or ``"100_000_000"``; `InputError` where it is none above 0."""
    return _parsed(text, COUNTS, f"{what} is {text!r}: write a number such as 100M or 1.1B")


def parse_bytes(text: str, what: str) -> int:
    """Bytes from ``"2GB"``, ``"1.5GiB"``, ``"500MB"`` or a number of bytes; `InputError` where it is none above 0."""
    return _parsed(text.upper().replace("I", "i").replace("K", "k"), BYTES, f"{what} is {text!r}: write 2GB or 500MB")


def _parsed(text: str, units: Mapping[str, int], refusal: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text.replace("_", "").replace(",", ""))
    amount = float(match[1]) * units.get(match[2], 0) if match else 0.0
    if not 1 <= amount < 2**53:
        raise InputError(refusal)
    return int(amount)


def said_bytes(count: float) -> str:
    """``count`` bytes in the decimal unit that leaves three digits: ``1.93 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def said_time(seconds: float) -> str:
    """``seconds`` as nobody would say more exactly: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60 // 10 * 10} min"
