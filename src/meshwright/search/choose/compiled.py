"""Loops as machine code: kept on disk from run to run, and without Python's lock, so that threads run beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """The same function, compiled when it is first called."""
    fast: Loop = numba.njit(cache=True, nogil=True)(loop)
    return fast
