"""Where time goes: CPU-seconds of this process, by what they went into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(phases_s: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU-seconds of what happens inside to an entry.

    >>> phases_s = {}
    >>> with timed(phases_s, "counting"):
    ...     total = sum(range(10))
    >>> list(phases_s)
    ['counting']
    """
    start = time.process_time()
    yield
    phases_s[name] = phases_s.get(name, 0.0) + time.process_time() - start
