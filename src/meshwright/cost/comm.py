"""Time of collectives on a hierarchy of links.

A group of ranks spans some levels of the hierarchy (NVLink in the node, InfiniBand between). Bandwidth-optimal
algorithms run on every level at once; the slowest level decides. The groups of one node share its network cards: a
group with w ranks in a node has w of them. Each message pays a latency per doubling of the group and level. Left out:
changes of protocol with size, in-network reduction, congestion beyond a level's oversubscription.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Level, LinkKind
from meshwright.cost.extents import Group
from meshwright.sharding import FREE, Collective


@dataclass(frozen=True)
class Wire:
    """A level as messages meet it: what is left of its bandwidth, and how it falls with the groups that it joins.

    `bandwidth_Bps` divides by 1 + `falloff` x log2(groups of the level below that take part)."""

    group_size: Any
    bandwidth_Bps: Any
    latency_s: Any
    falloff: Any = 0.0


@dataclass(frozen=True)
class Shares:
    """What collectives get of nominal bandwidth: inside the innermost level, beyond it, and beyond it on Ethernet;
    and the `falloff` of what lies beyond."""

    inner: float = 1.0
    outer: float = 1.0
    ethernet: float = 1.0
    falloff: float = 0.0


def wires(levels: Sequence[Level], shares: Shares = Shares()) -> Wires:
    """The wires of a hierarchy, innermost first. What was measured is taken as it is."""
    found = []
    for index, level in enumerate(levels):
        beyond = shares.ethernet if level.kind is LinkKind.ETHERNET else shares.outer
        share = beyond if index else shares.inner
        if level.bandwidth_Bps.source.startswith("[measured]"):
            share = 1.0
        bandwidth_Bps = share * level.bandwidth_Bps.value / level.oversubscription
        falloff = shares.falloff if index else 0.0
        found.append(Wire(level.group_size, bandwidth_Bps, level.latency_s.value, falloff))
    return tuple(found)


Wires = tuple[Wire, ...]


@dataclass(frozen=True)
class Took:
    """Seconds of a collective: of moving its bytes, and of the hops that even an empty one takes."""

    transfer_s: Any
    latency_s: Any

    @property
    def seconds(self) -> Any:
        """Both together."""
        return self.transfer_s + self.latency_s


def collective_time(collective: Collective, group: Group, size_bytes: Any, levels: Sequence[Wire]) -> Took:
    """Seconds of a collective whose larger side is `size_bytes` a rank; 0 in a group of one.

    Ring algorithms, level by level (Thakur et al. 2005; NCCL's rings use every card of a node): of `size_bytes` a share
    (k-1)/k crosses a level on which k groups of the level below take part, through the w cards of each. An all-reduce
    is a reduce-scatter and an all-gather. In an all-to-all each rank sends its own part through its own card. A ring of
    n ranks takes n - 1 hops, each as long as the slowest link of the ring; an all-reduce of few bytes goes over trees,
    and the messages of an all-to-all travel at once: a hop per doubling and level. That ranks wait for one another is
    not counted here (`engine.collective_skew_s`).
    """
    if collective in FREE:
        return Took(0.0 * size_bytes * group.num_ranks, 0.0)
    passes = 2 if collective is Collective.ALL_REDUCE else 1
    transfer_s: Any = 0.0
    tree_s: Any = 0.0
    hop_s: Any = 0.0
    below: Any = 1
    for level, within, doubled in zip(levels, group.members, group.doublings, strict=True):
        parts = within / below
        seconds_per_byte = (1 + level.falloff * doubled) / level.bandwidth_Bps
        if collective is Collective.ALL_TO_ALL:
            level_s = size_bytes * (within - below) / group.num_ranks * seconds_per_byte
        else:
            level_s = size_bytes * (parts - 1) / parts / below * seconds_per_byte
        transfer_s = np.maximum(transfer_s, level_s)
        tree_s = tree_s + level.latency_s * doubled
        hop_s = np.where(parts > 1, np.maximum(hop_s, level.latency_s), hop_s)
        below = within
    ring_s = (group.num_ranks - 1) * hop_s
    in_ring = collective in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    latency_s = ring_s if in_ring else np.minimum(tree_s, ring_s)
    return Took(passes * transfer_s, passes * latency_s)


def point_to_point_time(size_bytes: Any, stride: Any, levels: Sequence[Wire]) -> Any:
    """Seconds of a message between ranks `stride` apart, while the devices of a node send at once through one card
    each, so that they do not slow each other down unless the level is oversubscribed."""
    time_s: Any = None
    for level in reversed(levels):
        here = size_bytes / level.bandwidth_Bps + level.latency_s
        time_s = here if time_s is None else np.where(stride < level.group_size, here, time_s)
    return time_s
