"""Divisors of whole numbers: the degrees that divide what they split, and the nearest of them."""

from __future__ import annotations

import math
from functools import cache


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`.

    >>> nearest_divisor(64, 3)
    2
    """
    return min(divisors(number), key=lambda divisor: (abs(divisor - wanted), divisor))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending; of a number beyond 10^12 only those up to 10^6 and the numbers of times they go into it.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [candidate for candidate in range(1, math.isqrt(min(number, 10**12)) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // candidate for candidate in small)}))
