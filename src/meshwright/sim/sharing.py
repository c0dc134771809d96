"""Transfers as flows over the links of a cluster, so that those that meet on a link slow each other down.

A transfer alone takes as long as the cost model says; where its route is shared, the narrowest link of it decides how
much longer (`flows`). In a ring each device sends to the next of its group, so that is its route; a message goes to the
same place in another pipeline rank. Left out: the several rings of a collective, what an all-to-all sends to others
than the next, and that a collective ends for all when the last of its flows does.
"""

from __future__ import annotations

import numpy as np

from meshwright.cluster import Cluster
from meshwright.sim.flows import Shared
from meshwright.sim.network import Network, network_of
from meshwright.sim.program import COMPUTE
from meshwright.sim.tasks import RankTasks, TaskGraph, devices_of, groups_of
from meshwright.strategy import Strategy
from meshwright.sweep import FloatArray, IndexArray


def shared_links(
    graph: TaskGraph, strategy: Strategy, cluster: Cluster, duration_N: FloatArray
) -> tuple[FloatArray, Shared]:
    """Of an unfolded graph, what tasks take beside their flows, and the flows."""
    network = network_of(cluster)
    capacity_L = np.asarray(network.capacity_L, dtype=float)
    fixed_N, work_N = duration_N.copy(), np.zeros(len(duration_N))
    counts_N = np.zeros(len(duration_N), dtype=np.int64)
    routes: list[IndexArray] = []
    devices = [devices_of(strategy.mesh, rank) for rank in range(len(graph.ranks))]
    for rank, own in enumerate(graph.ranks):
        peers = [_peers(graph, strategy, devices, rank, own, stream) for stream in own.streams]
        for index, device in enumerate(devices[rank]):
            tasks = graph.tasks_of(rank, index)
            for stream, peer in enumerate(peers):
                start, stop = tasks.start + own.starts_S[stream], tasks.start + own.starts_S[stream + 1]
                way = _way(network, int(device), peer, index)
                if len(way) and stop > start:
                    work_N[start:stop] = duration_N[start:stop] * capacity_L[way].min()
                    fixed_N[start:stop] = 0.0
                    counts_N[start:stop] = len(way)
                    routes.append(np.tile(way, stop - start))
    starts_N = np.concatenate([[0], np.cumsum(counts_N)])
    flat = np.concatenate(routes) if routes else np.zeros(0, dtype=np.int64)
    return fixed_N, Shared(capacity_L, work_N, starts_N, flat, np.full(len(duration_N), np.inf))


def shared_cores(graph: TaskGraph, duration_N: FloatArray, num_cores: int) -> tuple[FloatArray, Shared]:
    """Of an unfolded graph, what tasks take beside computation, and computation as work of one core each: processes
    that are more than the cores of their machine take turns."""
    computes_N = np.zeros(len(duration_N), dtype=bool)
    for rank, own in enumerate(graph.ranks):
        mine = np.repeat(np.array(own.streams) == COMPUTE, np.diff(own.starts_S))
        computes_N[graph.bases_P[rank] : graph.bases_P[rank] + len(mine) * graph.num_devices] = np.tile(
            mine, graph.num_devices
        )
    starts_N = np.concatenate([[0], np.cumsum(computes_N)])
    cores = Shared(
        np.array([float(num_cores)]),
        np.where(computes_N, duration_N, 0.0),
        starts_N,
        np.zeros(starts_N[-1], dtype=np.int64),
        np.ones(len(duration_N)),
    )
    return np.where(computes_N, 0.0, duration_N), cores


def _peers(
    graph: TaskGraph, strategy: Strategy, devices: list[IndexArray], rank: int, own: RankTasks, stream: str
) -> IndexArray | None:
    """The device that each device of a rank sends to in a stream; None where it sends nothing."""
    words = stream.split()
    if words[:2] == ["pp", "to"]:
        return devices[int(words[2])]
    root, _ = own.collectives(own.streams.index(stream))
    if not root:
        return None
    axes = [axis for axis in strategy.mesh if axis.name != "pp"]
    members_GS = groups_of(axes, root)
    following = np.empty(graph.num_devices, dtype=np.int64)
    following[members_GS.ravel()] = np.roll(members_GS, -1, axis=1).ravel()
    return devices[rank][following]


def _way(network: Network, device: int, peers: IndexArray | None, index: int) -> IndexArray:
    if peers is None or peers[index] == device:
        return np.zeros(0, dtype=np.int64)
    return np.array(network.route(device, int(peers[index]))[0], dtype=np.int64)
