"""The links of a cluster as resources that messages share: what each gives, and which of them a message occupies.

A `Network` comes from a cluster's levels (`LevelNetwork`: routes are arithmetic) or from its graph (`GraphNetwork`:
shortest paths, found when asked for). `collective_flows` says which messages a collective sends, `send` runs messages
over a network at once, for `sim.flows` to share the links among them.

What a level means here:
- switch, PCIe, Ethernet, shared memory: each device has a card of its own, `bandwidth_Bps` out and as much in. A sender
  gets no more where the cards of its node are shared and the others are silent.
- ring, and torus (a level states no shape): each device is joined to its like in the next and in the previous part,
  `bandwidth_Bps` / 2 on each of the two per direction; messages take the shorter way round, the hops' latencies add up.
  Two ring levels are a torus of two dims with dimension-order routes. A torus level is exact for rings only.
- mesh: a link of its own to its like in every other part, an equal share of `bandwidth_Bps` each.
- over rings and meshes of nodes a message first goes along its own device's links to the node of its target, then
  inside; through switches it goes to the target's card.
- `oversubscription` on cards makes one resource that all traffic of the level crosses, (devices x bandwidth_Bps) /
  oversubscription: it binds where most send at once, not where few do. On links between neighbours it divides them.

Left out: several equal paths (of equally short ones the first is taken always: give parallel switches as one, with
their links added up), adaptive routes, protocol overhead. Bandwidth is as the cluster states it, so scale that for what
software gets of it.

Legend: L resources; F messages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from meshwright.cluster import Cluster, Level, LinkKind, cluster_problems, wiring_problems
from meshwright.errors import InputError, Problem
from meshwright.sharding import FREE, Collective
from meshwright.sim.flows import Shared, simulate_shared
from meshwright.sweep import FloatArray, IndexArray, Streams, Swept

#: (resource indices in the order of the way, seconds that an empty message takes).
Route = tuple[tuple[int, ...], float]

#: (source rank, target rank, bytes).
Flow = tuple[int, int, float]

#: More resources than this are taken for a slip (a mesh of a million devices).
MAX_RESOURCES = 10**8

#: Routes that a graph keeps; each is asked for again and again while a collective repeats.
KEPT_ROUTES = 2**20

_RING_LIKE = (LinkKind.RING, LinkKind.TORUS)


class Network(Protocol):
    """Resources and routes: `capacity_L` in B/s, one direction of a link each."""

    @property
    def num_devices(self) -> int:
        """Ranks are 0 to this less 1."""

    @property
    def capacity_L(self) -> FloatArray:
        """B/s of each resource."""

    @property
    def names_L(self) -> tuple[str, ...]:
        """What each resource is, for people."""

    @property
    def inner(self) -> Level:
        """The innermost level: how many consecutive ranks are a node, and how they are joined."""

    def route(self, source_rank: int, target_rank: int) -> Route:
        """The way of a message; nothing and 0 s from a rank to itself. Raises `InputError` where there is none."""


def network_of(cluster: Cluster) -> Network:
    """The network of a cluster; raises `InputError` with all that is wrong with its links.

    >>> from meshwright.cluster import preset_cluster
    >>> network = network_of(preset_cluster("dgx-h100x2"))
    >>> resources, latency_s = network.route(0, 9)
    >>> [network.names_L[resource] for resource in resources]
    ['infiniband-ndr out of 0', 'infiniband-ndr into 9']
    """
    if cluster.links or cluster.vertices:
        return _graph_network(cluster)
    problems = cluster_problems(cluster)
    if problems:
        raise InputError(problems)
    network = LevelNetwork(cluster.num_devices, cluster.levels)
    if network.num_resources > MAX_RESOURCES:
        rule = f"makes {network.num_resources:,} links; {MAX_RESOURCES:,} at most"
        raise InputError([Problem("levels", cluster.name, rule, "kind switch instead of mesh")])
    return network


def _check_ranks(ranks: Sequence[int], num_devices: int, where: str) -> None:
    problems = [
        Problem(where, str(rank), f"ranks are 0 to {num_devices - 1}", str(min(max(rank, 0), num_devices - 1)))
        for rank in ranks
        if not 0 <= rank < num_devices
    ]
    if problems:
        raise InputError(problems)


# --- levels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wiring:
    """A level's resources: `links_each` per device from `first` on, in rank order, and then, with `has_core`, one per
    group. A level joins `parts` parts of `inner` devices."""

    level: Level
    inner: int
    parts: int
    first: int
    num_devices: int

    @property
    def is_switched(self) -> bool:
        return self.level.kind not in (*_RING_LIKE, LinkKind.MESH)

    @property
    def links_each(self) -> int:
        """Out and in of a card; or a link per neighbour (onwards, back), or per other part."""
        return self.parts - 1 if self.level.kind is LinkKind.MESH else 2

    @property
    def has_core(self) -> bool:
        return self.is_switched and self.level.oversubscription > 1

    @property
    def num_cores(self) -> int:
        return self.num_devices // self.level.group_size if self.has_core else 0

    @property
    def stop(self) -> int:
        return self.first + self.links_each * self.num_devices + self.num_cores

    def capacities_Bps(self) -> FloatArray:
        bandwidth_Bps, thinned = self.level.bandwidth_Bps.value, self.level.oversubscription
        core_Bps = np.full(self.num_cores, self.level.group_size * bandwidth_Bps / thinned)
        if not self.is_switched:
            # Between two parts both links of a ring join the same pair, so one of them stands for both.
            neighbours = self.parts - 1 if self.level.kind is LinkKind.MESH else min(2, self.parts - 1)
            bandwidth_Bps = bandwidth_Bps / max(neighbours, 1) / thinned
        return np.concatenate([np.full(self.links_each * self.num_devices, bandwidth_Bps), core_Bps])

    def names(self) -> Iterator[str]:
        name = self.level.name
        for device in range(self.num_devices):
            if self.is_switched:
                yield from (f"{name} out of {device}", f"{name} into {device}")
            else:
                yield from (f"{name} {device} to {self.peer(device, step)}" for step in self.steps())
        yield from (f"{name} core {group}" for group in range(self.num_cores))

    def steps(self) -> tuple[int, ...]:
        """By how many parts each of a device's links goes on."""
        return tuple(range(1, self.parts)) if self.level.kind is LinkKind.MESH else (1, -1)

    def peer(self, device: int, step: int) -> int:
        """The like of a device, `step` parts further in its group."""
        group, within = divmod(device, self.level.group_size)
        return group * self.level.group_size + (within + step * self.inner) % self.level.group_size

    def cross(self, source: int, target: int) -> tuple[list[int], float, int]:
        """From a device into the part of another: resources, seconds, and the device that is reached there."""
        latency_s = self.level.latency_s.value
        if self.is_switched:
            cards = [self.first + 2 * source, self.first + 2 * target + 1]
            core = self.first + self.links_each * self.num_devices + source // self.level.group_size
            return ([cards[0], core, cards[1]] if self.has_core else cards), latency_s, target
        onwards = (target // self.inner - source // self.inner) % self.parts
        if self.level.kind is LinkKind.MESH:
            return [self.first + self.links_each * source + onwards - 1], latency_s, self.peer(source, onwards)
        step, hops = (1, onwards) if 2 * onwards <= self.parts else (-1, self.parts - onwards)
        way = [self.first + 2 * self.peer(source, step * hop) + (step < 0) for hop in range(hops)]
        return way, hops * latency_s, self.peer(source, step * hops)


@dataclass(frozen=True)
class LevelNetwork:
    """The network of a hierarchy (see the module's first lines for what a level means). Sound levels are taken for
    granted, as `network_of` checks them; routes are worked out, not kept.
    """

    num_devices: int
    levels: tuple[Level, ...]

    @cached_property
    def _wirings(self) -> tuple[_Wiring, ...]:
        found: list[_Wiring] = []
        for level in self.levels:
            inner = found[-1].level.group_size if found else 1
            first = found[-1].stop if found else 0
            found.append(_Wiring(level, inner, level.group_size // inner, first, self.num_devices))
        return tuple(found)

    @property
    def num_resources(self) -> int:
        """L."""
        return self._wirings[-1].stop

    @cached_property
    def capacity_L(self) -> FloatArray:
        """B/s of each resource."""
        return np.concatenate([wiring.capacities_Bps() for wiring in self._wirings])

    @cached_property
    def names_L(self) -> tuple[str, ...]:
        """Level and device of each resource."""
        return tuple(name for wiring in self._wirings for name in wiring.names())

    @property
    def inner(self) -> Level:
        """The innermost level."""
        return self.levels[0]

    def route(self, source_rank: int, target_rank: int) -> Route:
        """Outermost level first: into the target's part, then on inside it."""
        _check_ranks((source_rank, target_rank), self.num_devices, "route")
        way: list[int] = []
        latency_s, at = 0.0, source_rank
        for wiring in reversed(self._wirings):
            if at // wiring.inner != target_rank // wiring.inner:
                links, seconds, at = wiring.cross(at, target_rank)
                way += links
                latency_s += seconds
        return tuple(way), latency_s


# --- graph ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GraphNetwork:
    """The network of vertices and links: fewest hops, among those the least latency, then the smallest vertex first.

    Each direction of the links between two vertices is one resource, as wide as they are together, its latency that of
    the slowest. `neighbours[v]` maps a vertex to (resource, seconds), in the order of vertices. Devices pass messages
    on. A route is looked for from both of its ends at once, so that its cost grows with what lies between them, not
    with the network.
    """

    cluster: Cluster
    capacity_L: FloatArray
    ends_L: tuple[tuple[int, int], ...]
    neighbours: tuple[dict[int, tuple[int, float]], ...]

    @property
    def num_devices(self) -> int:
        """Devices of the cluster."""
        return self.cluster.num_devices

    @cached_property
    def names_L(self) -> tuple[str, ...]:
        """The vertices that each resource joins."""
        vertices = self.cluster.vertices
        return tuple(f"{vertices[source]} to {vertices[target]}" for source, target in self.ends_L)

    @cached_property
    def inner(self) -> Level:
        """The innermost level of the hierarchy that the cluster's widest links make."""
        levels = self.cluster.hierarchy()
        if not levels:
            raise InputError([Problem("links", f"{len(self.cluster.links)} links", "join no two devices")])
        return levels[0]

    def route(self, source_rank: int, target_rank: int) -> Route:
        """The way of a message; raises `InputError` where no path joins the two."""
        _check_ranks((source_rank, target_rank), self.num_devices, "route")
        return self._kept_route(source_rank, target_rank)

    @cached_property
    def _kept_route(self) -> _FindRoute:
        return lru_cache(KEPT_ROUTES)(self._find_route)

    def _find_route(self, source: int, target: int) -> Route:
        layers = _shortest_layers(self.neighbours, source, target)
        if layers is None:
            raise InputError([self._no_path(source, target)])
        # Backwards, the least latency that is left from each vertex; then forwards by it.
        left_s = {target: 0.0}
        for layer in reversed(layers[:-1]):
            here_s: dict[int, float] = {}
            for vertex in layer:
                ways = [s + left_s[n] for n, (_, s) in self.neighbours[vertex].items() if n in left_s]
                if ways:
                    here_s[vertex] = min(ways)
            left_s |= here_s
        way, latency_s, vertex = [], 0.0, source
        for layer in layers[1:]:
            onwards = [
                (s + left_s[n], n) for n, (_, s) in self.neighbours[vertex].items() if n in layer and n in left_s
            ]
            _, following = min(onwards)
            resource, seconds = self.neighbours[vertex][following]
            way.append(resource)
            latency_s += seconds
            vertex = following
        return tuple(way), latency_s

    def _no_path(self, source: int, target: int) -> Problem:
        vertices = self.cluster.vertices
        hubs = [self._hub(end) for end in (source, target)]
        nearest = f"a link between {vertices[hubs[0]]} and {vertices[hubs[1]]}"
        return Problem("route", f"{vertices[source]} to {vertices[target]}", "no path of links joins the two", nearest)

    def _hub(self, vertex: int) -> int:
        """Of all that a vertex reaches, that with most neighbours; the first of equals."""
        reached, open_ends = {vertex}, [vertex]
        while open_ends:
            for neighbour in self.neighbours[open_ends.pop()]:
                if neighbour not in reached:
                    reached.add(neighbour)
                    open_ends.append(neighbour)
        return min(reached, key=lambda one: (-len(self.neighbours[one]), one))


class _FindRoute(Protocol):
    def __call__(self, source: int, target: int) -> Route: ...


def _shortest_layers(
    neighbours: Sequence[dict[int, tuple[int, float]]], source: int, target: int
) -> list[set[int]] | None:
    """The vertices of all paths of fewest hops by their distance from the source; None where there is no path.

    Grown from both ends, the smaller front first, until the fronts meet; then only what is on such a path is kept."""
    ahead, behind = [{source}], [{target}]
    seen_ahead, seen_behind = {source}, {target}
    while not (meeting := ahead[-1] & behind[-1]):
        layers, seen = (ahead, seen_ahead) if len(ahead[-1]) <= len(behind[-1]) else (behind, seen_behind)
        front = {neighbour for vertex in layers[-1] for neighbour in neighbours[vertex]} - seen
        if not front:
            return None
        seen |= front
        layers.append(front)
    found = [meeting]
    for layer in reversed(ahead[:-1]):
        found.insert(0, {vertex for vertex in layer if not found[0].isdisjoint(neighbours[vertex])})
    for layer in reversed(behind[:-1]):
        found.append({vertex for vertex in layer if not found[-1].isdisjoint(neighbours[vertex])})
    return found


def _graph_network(cluster: Cluster) -> GraphNetwork:
    if problems := wiring_problems(cluster):
        raise InputError(problems)
    index = {vertex: number for number, vertex in enumerate(cluster.vertices)}
    bundles: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for link in cluster.links:
        low, high = sorted((index[link.source], index[link.target]))
        bundles.setdefault((low, high), []).append((link.bandwidth_Bps.value, link.latency_s.value))
    neighbours: list[dict[int, tuple[int, float]]] = [{} for _ in cluster.vertices]
    ends: list[tuple[int, int]] = []
    capacities_Bps: list[float] = []
    for (low, high), bundle in sorted(bundles.items()):
        width_Bps, latency_s = math.fsum(width for width, _ in bundle), max(seconds for _, seconds in bundle)
        for one, other in ((low, high), (high, low)):
            neighbours[one][other] = (len(ends), latency_s)
            ends.append((one, other))
            capacities_Bps.append(width_Bps)
    return GraphNetwork(cluster, np.array(capacities_Bps), tuple(ends), tuple(neighbours))


# --- messages ---------------------------------------------------------------------------------------------------------


def collective_flows(network: Network, ranks: Sequence[int], collective: Collective, size_bytes: float) -> list[Flow]:
    """The messages of a collective over `ranks` whose larger side is `size_bytes` a rank, all of them at once.

    All-to-all: size / n between each two. The others go in rings, as NCCL's do: in all, each rank sends (n-1)/n of the
    size to its successors, twice that in an all-reduce. Ranks of a node (`network.inner`) stay neighbours, in the order
    given. A group over several nodes has as many rings as its smallest part in a node, each with its share of the bytes
    and through other devices' cards; every other node is passed in reverse, so that a ring goes from a device to its
    like in the next node, on one rail (where the nodes are odd in number, all but one message of a ring). Where links
    join neighbours only, half of the bytes go either way round; where each two have their own (a mesh), everyone sends
    to everyone else. Per-step latencies of a ring are not in the messages.

    >>> from meshwright.cluster import preset_cluster
    >>> network = network_of(preset_cluster("dgx-h100x1"))
    >>> collective_flows(network, [0, 1, 2, 3], Collective.ALL_GATHER, 4e9)
    [(0, 1, 3000000000.0), (1, 2, 3000000000.0), (2, 3, 3000000000.0), (3, 0, 3000000000.0)]
    """
    _check_ranks(ranks, network.num_devices, "ranks")
    problems = [Problem("ranks", str(rank), "stands twice") for rank, count in Counter(ranks).items() if count > 1]
    if not 0 <= size_bytes < math.inf:
        problems.append(Problem("size_bytes", str(size_bytes), "must be finite and not negative"))
    if problems:
        raise InputError(problems)
    num_ranks = len(ranks)
    if num_ranks < 2 or collective in FREE:
        return []
    passes = 2 if collective is Collective.ALL_REDUCE else 1
    nodes = _by_node(ranks, network.inner.group_size)
    direct = network.inner.kind is LinkKind.MESH and len(nodes) == 1
    if direct or collective is Collective.ALL_TO_ALL:
        each_bytes = passes * size_bytes / num_ranks
        return [(one, other, each_bytes) for one in ranks for other in ranks if one != other]
    rings = _rings(nodes, both_ways=network.inner.kind in (*_RING_LIKE, LinkKind.OTHER))
    each_bytes = passes * size_bytes * (num_ranks - 1) / num_ranks / len(rings)
    return [(one, other, each_bytes) for ring in rings for one, other in zip(ring, ring[1:] + ring[:1], strict=True)]


def _by_node(ranks: Sequence[int], node_size: int) -> list[list[int]]:
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(rank // node_size, []).append(rank)
    return list(nodes.values())


def _rings(nodes: Sequence[Sequence[int]], *, both_ways: bool) -> list[list[int]]:
    """Rings over the ranks of all nodes: ring c enters the first by its c-th rank and leaves it by the one before, by
    whose like it enters the next."""
    channels = min(len(node) for node in nodes) if len(nodes) > 1 else 1
    rings = []
    for c in range(channels):
        passed = [[*node[c:], *node[:c]] for node in nodes]
        rings.append([rank for number, node in enumerate(passed) for rank in (node[::-1] if number % 2 else node)])
    return rings + [ring[::-1] for ring in rings] if both_ways else rings


def route_table(network: Network, pairs: Sequence[tuple[int, int]]) -> tuple[IndexArray, IndexArray, FloatArray]:
    """Routes of (source, target) pairs as `Shared` takes them: where each starts, the resources of all, and seconds."""
    found = [network.route(source, target) for source, target in pairs]
    starts = np.zeros(len(found) + 1, dtype=np.int64)
    np.cumsum([len(way) for way, _ in found], out=starts[1:])
    flat = np.array([resource for way, _ in found for resource in way], dtype=np.int64)
    return starts, flat, np.array([latency_s for _, latency_s in found], dtype=np.float64)


def send(network: Network, flows: Sequence[Flow]) -> Swept:
    """All messages at once: when each starts (0) and has arrived, its latency included, in the order of `flows`.

    >>> from meshwright.cluster import preset_cluster
    >>> network = network_of(preset_cluster("dgx-h100x1"))  # 450 GB/s a card: two messages into device 2 share it
    >>> send(network, [(0, 2, 4.5e9), (1, 2, 4.5e9), (3, 4, 4.5e9)]).end_N.round(4).tolist()
    [0.02, 0.02, 0.01]
    """
    starts, routes, latency_F = route_table(network, [(source, target) for source, target, _ in flows])
    each = np.arange(len(flows) + 1)
    streams = Streams(each, np.zeros(len(flows) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    size_F = np.array([size_bytes for _, _, size_bytes in flows], dtype=np.float64)
    shared = Shared(network.capacity_L, size_F, starts, routes, np.full(len(flows), np.inf))
    return simulate_shared(streams, latency_F, shared)
