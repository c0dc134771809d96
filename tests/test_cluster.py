"""Clusters: presets and their numbers, validation, graphs worked by hand, unlike device groups."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwright
from meshwright.cluster import (
    Cluster,
    Device,
    DeviceGroup,
    Level,
    Link,
    LinkKind,
    Quantity,
    cluster_problems,
    cluster_templates,
    preset_cluster,
    preset_names,
)
from meshwright.errors import InputError

DEVICES_PER_UNIT = {"dgx2": 16, "trainium1": 32, "gb200-nvl72": 72, "gb300-nvl72": 72, "local-cpu": 1}
DEVICES_PER_UNIT |= {f"tpu-{version}": 1 for version in ("v3", "v4", "v5e", "v5p")}

EXPECTED_NAMES = [
    "ascend-910b",
    "dgx-a100",
    "dgx-a100-40g",
    "dgx-b200",
    "dgx-b300",
    "dgx-h100",
    "dgx-h200",
    "dgx-v100",
    "dgx2",
    "gaudi2",
    "gb200-nvl72",
    "gb300-nvl72",
    "local-cpu",
    "mi300x",
    "pcie-2080ti",
    "tpu-v3",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "trainium1",
]


def quantity(value: float) -> Quantity:
    return Quantity(value, "[derived] test")


def device(name: str = "gpu", **peaks: float) -> Device:
    peak_flops = {dtype: quantity(peak) for dtype, peak in (peaks or {"float32": 1e12}).items()}
    return Device(name, peak_flops, quantity(16e9), quantity(1e12))


def link(source: str, target: str, bandwidth: float, latency: float = 1e-6) -> Link:
    return Link(source, target, quantity(bandwidth), quantity(latency))


def graph(num_devices: int, switches: str, *links: Link) -> Cluster:
    vertices = (*(str(rank) for rank in range(num_devices)), *switches.split())
    return Cluster("graph", (DeviceGroup(device(), num_devices),), (), vertices, links)


def shape(cluster: Cluster) -> list[tuple[int, float]]:
    return [(level.group_size, level.bandwidth_Bps.value) for level in cluster.hierarchy()]


def preset_error(text: str) -> str:
    with pytest.raises(InputError) as caught:
        preset_cluster(text)
    return str(caught.value)


# --- presets


def test_all_presets_are_there() -> None:
    assert list(preset_names()) == EXPECTED_NAMES == list(cluster_templates())


@pytest.mark.parametrize("name", EXPECTED_NAMES)
@pytest.mark.parametrize("num_units", [1, 2, 64])
def test_preset_has_its_devices_and_is_valid(name: str, num_units: int) -> None:
    cluster = preset_cluster(f"{name}x{num_units}")
    per_unit = DEVICES_PER_UNIT.get(name, 8)
    assert cluster.name == f"{name}x{num_units}"
    assert cluster.num_devices == num_units * per_unit
    assert cluster_problems(cluster) == []
    assert cluster.hierarchy() == cluster.levels
    if num_units == 1:
        assert len(cluster.levels) == 1, "a single node has no network"
    elif per_unit > 1:
        assert [level.group_size for level in cluster.levels] == [per_unit, per_unit * num_units]


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("dgx-v100", "float16", 125e12),
        ("dgx2", "float16", 125e12),
        ("dgx-a100", "bfloat16", 312e12),
        ("dgx-a100", "tf32", 156e12),
        ("dgx-h100", "bfloat16", 989e12),
        ("dgx-h100", "float8", 1979e12),
        ("dgx-b200", "bfloat16", 2250e12),
        ("gb200-nvl72", "bfloat16", 2500e12),
        ("tpu-v3", "bfloat16", 123e12),
        ("tpu-v4", "bfloat16", 275e12),
        ("tpu-v5e", "bfloat16", 197e12),
        ("tpu-v5p", "bfloat16", 459e12),
        ("mi300x", "bfloat16", 1307e12),
        ("trainium1", "bfloat16", 95e12),  # a NeuronCore: half of a Trainium's 190
        ("gaudi2", "bfloat16", 432e12),
    ],
)
def test_peaks_are_dense(name: str, dtype: str, peak: float) -> None:
    device = cluster_templates()[name].device
    assert device.peak_flops[dtype].value == pytest.approx(peak, rel=1e-3)


def test_narrower_floats_are_never_slower() -> None:
    order = ("float32", "tf32", "bfloat16", "float8", "float4")
    for template in cluster_templates().values():
        peaks = [template.device.peak_flops[dtype].value for dtype in order if dtype in template.device.peak_flops]
        assert peaks == sorted(peaks), template.name


@pytest.mark.parametrize(
    ("name", "bandwidths"),
    [
        ("dgx-a100", [300e9, 25e9]),  # NVLink 3: 600 GB/s both ways; HDR 200 Gb/s per GPU
        ("dgx-h100", [450e9, 50e9]),  # NVLink 4: 900 GB/s both ways; NDR 400 Gb/s per GPU
        ("gb200-nvl72", [900e9, 50e9]),  # NVLink 5: 1.8 TB/s both ways
        ("dgx2", [150e9, 6.25e9]),  # 8 x 100 Gb/s over 16 GPUs
    ],
)
def test_bandwidth_is_per_device_and_direction(name: str, bandwidths: list[float]) -> None:
    assert [level.bandwidth_Bps.value for level in preset_cluster(f"{name}x2").levels] == bandwidths


def test_every_number_names_a_tagged_source() -> None:
    folder = Path(meshwright.__file__).parent / "data" / "clusters"

    def sources(node: object) -> list[str]:
        if isinstance(node, list):
            return [source for item in node for source in sources(item)]
        if isinstance(node, dict):
            if "value" in node:
                assert set(node) == {"value", "source"}
                return [node["source"]]
            return [source for item in node.values() for source in sources(item)]
        return []

    for path in sorted(folder.glob("*.json")):
        found = sources(json.loads(path.read_text()))
        assert len(found) >= 5, path.name
        for source in found:
            assert source.startswith(("[spec] ", "[measured] ", "[derived] ", "[fit: ")), (path.name, source)
            assert len(source) > 15, (path.name, source)


def test_pods_are_equal_and_joined_by_the_network() -> None:
    # PaLM: 6144 chips are more than a pod of 4096, so 2 of 3072; Gopher: 4 pods of 1024 TPU v3.
    assert [level.group_size for level in preset_cluster("tpu-v4x6144").levels] == [3072, 6144]
    assert [level.group_size for level in preset_cluster("tpu-v3x4096").levels] == [1024, 4096]
    assert [level.group_size for level in preset_cluster("tpu-v4x4096").levels] == [4096]


@given(st.sampled_from(["tpu-v5e", "tpu-v4", "dgx-h100", "local-cpu"]), st.integers(1, 20_000))
def test_any_size_is_valid_or_has_a_valid_nearest(name: str, num_units: int) -> None:
    template = cluster_templates()[name]
    try:
        cluster = template.cluster(num_units)
    except InputError as error:
        nearest = error.problems[0].nearest
        assert nearest is not None
        cluster = preset_cluster(nearest)
    assert cluster_problems(cluster) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dgx-h10x8", ["'dgx-h10' is no preset", *EXPECTED_NAMES, "(nearest: dgx-h100x8)"]),
        ("DGX-A100x4", ["'DGX-A100' is no preset", "(nearest: dgx-a100x4)"]),
        ("zzzzz", ["cluster = zzzzz: 'zzzzz' is no preset", "dgx-h100"]),
        ("", ["is no preset"]),
        ("dgx-h100", ["how many nodes? dgx-h100 needs xN after its name (nearest: dgx-h100x1)"]),
        ("gb200-nvl72", ["how many racks?", "(nearest: gb200-nvl72x1)"]),
        ("tpu-v4x", ["how many chips?", "(nearest: tpu-v4x1)"]),
        ("mi300x8", ["follow the whole name mi300x (nearest: mi300xx8)"]),
        ("dgx-h100x0", ["dgx-h100x0: the number of nodes must be 1 or more (nearest: dgx-h100x1)"]),
        ("local-cpux-2", ["the number of processes must be 1 or more (nearest: local-cpux1)"]),
        ("dgx-h100xmany", ["'many' is no whole number of nodes (nearest: dgx-h100x1)"]),
        ("dgx-h100x1.5", ["'1.5' is no whole number of nodes"]),
        ("dgx-h100x1250001", ["more than 10,000,000 devices (nearest: dgx-h100x1250000)"]),
        ("dgx-h100x" + "9" * 9000, ["99...: more than 10,000,000 devices (nearest: dgx-h100x1250000)"]),
        ("tpu-v4x4099", ["equal, fairly full groups of at most 4096 (ici-3d-torus) (nearest: tpu-v4x4100)"]),
    ],
)
def test_preset_errors_say_what_to_do(text: str, parts: list[str]) -> None:
    message = preset_error(text)
    for part in parts:
        assert part in message
    assert len(message) < 700


# --- unlike groups


def test_slowest_device_is_the_worst_of_each_quantity() -> None:
    fast = Device("fast", {"float32": quantity(2e12), "bfloat16": quantity(9e12)}, quantity(8e9), quantity(2e12))
    slow = Device("slow", {"float32": quantity(1e12)}, quantity(16e9), quantity(1e12), quantity(5e-6))
    cluster = Cluster("mixed", (DeviceGroup(fast, 4), DeviceGroup(slow, 2)))
    worst = cluster.slowest_device
    assert cluster.num_devices == 6
    assert worst.name == "slowest of fast, slow"
    assert {dtype: peak.value for dtype, peak in worst.peak_flops.items()} == {"float32": 1e12}
    assert (worst.memory_bytes.value, worst.memory_bandwidth_Bps.value) == (8e9, 1e12)
    assert worst.host_launch_s == quantity(5e-6)


def test_slowest_device_of_equal_groups_is_the_device() -> None:
    one = device()
    assert Cluster("same", (DeviceGroup(one, 4), DeviceGroup(one, 2))).slowest_device is one
    throttled = dataclasses.replace(one, peak_flops={"float32": quantity(5e11)})  # the same name, another speed
    mixed = Cluster("throttled", (DeviceGroup(throttled, 4), DeviceGroup(one, 2)))
    assert mixed.slowest_device.peak_flops["float32"].value == 5e11


# --- validation


def test_all_problems_are_named_at_once() -> None:
    bad_device = Device("bad", {"float23": quantity(math.nan)}, Quantity(0.0, " "), quantity(-1.0), quantity(math.inf))
    levels = (
        Level("a", 4, quantity(1e9), quantity(-1e-6), LinkKind.SWITCH, 0.5),
        Level("b", 4, quantity(0.0), quantity(0.0), LinkKind.SWITCH),
        Level("c", 10, quantity(1e9), quantity(1e-6), LinkKind.SWITCH),
    )
    cluster = Cluster("bad", (DeviceGroup(bad_device, 8), DeviceGroup(device(), 0)), levels)
    assert [(problem.where, problem.value) for problem in cluster_problems(cluster)] == [
        ("groups[0].device.peak_flops.float23", "nan"),
        ("groups[0].device.memory_bytes", "0.0"),
        ("groups[0].device.memory_bytes.source", "''"),
        ("groups[0].device.memory_bandwidth_Bps", "-1.0"),
        ("groups[0].device.host_launch_s", "inf"),
        ("levels[0].latency_s", "-1e-06"),
        ("levels[1].bandwidth_Bps", "0.0"),
        ("groups[0].device.peak_flops", "float23"),
        ("groups[1].count", "0"),
        ("levels[0].oversubscription", "0.5"),
        ("levels[1].group_size", "4"),
        ("levels[2].group_size", "10"),
        ("levels[2].group_size", "10"),
    ]


def test_level_messages() -> None:
    levels = (
        Level("node", 8, quantity(1e9), quantity(1e-6), LinkKind.SWITCH),
        Level("net", 12, quantity(1e9), quantity(1e-6), LinkKind.SWITCH),
    )
    problems = cluster_problems(Cluster("bad", (DeviceGroup(device(), 16),), levels))
    assert [str(problem) for problem in problems] == [
        "levels[1].group_size = 12: must be a multiple of the 8 of the level below (nearest: 16)",
        "levels[1].group_size = 12: the last level joins all 16 devices (nearest: 16)",
    ]


def test_neither_or_both_of_levels_and_links() -> None:
    groups = (DeviceGroup(device(), 2),)
    level = Level("net", 2, quantity(1e9), quantity(1e-6), LinkKind.SWITCH)
    neither, both = Cluster("a", groups), Cluster("b", groups, (level,), ("0", "1"), (link("0", "1", 1e9),))
    assert [problem.rule for problem in cluster_problems(neither)] == [
        "give levels, or vertices and links; both are missing"
    ]
    assert [problem.rule for problem in cluster_problems(both)] == ["give levels, or vertices and links, not both"]


def test_graph_problems_are_named_at_once() -> None:
    cluster = graph(3, "sw1 sw1", link("0", "sw2", 1e9), link("1", "1", math.nan))
    assert [str(problem) for problem in cluster_problems(cluster)] == [
        "links[1].bandwidth_Bps = nan: must be positive and finite",
        "vertices[4] = sw1: is named twice",
        "links[0].target = sw2: is not among the vertices (nearest: sw1)",
        "links[1] = 1: joins a vertex to itself",
    ]
    few = dataclasses.replace(graph(2, ""), vertices=("0",))
    assert "there must be at least as many" in str(cluster_problems(few)[0])


def test_unreachable_devices_are_named() -> None:
    problems = cluster_problems(graph(4, "sw", link("0", "sw", 1e9), link("1", "sw", 1e9), link("2", "3", 1e9)))
    assert [str(problem) for problem in problems] == ["links = 2, 3: no path from device 0"]


def test_groups_of_a_graph_are_consecutive() -> None:
    problems = cluster_problems(graph(3, "", link("0", "2", 9e9), link("1", "2", 1e9)))
    assert [str(problem) for problem in problems] == [
        "vertices = 0, 2: joined at 9e+09 B/s but not consecutive: list a group's devices side by side"
    ]


# --- graphs worked by hand


def two_nodes(uplink: float, per_device: bool) -> Cluster:
    """Ranks 0-3 on switch s0, 4-7 on s1, 100 B/s each; out through one NIC per device or one uplink per node."""
    cables = [link(str(rank), f"s{rank // 4}", 100.0, 2e-6) for rank in range(8)]
    ends = [str(rank) for rank in range(8)] if per_device else ["s0", "s1"]
    return graph(8, "s0 s1 top", *cables, *(link(end, "top", uplink, 5e-6) for end in ends))


def test_two_nodes_with_a_network_card_per_device() -> None:
    # In the node: 100 B/s, 2 + 2 us through the switch. Between: 4 cards x 10 over 4 devices; 5 + 5 us through the top.
    cluster = two_nodes(10.0, per_device=True)
    assert cluster_problems(cluster) == []
    assert shape(cluster) == [(4, 100.0), (8, 10.0)]
    assert [level.latency_s.value for level in cluster.hierarchy()] == pytest.approx([4e-6, 10e-6])
    assert {level.kind for level in cluster.hierarchy()} == {LinkKind.SWITCH}


def test_two_nodes_with_a_shared_uplink() -> None:
    # The widest path between nodes is 40 B/s, but four devices share it: 10 each. Latency 2 + 5 + 5 + 2 us.
    cluster = two_nodes(40.0, per_device=False)
    assert shape(cluster) == [(4, 100.0), (8, 10.0)]
    assert cluster.hierarchy()[1].latency_s.value == pytest.approx(14e-6)
    assert all(level.bandwidth_Bps.source.startswith("[derived]") for level in cluster.hierarchy())


def test_full_mesh_ring_and_chain() -> None:
    # Mesh of 4: three links of 10 each. Ring of 4: two links each, two hops to the far side. Chain: an end has one.
    mesh = graph(4, "", *(link(str(a), str(b), 10.0) for a in range(4) for b in range(a)))
    ring = graph(4, "", *(link(str(a), str((a + 1) % 4), 10.0) for a in range(4)))
    chain = graph(4, "", *(link(str(a), str(a + 1), 10.0) for a in range(3)))
    assert (shape(mesh), mesh.hierarchy()[0].kind) == ([(4, 30.0)], LinkKind.MESH)
    assert (shape(ring), ring.hierarchy()[0].kind) == ([(4, 20.0)], LinkKind.RING)
    assert (shape(chain), chain.hierarchy()[0].kind) == ([(4, 10.0)], LinkKind.OTHER)
    assert [c.hierarchy()[0].latency_s.value for c in (mesh, ring, chain)] == pytest.approx([1e-6, 2e-6, 3e-6])


def test_parallel_links_add_up_and_slow_ones_wait_for_their_level() -> None:
    # 0=1 twice 10; 1-2 with 5: pairs {0, 1} at 20, then all three at 5, of which the pair gets 2.5 each.
    cluster = graph(3, "", link("0", "1", 10.0), link("1", "0", 10.0), link("1", "2", 5.0))
    assert shape(cluster) == [(2, 20.0), (3, 2.5)]


def test_large_graph_is_quick() -> None:
    cables = [link(str(rank), f"s{rank // 8}", 450e9) for rank in range(4096)]
    cards = [link(str(rank), "top", 50e9) for rank in range(4096)]
    cluster = graph(4096, " ".join(f"s{node}" for node in range(512)) + " top", *cables, *cards)
    assert shape(cluster) == [(8, 450e9), (4096, 50e9)]
