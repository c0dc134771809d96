"""How much each rank holds and who talks to whom: extents under sizes of dims and degrees of axes, worked out once.

Nothing here depends on speeds, so that what is priced again under other constants finds it done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from meshwright.graph import Block
from meshwright.sharding import OperatorLayout, Placements, Shard, fullest, group_size, local_numel

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A communicator: its ranks, how many of them share one group of each level (innermost first), and the doublings
    from each level's number to the next.

    With 8-device nodes a group of 16 neighbours has members (8, 16), one of 4 ranks 8 apart (1, 4).
    """

    num_ranks: Any
    members: tuple[Any, ...]
    doublings: tuple[Any, ...]


class Extents:
    """Sizes of all dims by a graph's names (batch: sequences of a microbatch on all data-parallel ranks) and degrees of
    all mesh axes, outermost first; numbers, or columns of one length."""

    def __init__(self, sizes: Mapping[str, Any], degrees: Mapping[str, Any]) -> None:
        self.sizes = sizes
        self.degrees = degrees
        self._known: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def numel(self, dims: Sequence[str], placements: Placements) -> Any:
        """Elements of a tensor on the fullest rank."""
        cuts = tuple((axis, placed.dim) for axis, placed in placements.items() if isinstance(placed, Shard))
        return self._once((dims, cuts), lambda: local_numel(dims, placements, self.sizes, self.degrees))

    def local_dims(self, block: Block, layout: OperatorLayout) -> dict[str, Any]:
        """Size of each dim of an operator on the fullest rank, by the operator's names."""
        operator, split = layout.operator, layout.split

        def found() -> dict[str, Any]:
            aliases = block.dim_aliases(operator)
            degree = {dim: self.ranks(axis for axis in split if split[axis] == dim) for dim in operator.dims}
            return {dim: fullest(self.sizes[aliases[dim]], degree[dim]) for dim in operator.dims}

        return self._once((block.name, operator.name, tuple(split.items())), found)

    def ranks(self, axes: Iterable[str]) -> Any:
        """Ranks of a group over axes."""
        return group_size(axes, self.degrees)

    def doublings(self, axes: tuple[str, ...]) -> Any:
        """Base-2 logarithm of the ranks of a group over axes."""
        return self._once(("doublings", axes), lambda: doublings(self.ranks(axes)))

    def group(self, axes: tuple[str, ...], level_sizes: tuple[Any, ...]) -> Group:
        """The group over axes in a hierarchy, given how many devices each level joins; ranks in row-major order."""
        if not all(isinstance(size, int) for size in level_sizes):
            return _group(axes, self.degrees, level_sizes)
        return self._once((axes, level_sizes), lambda: _group(axes, self.degrees, level_sizes))


def _group(axes: Sequence[str], degrees: Mapping[str, Any], level_sizes: Sequence[Any]) -> Group:
    members: list[Any] = []
    for level_size in level_sizes:
        count: Any = 1
        stride: Any = 1
        for axis in reversed(list(degrees)):
            if axis in axes:
                room = np.maximum(level_size // stride, 1)
                count = count * np.minimum(degrees[axis], room)
            stride = stride * degrees[axis]
        members.append(count)
    num_ranks = group_size(axes, degrees)
    members[-1] = num_ranks
    steps = zip(members, [1, *members[:-1]], strict=True)
    return Group(num_ranks, tuple(members), tuple(doublings(within / below) for within, below in steps))


def doublings(count: Any) -> Any:
    """Base-2 logarithm, the same to the last bit for a number and within a column (NumPy's own is not)."""
    distinct, index = np.unique(count, return_inverse=True)
    return np.array([math.log2(value) for value in distinct])[index].reshape(np.shape(count))
