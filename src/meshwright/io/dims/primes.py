"""Names that stand once: a second dim of the same class gets a prime.

Within a tensor or an operator each name stands for one dim, though the same class may be there in two roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def primed(dims: Sequence[str]) -> tuple[str, ...]:
    """Names, each once: a second one of the same class with a prime.

    >>> primed(("batch", "tokens", "tokens"))
    ('batch', 'tokens', "tokens'")
    """
    names: list[str] = []
    for dim in dims:
        names.append(unused(dim, names))
    return tuple(names)


def unused(name: str, taken: Iterable[str]) -> str:
    """The name, with as many primes as it takes to be new.

    >>> unused("tokens", ["tokens", "tokens'"])
    "tokens''"
    """
    known = set(taken)
    while name in known:
        name += "'"
    return name
