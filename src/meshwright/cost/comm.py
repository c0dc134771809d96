"""Time of collectives on a hierarchy of links.

A group of ranks spans some levels of the hierarchy (NVLink in the node, InfiniBand between). Bandwidth-optimal
algorithms run on every level at once; the slowest level decides. The groups of one node share its network cards: a
group with w ranks in a node has w of them. Each message pays a latency per doubling of the group and level. Left out:
changes of protocol with size, in-network reduction, congestion beyond a level's oversubscription.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Level
from meshwright.sharding import Collective, group_size


@dataclass(frozen=True)
class Group:
    """A communicator: its ranks, and how many of them share one group of each level, innermost first.

    With 8-device nodes a group of 16 neighbours has members (8, 16), one of 4 ranks 8 apart (1, 4).
    """

    num_ranks: Any
    members: tuple[Any, ...]


def mesh_group(axes: Sequence[str], degrees: Mapping[str, Any], levels: Sequence[Level]) -> Group:
    """The group over `axes` of a mesh; `degrees` outermost first, ranks in row-major order."""
    members: list[Any] = []
    for level in levels:
        count: Any = 1
        stride: Any = 1
        for axis in reversed(list(degrees)):
            if axis in axes:
                room = np.maximum(level.group_size // stride, 1)
                count = count * np.minimum(degrees[axis], room)
            stride = stride * degrees[axis]
        members.append(count)
    num_ranks = group_size(axes, degrees)
    members[-1] = num_ranks
    return Group(num_ranks, tuple(members))


def collective_time(
    collective: Collective, group: Group, size_bytes: Any, levels: Sequence[Level], skew_s: float = 0.0
) -> Any:
    """Seconds of a collective whose larger side is `size_bytes` a rank; 0 in a group of one.

    Ring algorithms, level by level (Thakur et al. 2005; NCCL's rings use every card of a node): of `size_bytes` a
    share (k-1)/k crosses a level on which k groups of the level below take part, through the w cards of each. An
    all-reduce is a reduce-scatter and an all-gather. In an all-to-all each rank sends its own part through its own
    card.
    """
    if collective is Collective.SLICE:
        return 0.0 * size_bytes * group.num_ranks
    passes = 2 if collective is Collective.ALL_REDUCE else 1
    transfer_s: Any = 0.0
    latency_s: Any = 0.0
    below: Any = 1
    for level, within in zip(levels, group.members, strict=True):
        parts = within / below
        bandwidth = level.bandwidth_Bps.value / level.oversubscription
        if collective is Collective.ALL_TO_ALL:
            level_s = size_bytes * (within - below) / group.num_ranks / bandwidth
        else:
            level_s = size_bytes * (parts - 1) / parts / (below * bandwidth)
        transfer_s = np.maximum(transfer_s, level_s)
        latency_s = latency_s + level.latency_s.value * doublings(parts)
        below = within
    return passes * (transfer_s + latency_s + skew_s * doublings(group.num_ranks))


def doublings(count: Any) -> Any:
    """Base-2 logarithm, the same to the last bit for a number and within a column (NumPy's own is not)."""
    distinct, index = np.unique(count, return_inverse=True)
    return np.array([math.log2(value) for value in distinct])[index].reshape(np.shape(count))


def point_to_point_time(size_bytes: Any, stride: Any, levels: Sequence[Level], sharers: Any = 1) -> Any:
    """Seconds of a message between ranks `stride` apart; `sharers` devices of a node send at once through one card
    each, so they do not slow each other down unless the level is oversubscribed."""
    time_s: Any = None
    for level in reversed(levels):
        bandwidth = level.bandwidth_Bps.value / level.oversubscription / sharers
        here = size_bytes / bandwidth + level.latency_s.value
        time_s = here if time_s is None else np.where(stride < level.group_size, here, time_s)
    return time_s
