"""The mesh as one rank sees it: its coordinates, which piece of a split dim is its own, and the process groups.

A dim split by several axes is cut by the outermost axis first, each piece by the next, in pieces of equal size rounded
up (the last may be smaller or empty). All ranks of a group stand in it in the order of their global ranks, which is the
order of the pieces. Nothing here knows what an axis is for, except that `pp` stands for time and splits no tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from meshwright.sharding import Placements, Shard
from meshwright.strategy import MeshAxis

Extent = tuple[int, int]


@dataclass
class Mesh:
    """Axes, outermost first, and one rank among them; `form_groups` makes the process groups that it is in."""

    axes: tuple[MeshAxis, ...]
    rank: int
    timeout_s: float = 120.0
    groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        return coordinates_of(self.rank, self.axes)

    def degree(self, axes: Iterable[str]) -> int:
        """Ranks of a group over `axes`."""
        return math.prod(axis.size for axis in self.axes if axis.name in set(axes))

    def ordered(self, axes: Iterable[str]) -> tuple[str, ...]:
        """`axes`, each once, outermost first."""
        wanted = set(axes)
        return tuple(axis.name for axis in self.axes if axis.name in wanted)

    def members(self, axes: Iterable[str]) -> list[int]:
        """The ranks that differ from this one on `axes` alone, ascending."""
        wanted, mine = set(axes), self.coordinates
        ranges = [range(axis.size) if axis.name in wanted else (mine[axis.name],) for axis in self.axes]
        return [rank_at(place, self.axes) for place in itertools.product(*ranges)]

    def is_first(self, axes: Iterable[str]) -> bool:
        """Whether this rank is the first of its group over `axes`."""
        mine = self.coordinates
        return all(mine[axis] == 0 for axis in axes)

    def form_groups(self, wanted: Iterable[Iterable[str]]) -> None:
        """Make one process group per set of axes; every rank must ask for the same sets."""
        for axes in sorted({self.ordered(axes) for axes in wanted}):
            if self.degree(axes) > 1 and axes not in self.groups:
                self.groups[axes] = self.new_group(self.members(axes))

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """A group of any ranks, this one among them, all of which ask for it; it waits no longer than the others do."""
        timeout = timedelta(seconds=self.timeout_s)  # not inherited from the world's group: PyTorch's default is 30 min
        return dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)

    def group(self, axes: Iterable[str]) -> dist.ProcessGroup:
        """The process group over `axes`."""
        return self.groups[self.ordered(axes)]

    def extent(self, size: int, axes: Iterable[str], coordinates: Mapping[str, int] | None = None) -> Extent:
        """Start and stop of the piece of a dim of `size` that this rank (or another place) has, `axes` splitting it."""
        place = self.coordinates if coordinates is None else coordinates
        start, stop = 0, size
        for axis in self.axes:
            if axis.name in set(axes):
                piece = -(-(stop - start) // axis.size)
                start = min(start + piece * place[axis.name], stop)
                stop = min(start + piece, stop)
        return start, stop

    def pieces(self, size: int, axes: Iterable[str], over: Iterable[str]) -> Iterator[Extent]:
        """The pieces, of a dim of `size` that `axes` split, of all ranks of this rank's group over `over`."""
        for rank in self.members(over):
            yield self.extent(size, axes, coordinates_of(rank, self.axes))


def coordinates_of(rank: int, axes: Iterable[MeshAxis]) -> dict[str, int]:
    """The place of `rank` in a row-major mesh."""
    place = {}
    for axis in reversed(tuple(axes)):
        rank, place[axis.name] = divmod(rank, axis.size)
    return place


def rank_at(place: Iterable[int], axes: Iterable[MeshAxis]) -> int:
    """The rank at a place given outermost first."""
    rank = 0
    for coordinate, axis in zip(place, axes, strict=True):
        rank = rank * axis.size + coordinate
    return rank


def splitting_axes(placements: Placements, dim: str) -> tuple[str, ...]:
    """The axes that split `dim` under `placements`."""
    return tuple(axis for axis, placement in placements.items() if placement == Shard(dim))
