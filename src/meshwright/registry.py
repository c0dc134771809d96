"""The one plug-in door: a named table whose misses say what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from meshwright.errors import InputError, Problem, nearest_name

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things of one kind by name, in order of registration; a miss names the nearest and lists the known.

    >>> doors = Registry[int]("door")
    >>> doors.add("front", 1)
    >>> doors["front"], list(doors)
    (1, ['front'])
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register `entry`; a name can be taken once."""
        assert name not in self._entries, f"{self.noun} {name!r} is registered twice"
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise InputError([Problem(self.noun, name, f"known: {known}", nearest_name(name, self._entries))])
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
