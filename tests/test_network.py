"""Networks of clusters: routes, and what messages that share links cost, by hand and against the closed forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Device, DeviceGroup, Level, Link, LinkKind, Quantity, preset_cluster
from meshwright.cost.comm import collective_time, wires
from meshwright.cost.extents import Group, doublings
from meshwright.errors import InputError
from meshwright.sharding import Collective
from meshwright.sim.network import (
    Flow,
    GraphNetwork,
    LevelNetwork,
    Network,
    collective_flows,
    network_of,
    send,
)

GB = 1e9
IN_RINGS = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE)


def quantity(value: float) -> Quantity:
    return Quantity(value, "[derived] test")


GPU = Device("gpu", {"float32": quantity(1e12)}, quantity(16e9), quantity(1e12))


def level(group_size: int, bandwidth_Bps: float, kind: LinkKind, oversubscription: float = 1.0) -> Level:
    return Level(kind.value, group_size, quantity(bandwidth_Bps), quantity(0.0), kind, oversubscription)


def levelled(*levels: Level) -> Cluster:
    return Cluster("levels", (DeviceGroup(GPU, levels[-1].group_size),), levels)


def graph(num_devices: int, switches: Sequence[str], *links: tuple[str, str, float]) -> Cluster:
    """Links of (vertex, vertex, B/s) and no latency; devices are named by their rank."""
    vertices = (*(str(rank) for rank in range(num_devices)), *switches)
    wires_ = tuple(Link(one, other, quantity(width), quantity(0.0)) for one, other, width in links)
    return Cluster("graph", (DeviceGroup(GPU, num_devices),), (), vertices, wires_)


def fat_tree(num_leaves: int, hosts: int, width_Bps: float, oversubscription: float) -> Cluster:
    """Hosts under leaves under one spine (parallel spines taken together)."""
    leaves = [f"leaf{leaf}" for leaf in range(num_leaves)]
    down = [(str(host), leaves[host // hosts], width_Bps) for host in range(num_leaves * hosts)]
    up = [(leaf, "spine", hosts * width_Bps / oversubscription) for leaf in leaves]
    return graph(num_leaves * hosts, [*leaves, "spine"], *down, *up)


def torus(rows: int, columns: int, width_Bps: float) -> Cluster:
    """A link to each of four neighbours; rows of consecutive ranks. More than two either way."""
    here = list(product(range(rows), range(columns)))
    right = [(str(r * columns + c), str(r * columns + (c + 1) % columns), width_Bps) for r, c in here]
    down = [(str(r * columns + c), str((r + 1) % rows * columns + c), width_Bps) for r, c in here]
    return graph(rows * columns, [], *right, *down)


def pcie_tree(num_switches: int, devices: int, width_Bps: float) -> Cluster:
    """Devices under PCIe switches under one root, all links alike."""
    return fat_tree(num_switches, devices, width_Bps, oversubscription=devices)


def rails(num_pods: int, nodes: int, devices: int, width_Bps: float, oversubscription: float) -> Cluster:
    """Nodes of devices on a fast switch; the like devices of a pod's nodes on a rail switch, those on one spine."""
    num_devices = num_pods * nodes * devices
    places = [(rank, rank // devices, rank // (devices * nodes), rank % devices) for rank in range(num_devices)]
    inside = [(str(rank), f"node{node}", 10 * width_Bps) for rank, node, _, _ in places]
    cards = [(str(rank), f"pod{pod}rail{rail}", width_Bps) for rank, _, pod, rail in places]
    names = [f"pod{pod}rail{rail}" for pod, rail in product(range(num_pods), range(devices))]
    up = [(name, "spine", nodes * width_Bps / oversubscription) for name in names]
    switches = [*(f"node{node}" for node in range(num_pods * nodes)), *names, "spine"]
    return graph(num_devices, switches, *inside, *cards, *up)


def still(cluster: Cluster) -> Cluster:
    """The same without latency."""
    levels = tuple(dataclasses.replace(level, latency_s=quantity(0.0)) for level in cluster.levels)
    return dataclasses.replace(cluster, levels=levels)


def seconds(network: Network, flows: Sequence[Flow]) -> float:
    return float(send(network, flows).end_N.max())


def names(network: Network, source: int, target: int) -> list[str]:
    return [network.names_L[resource] for resource in network.route(source, target)[0]]


def group(num_ranks: int, *members: int) -> Group:
    return Group(num_ranks, members, tuple(doublings(b / a) for a, b in pairwise([1, *members])))


# --- collectives against the closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("collective", [*IN_RINGS, Collective.ALL_TO_ALL])
@pytest.mark.parametrize("name", ["dgx-h100x1", "mi300xx1", "dgx-v100x1", "tpu-v4x8", "pcie-2080tix1", "local-cpux8"])
def test_a_collective_alone_takes_its_closed_form(name: str, collective: Collective) -> None:
    """Switch, mesh, ring, torus, PCIe, shared memory; (n-1)/n x bytes / bandwidth, twice that for an all-reduce."""
    cluster = still(preset_cluster(name))
    took_s = seconds(network_of(cluster), collective_flows(network_of(cluster), range(8), collective, 4 * GB))
    transfer_s = collective_time(collective, group(8, 8), 4 * GB, wires(cluster.levels)).transfer_s
    if collective is Collective.ALL_TO_ALL and cluster.levels[0].kind in (LinkKind.RING, LinkKind.TORUS):
        # Not over neighbours: messages go 1, 2, 3 and 4 links one way and 1, 2, 3 the other, so a link onwards carries
        # 10 of size / 8 at half the bandwidth, where the closed form has 7 of size / 8 at all of it.
        transfer_s *= 10 / 3.5
    assert took_s == pytest.approx(transfer_s, rel=1e-12)


def test_latency_of_the_way_is_added() -> None:
    cluster = preset_cluster("dgx-h100x1")
    alone_s = cluster.levels[0].latency_s.value
    assert alone_s > 0
    assert seconds(network_of(cluster), [(0, 1, 4.5 * GB)]) == pytest.approx(alone_s + 0.01, rel=1e-12)


def test_one_rank_a_node_takes_the_closed_form_too() -> None:
    # 4 nodes, one rank in each: each sends 3/4 of 8 GB over its card of 50 GB/s: 120 ms.
    cluster = still(preset_cluster("dgx-h100x4"))
    network = network_of(cluster)
    took_s = seconds(network, collective_flows(network, [0, 8, 16, 24], Collective.ALL_GATHER, 8 * GB))
    closed = collective_time(Collective.ALL_GATHER, group(4, 1, 4), 8 * GB, wires(cluster.levels))
    assert took_s == pytest.approx(0.12, rel=1e-12)
    assert took_s == pytest.approx(closed.transfer_s, rel=1e-12)


def test_two_whole_nodes_use_all_their_cards() -> None:
    # 16 ranks, 16 GB: 15 GB to the successors, in 8 rings of 1.875 GB. In each ring another device leaves the node:
    # 1.875 GB / 50 GB/s = 37.5 ms on every card; 7 rings inside: 13.125 GB / 450 GB/s = 29.2 ms.
    network = network_of(still(preset_cluster("dgx-h100x2")))
    flows = collective_flows(network, range(16), Collective.ALL_GATHER, 16 * GB)
    assert len(flows) == 8 * 16
    ends = send(network, flows).end_N
    crosses = np.array([one // 8 != other // 8 for one, other, _ in flows])
    assert crosses.sum() == 16
    assert ends[crosses] == pytest.approx(0.0375, rel=1e-12)
    assert ends[~crosses].max() == pytest.approx(13.125 / 450, rel=1e-12)


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(IN_RINGS))
@settings(deadline=None, max_examples=40)
def test_rings_visit_every_rank_once(per_node: int, num_nodes: int, collective: Collective) -> None:
    """All send the same in all, (n-1)/n of the size or twice that, and each ring is one circle over all ranks."""
    network = LevelNetwork(20, (level(4, 1, LinkKind.SWITCH), level(20, 1, LinkKind.SWITCH)))
    ranks = [4 * node + local for local in range(per_node) for node in range(num_nodes)]  # nodes interleaved
    flows = collective_flows(network, ranks, collective, 1.0)
    n = len(ranks)
    if n == 1:
        assert flows == []
        return
    sent = {rank: sum(size for one, _, size in flows if one == rank) for rank in ranks}
    share = (2 if collective is Collective.ALL_REDUCE else 1) * (n - 1) / n
    assert list(sent.values()) == pytest.approx([share] * n, rel=1e-12)
    for first in range(0, len(flows), n):
        ring = flows[first : first + n]
        assert sorted(one for one, _, _ in ring) == sorted(ranks)
        assert [other for _, other, _ in ring] == [one for one, _, _ in (*ring[1:], ring[0])]
        crossings = sum(one // 4 != other // 4 for one, other, _ in ring)
        assert crossings == (num_nodes if num_nodes > 1 else 0)  # ranks of a node are neighbours


def test_a_slice_costs_nothing() -> None:
    assert collective_flows(network_of(preset_cluster("dgx-h100x1")), range(8), Collective.SLICE, GB) == []


# --- contention -------------------------------------------------------------------------------------------------------


def test_an_oversubscribed_level_binds_when_all_send() -> None:
    # 4 nodes of 8 cards of 50 GB/s, 4-fold oversubscribed: 32 x 50 / 4 = 400 GB/s for all. 5 GB each: 100 ms alone and
    # for one node's 8 devices (400 GB/s), 400 ms where all 32 send.
    cluster = still(preset_cluster("dgx-h100x4"))
    inner, outer = cluster.levels
    thin = dataclasses.replace(cluster, levels=(inner, dataclasses.replace(outer, oversubscription=4.0)))
    network = network_of(thin)
    to_next = [(rank, (rank + 8) % 32, 5 * GB) for rank in range(32)]
    assert seconds(network, to_next[:1]) == pytest.approx(0.1, rel=1e-12)
    assert seconds(network, to_next[:8]) == pytest.approx(0.1, rel=1e-12)
    assert seconds(network, to_next) == pytest.approx(0.4, rel=1e-12)
    assert seconds(network_of(cluster), to_next) == pytest.approx(0.1, rel=1e-12)


def test_an_oversubscribed_leaf_slows_its_own_hosts_only() -> None:
    # 4 leaves of 4 hosts at 10 GB/s, uplinks of 4 x 10 / 4 = 10 GB/s. 1 GB: 0.1 s alone or one from each leaf, 0.4 s
    # where a whole leaf sends; under one leaf never slowed.
    network = network_of(fat_tree(4, 4, 10 * GB, 4))
    away = [(host, (host + 4) % 16, GB) for host in range(16)]
    assert seconds(network, away[:1]) == pytest.approx(0.1, rel=1e-12)
    assert seconds(network, away[::4]) == pytest.approx(0.1, rel=1e-12)
    assert seconds(network, away) == pytest.approx(0.4, rel=1e-12)
    both = send(network, [*away[:4], *[(host, 12 + (host + 1) % 4, GB) for host in range(12, 16)]]).end_N
    assert both.tolist() == pytest.approx([0.4] * 4 + [0.1] * 4, rel=1e-12)


def test_a_torus_all_reduce_goes_both_ways_round() -> None:
    # 4 x 4, links of 25 GB/s per direction. An all-reduce of 10 GB over a row of 4: 2 x 3/4 x 10 = 15 GB to neighbours,
    # half either way: 7.5 GB / 25 GB/s = 0.3 s. Rows and columns have links of their own: all eight at once take 0.3 s.
    network = network_of(torus(4, 4, 25 * GB))
    rows = [range(4 * row, 4 * row + 4) for row in range(4)]
    columns = [range(column, 16, 4) for column in range(4)]
    one = collective_flows(network, rows[0], Collective.ALL_REDUCE, 10 * GB)
    assert seconds(network, one) == pytest.approx(0.3, rel=1e-12)
    every = [f for ranks in (*rows, *columns) for f in collective_flows(network, ranks, Collective.ALL_REDUCE, 10 * GB)]
    assert len(every) == 8 * 8
    assert seconds(network, every) == pytest.approx(0.3, rel=1e-12)
    # One way only, the same bytes take twice as long.
    onwards = [(rank, (rank + 1) % 4, 15 * GB) for rank in range(4)]
    assert seconds(network, onwards) == pytest.approx(0.6, rel=1e-12)


def test_devices_under_a_pcie_switch_share_its_way_to_the_root() -> None:
    # Two switches of 4, 16 GB/s a link, 4 GB each: 0.25 s inside a switch and for one message across; 1 s where all 4
    # of a switch send across, and those the other way don't disturb them.
    network = network_of(pcie_tree(2, 4, 16 * GB))
    across = [(rank, rank + 4, 4 * GB) for rank in range(4)]
    back = [(rank + 4, rank, 4 * GB) for rank in range(4)]
    assert seconds(network, [(0, 1, 4 * GB), (2, 3, 4 * GB)]) == pytest.approx(0.25, rel=1e-12)
    assert seconds(network, across[:1]) == pytest.approx(0.25, rel=1e-12)
    assert seconds(network, across + back) == pytest.approx(1.0, rel=1e-12)
    # A ring over all eight crosses the root once each way: (7/8 x 8 GB) / 16 GB/s as if there were no tree.
    ring = collective_flows(network, range(8), Collective.ALL_GATHER, 8 * GB)
    assert seconds(network, ring) == pytest.approx(7 / 16, rel=1e-12)


def test_rings_of_two_jobs_on_one_rail_slow_each_other() -> None:
    # 2 pods of 2 nodes of 2 devices, cards of 10 GB/s, rails with one card's width to the spine (2 x 10 / 2). Ranks 0
    # and 2 are on rail 0 of pod 0, 4 and 6 on that of pod 1; 1, 3, 5, 7 on rail 1. A ring over the pods, 2 GB: 1 GB
    # each way: 0.1 s alone, 0.2 s beside another on its rail, 0.1 s beside one on the other rail.
    network = network_of(rails(2, 2, 2, 10 * GB, 2))
    one, same_rail, other_rail = (
        collective_flows(network, ranks, Collective.ALL_GATHER, 2 * GB) for ranks in ([0, 4], [2, 6], [3, 7])
    )
    assert names(network, 0, 4) == ["0 to pod0rail0", "pod0rail0 to spine", "spine to pod1rail0", "pod1rail0 to 4"]
    assert seconds(network, one) == pytest.approx(0.1, rel=1e-12)
    assert send(network, one + same_rail).end_N == pytest.approx([0.2] * 4, rel=1e-12)
    assert send(network, one + other_rail).end_N == pytest.approx([0.1] * 4, rel=1e-12)


def test_rings_keep_to_their_rails() -> None:
    network = network_of(rails(1, 4, 4, 10 * GB, 4))
    flows = collective_flows(network, range(16), Collective.ALL_GATHER, 16 * GB)
    used = {name for one, other, _ in flows for name in names(network, one, other)}
    assert not [name for name in used if "spine" in name]
    assert {one % 4 - other % 4 for one, other, _ in flows if one // 4 != other // 4} == {0}
    # 4 rings of 15 / 4 GB, one out of each card: 0.375 s.
    assert seconds(network, flows) == pytest.approx(0.375, rel=1e-12)


# --- routes -----------------------------------------------------------------------------------------------------------


def test_routes_over_levels() -> None:
    network = network_of(
        levelled(level(4, 40, LinkKind.RING), level(16, 6, LinkKind.MESH), level(32, 2, LinkKind.SWITCH))
    )
    assert network.route(3, 3) == ((), 0.0)
    assert names(network, 0, 1) == ["ring 0 to 1"]
    assert names(network, 1, 3) == ["ring 1 to 2", "ring 2 to 3"]  # of two equal ways round, onwards
    assert names(network, 0, 3) == ["ring 0 to 3"]
    assert names(network, 2, 13) == ["mesh 2 to 14", "ring 14 to 13"]
    assert names(network, 2, 31) == ["switch out of 2", "switch into 31"]
    capacity = dict(zip(network.names_L, network.capacity_L.tolist(), strict=True))
    assert len(capacity) == len(network.names_L) == 32 * (2 + 3 + 2)
    assert (capacity["ring 5 to 6"], capacity["mesh 2 to 14"], capacity["switch out of 2"]) == (20.0, 2.0, 2.0)


def test_a_ring_of_two_has_all_the_bandwidth() -> None:
    network = network_of(levelled(level(2, 40, LinkKind.RING)))
    assert seconds(network, [(0, 1, 40.0), (1, 0, 20.0)]) == 1.0


def test_two_ring_levels_are_a_torus() -> None:
    by_levels = network_of(levelled(level(5, 2, LinkKind.RING), level(20, 2, LinkKind.RING)))
    by_links = network_of(torus(4, 5, 1))
    for source, target in product(range(20), range(20)):
        assert len(by_levels.route(source, target)[0]) == len(by_links.route(source, target)[0])
    assert by_levels.capacity_L.tolist() == by_links.capacity_L.tolist() == [1.0] * 80


@st.composite
def graphs(draw: st.DrawFn) -> Cluster:
    """Up to 8 devices and 4 switches in one piece; a few latencies, so that ways of as many hops differ or tie."""
    num_devices, num_switches = draw(st.integers(2, 8)), draw(st.integers(0, 4))
    size = num_devices + num_switches
    vertices = [*(str(rank) for rank in range(num_devices)), *(f"s{switch}" for switch in range(num_switches))]
    pairs = [(draw(st.integers(0, vertex - 1)), vertex) for vertex in range(1, size)]
    pairs += draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=12))
    links = tuple(
        Link(vertices[one], vertices[other], quantity(1.0), quantity(draw(st.sampled_from([1.0, 2.0, 4.0]))))
        for one, other in pairs
        if one != other
    )
    return Cluster("random", (DeviceGroup(GPU, num_devices),), (), tuple(vertices), links)


@given(graphs())
@settings(deadline=None)
def test_routes_over_graphs_are_the_shortest(cluster: Cluster) -> None:
    """Against all pairs worked out by relaxation: fewest hops, then least latency, then the smallest vertices."""
    network = network_of(cluster)
    assert isinstance(network, GraphNetwork)
    size = len(cluster.vertices)
    best = {(vertex, vertex): (0, 0.0, (vertex,)) for vertex in range(size)}
    for _ in range(size):
        for (middle, end), (hops, latency_s, way) in list(best.items()):
            for vertex, (_, seconds_) in network.neighbours[middle].items():
                candidate = (hops + 1, latency_s + seconds_, (vertex, *way))
                best[vertex, end] = min(best.get((vertex, end), candidate), candidate)
    for source, target in product(range(cluster.num_devices), repeat=2):
        resources, latency_s = network.route(source, target)
        hops, expected_s, way = best[source, target]
        assert (len(resources), latency_s) == (hops, expected_s)
        assert tuple(network.ends_L[resource] for resource in resources) == tuple(pairwise(way))


def test_parallel_links_add_up_and_directions_are_apart() -> None:
    network = network_of(graph(2, [], ("0", "1", 3.0), ("1", "0", 2.0)))
    assert network.names_L == ("0 to 1", "1 to 0")
    assert network.capacity_L.tolist() == [5.0, 5.0]
    assert send(network, [(0, 1, 10.0), (1, 0, 5.0)]).end_N.tolist() == [2.0, 1.0]


def test_routes_are_found_when_asked_for() -> None:
    """16,384 devices: a ring over all of them looks for 16,384 routes, not for 268 million."""
    network = network_of(fat_tree(512, 32, 10 * GB, 1))
    assert isinstance(network, GraphNetwork)
    ring = [(rank, (rank + 1) % 16384, GB) for rank in range(16384)]
    assert seconds(network, ring) == pytest.approx(0.1, rel=1e-9)
    assert network._kept_route.cache_info().currsize == 16384
    levels = network_of(still(preset_cluster("dgx-h100x2048")))
    assert len(levels.capacity_L) == 4 * 16384
    assert seconds(levels, ring) == pytest.approx(1 / 50, rel=1e-9)


# --- input ------------------------------------------------------------------------------------------------------------


def errors(call: object, *arguments: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value).splitlines()


def test_ranks_that_cannot_reach_each_other_are_named() -> None:
    network = network_of(graph(4, ["a", "b"], ("0", "a", 1.0), ("1", "a", 1.0), ("2", "b", 1.0), ("3", "b", 1.0)))
    assert names(network, 0, 1) == ["0 to a", "a to 1"]
    assert errors(network.route, 1, 2) == [
        "route = 1 to 2: no path of links joins the two (nearest: a link between a and b)"
    ]
    lonely = network_of(graph(2, []))
    assert errors(lonely.route, 0, 1) == [
        "route = 0 to 1: no path of links joins the two (nearest: a link between 0 and 1)"
    ]
    flows = (lonely, [0, 1], Collective.ALL_GATHER, 1.0)
    assert errors(collective_flows, *flows) == ["links = 0 links: join no two devices"]


def test_links_that_are_none_are_all_named() -> None:
    wrong = graph(3, ["a", "a"], ("0", "aa", 1.0), ("1", "1", 0.0))
    late = Link("2", "a", quantity(float("inf")), quantity(-1.0))
    short = dataclasses.replace(wrong, groups=(DeviceGroup(GPU, 6),), links=(*wrong.links, late))
    assert errors(network_of, short) == [
        "vertices = 5 names: the first 6 vertices are the devices, so there must be at least as many",
        "vertices[4] = a: is named twice",
        "links[0].target = aa: is not among the vertices (nearest: a)",
        "links[1] = 1: joins a vertex to itself",
        "links[1].bandwidth_Bps = 0.0: must be positive and finite",
        "links[2].bandwidth_Bps = inf: must be positive and finite",
        "links[2].latency_s = -1.0: must be finite and not negative",
    ]
    assert errors(network_of, levelled(level(4, 0.0, LinkKind.SWITCH))) == [
        "levels[0].bandwidth_Bps = 0.0: must be positive and finite"
    ]
    huge = levelled(level(20_000, 1.0, LinkKind.MESH))
    assert errors(network_of, huge) == [
        "levels = levels: makes 399,980,000 links; 100,000,000 at most (nearest: kind switch instead of mesh)"
    ]


def test_ranks_and_sizes_are_checked() -> None:
    network = network_of(preset_cluster("dgx-h100x1"))
    assert errors(network.route, 0, 8) == ["route = 8: ranks are 0 to 7 (nearest: 7)"]
    assert errors(collective_flows, network, [0, -1, 9], Collective.ALL_GATHER, 1.0) == [
        "ranks = -1: ranks are 0 to 7 (nearest: 0)",
        "ranks = 9: ranks are 0 to 7 (nearest: 7)",
    ]
    assert errors(collective_flows, network, [0, 1, 0], Collective.ALL_GATHER, -1.0) == [
        "ranks = 0: stands twice",
        "size_bytes = -1.0: must be finite and not negative",
    ]
