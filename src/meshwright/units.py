"""Units: SI base units inside, human units only where something is printed."""

from __future__ import annotations

KiB = 2**10
MiB = 2**20
GiB = 2**30
TERA = 1e12
GIGA = 1e9
MICRO = 1e-6


def format_bytes(num_bytes: float) -> str:
    """Bytes as a person reads them; binary units, always said.

    >>> format_bytes(85_899_345_920)
    '80.0 GiB'
    """
    for unit, size in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> format_seconds(0.01234)
    '12.34 ms'
    """
    if abs(seconds) >= 1:
        return f"{seconds:,.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"


def format_count(count: float) -> str:
    """A large count as a person reads it.

    >>> format_count(70_553_706_496)
    '70.6 B'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"


def format_flops(flops: float) -> str:
    """Floating-point operations as a person reads them.

    >>> format_flops(481.0e9)
    '481.0 GFLOP'
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(flops) >= size:
            return f"{flops / size:,.1f} {unit}FLOP"
    return f"{flops:,.0f} FLOP"
