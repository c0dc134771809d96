"""The devices and the links between them, every number with its source.

A `Cluster` is a row of ranks (`groups`) joined either by a hierarchy (`levels`: NVLink inside the node, InfiniBand
above it) or by a graph (`vertices` and `links`). Cost formulas read levels; `Cluster.hierarchy` derives them from a
graph. Presets are machine templates in `data/clusters`, from which `preset_cluster("dgx-h100x8")` builds a cluster.

All numbers are nominal: dense peaks, bandwidth per direction. What software gets out of them belongs to `engine` and
`cost`. Left out: routing and congestion inside a level other than its oversubscription.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name

#: The names under which a device states a dense peak; integer operations count as FLOPs too.
PEAK_DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8", "float4", "int8")

#: More devices than this in one cluster is taken for a slip of the finger.
MAX_DEVICES = 10**7

#: Hardware numbers lie well between this and one over it; beyond, times and their sums would not be finite.
SMALLEST_QUANTITY = 1e-30


class LinkKind(StrEnum):
    """How the devices of a level are wired; collectives and point-to-point differ by it."""

    SWITCH = "switch"
    RING = "ring"
    TORUS = "torus"
    MESH = "mesh"  # every device has a link to every other
    PCIE = "pcie"
    ETHERNET = "ethernet"
    SHARED_MEMORY = "shared_memory"
    OTHER = "other"


@dataclass(frozen=True)
class Quantity:
    """A hardware number, in the SI base unit that the field holding it names, and where it is from.

    `source` starts with a tag: `[spec] NVIDIA A100 datasheet`, `[measured] ...`, `[derived] ...` or `[fit: data set]`.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Device:
    """One accelerator: what a rank computes with.

    `peak_flops` is the dense peak in FLOP/s by dtype name, tensor cores included, never the sparse figure; a dtype that
    the device lacks is absent. `memory_bytes` is the capacity, `memory_bandwidth_Bps` its bandwidth in B/s, and
    `host_launch_s` the time in seconds that the host takes to start one operation, None where unknown. `efficiency`
    is the share of nominal that good software reaches: of the peak in deep `matmul`s and in fused `attention`, of the
    bandwidth in `memory`-bound kernels; where one is absent a generic value is used (see `cost.compute`).
    """

    name: str
    peak_flops: dict[str, Quantity]
    memory_bytes: Quantity
    memory_bandwidth_Bps: Quantity
    host_launch_s: Quantity | None = None
    efficiency: dict[str, Quantity] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceGroup:
    """`count` equal devices with consecutive ranks; the groups of a cluster follow each other in rank order."""

    device: Device
    count: int


@dataclass(frozen=True)
class Level:
    """One level of the hierarchy, joining `group_size` consecutive ranks.

    `bandwidth_Bps` is what one device sends in one direction, in B/s, over all its links of this level while the others
    do the same; `latency_s` is one small message between two devices, in seconds. Where switches are thinned out by a
    factor, `oversubscription` (1 or more) divides the bandwidth of traffic that uses the whole level.
    """

    name: str
    group_size: int
    bandwidth_Bps: Quantity
    latency_s: Quantity
    kind: LinkKind
    oversubscription: float = 1.0


@dataclass(frozen=True)
class Link:
    """A cable between two vertices of a graph cluster; both directions have the same speed.

    `bandwidth_Bps` is per direction, in B/s; `latency_s` is in seconds. Links between the same two vertices add up.
    """

    source: str
    target: str
    bandwidth_Bps: Quantity
    latency_s: Quantity


@dataclass(frozen=True)
class Cluster:
    """Device groups and how they are joined: by `levels` or by `vertices` and `links`, not both.

    Of the vertices the first `num_devices` are the devices in rank order, whatever their names; the rest are switches.
    Nothing is checked here: `cluster_problems` names all that is wrong.

    >>> cluster = preset_cluster("dgx-h100x4")
    >>> cluster.num_devices, [(level.name, level.group_size) for level in cluster.levels]
    (32, [('nvlink4', 8), ('infiniband-ndr', 32)])
    """

    name: str
    groups: tuple[DeviceGroup, ...]
    levels: tuple[Level, ...] = ()
    vertices: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def num_devices(self) -> int:
        """Devices in all groups; ranks are 0 to `num_devices` - 1."""
        return sum(group.count for group in self.groups)

    @property
    def slowest_device(self) -> Device:
        """The device that a synchronous, uniform strategy waits for: quantity by quantity the worst of the groups.

        With unlike groups it may be a device that doesn't exist (the slow arithmetic of one, the small memory of
        another). A dtype counts only where every group has it.
        """
        devices = [group.device for group in self.groups]
        if all(device == devices[0] for device in devices):
            return devices[0]
        shared = [dtype for dtype in devices[0].peak_flops if all(dtype in device.peak_flops for device in devices)]
        launches = [device.host_launch_s for device in devices if device.host_launch_s is not None]
        return Device(
            name="slowest of " + ", ".join(dict.fromkeys(device.name for device in devices)),
            peak_flops={dtype: _least(device.peak_flops[dtype] for device in devices) for dtype in shared},
            memory_bytes=_least(device.memory_bytes for device in devices),
            memory_bandwidth_Bps=_least(device.memory_bandwidth_Bps for device in devices),
            host_launch_s=max(launches, key=lambda quantity: quantity.value, default=None),
            efficiency={
                name: _least(device.efficiency[name] for device in devices)
                for name in devices[0].efficiency
                if all(name in device.efficiency for device in devices)
            },
        )

    def hierarchy(self) -> tuple[Level, ...]:
        """Levels, innermost first: as given or, for a graph, derived from its widest paths.

        Two devices belong to the same group of a level where some path between them has links of at least its width
        (single linkage; groups merge as in Kruskal's maximum spanning tree). Every width at which groups of devices
        merge makes a level:

        - `group_size` is the largest merged group. Where groups are unequal, sizes need not divide each other.
        - `bandwidth_Bps` is the least over the parts that merge of (links of that width leaving the part) / (devices in
          the part): what each device gets while all of them send. One uplink for eight devices gives an eighth each.
        - `latency_s` is that of the fastest path of such links from a group's first device to its farthest, the most
          over groups. Exact where all devices look alike (switches, rings, full meshes), at least half of the true
          value elsewhere.
        """
        return self.levels if self.levels else _derived_levels(self)


def _least(quantities: Iterable[Quantity]) -> Quantity:
    return min(quantities, key=lambda quantity: quantity.value)


# --- graph to hierarchy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edge:
    """All links between two vertices (by index) taken together."""

    ends: tuple[int, int]
    width_Bps: float
    latency_s: float


@dataclass(frozen=True)
class _Merge:
    """The groups at one width: each merged group of vertices with the parts that it had before."""

    width_Bps: float
    groups: list[tuple[list[int], list[list[int]]]]


def _edges(cluster: Cluster) -> list[_Edge]:
    index = {vertex: i for i, vertex in enumerate(cluster.vertices)}
    bundles: dict[tuple[int, int], list[Link]] = {}
    for link in cluster.links:
        low, high = sorted((index[link.source], index[link.target]))
        bundles.setdefault((low, high), []).append(link)
    return [
        _Edge(
            ends,
            math.fsum(link.bandwidth_Bps.value for link in bundle),
            max(link.latency_s.value for link in bundle),
        )
        for ends, bundle in sorted(bundles.items())
    ]


def _union_find(size: int) -> tuple[Callable[[int], int], Callable[[int, int], None]]:
    parent = list(range(size))

    def find(vertex: int) -> int:
        while parent[vertex] != vertex:
            parent[vertex] = parent[parent[vertex]]
            vertex = parent[vertex]
        return vertex

    def union(one: int, other: int) -> None:
        low, high = sorted((find(one), find(other)))
        parent[high] = low  # the smallest member leads, so groups come out in rank order

    return find, union


def _merges(cluster: Cluster) -> Iterator[_Merge]:
    """Widest first, each width at which groups that hold devices merge."""
    num_devices, num_vertices = cluster.num_devices, len(cluster.vertices)
    edges = _edges(cluster)
    find, union = _union_find(num_vertices)
    for width in sorted({edge.width_Bps for edge in edges}, reverse=True):
        before = [find(vertex) for vertex in range(num_vertices)]
        for edge in edges:
            if edge.width_Bps == width:
                union(*edge.ends)
        parts: dict[int, list[int]] = {}
        for vertex, leader in enumerate(before):
            parts.setdefault(leader, []).append(vertex)
        merged: dict[int, list[list[int]]] = {}
        for leader, part in parts.items():
            merged.setdefault(find(leader), []).append(part)
        groups = []
        for children in merged.values():
            senders = [part for part in children if part[0] < num_devices]  # parts of switches alone send nothing
            if len(senders) > 1:
                groups.append((sorted(vertex for part in children for vertex in part), senders))
        if groups:
            yield _Merge(width, groups)


def _derived_levels(cluster: Cluster) -> tuple[Level, ...]:
    edges = _edges(cluster)
    return tuple(
        _derived_level(number, merge, [edge for edge in edges if edge.width_Bps >= merge.width_Bps], cluster)
        for number, merge in enumerate(_merges(cluster))
    )


def _derived_level(number: int, merge: _Merge, edges: Sequence[_Edge], cluster: Cluster) -> Level:
    num_devices = cluster.num_devices
    source = f"[derived] from the links of {cluster.name} of at least {merge.width_Bps:g} B/s"
    groups = [group for group, _ in merge.groups]
    parts = [part for _, parts in merge.groups for part in parts]
    return Level(
        name=f"level{number}",
        group_size=max(_num_devices_in(group, num_devices) for group in groups),
        bandwidth_Bps=Quantity(
            min(
                cut_Bps / _num_devices_in(part, num_devices)
                for part, cut_Bps in zip(parts, _cuts_Bps(parts, edges), strict=True)
            ),
            source,
        ),
        latency_s=Quantity(max(_eccentricities_s(groups, edges, num_devices)), source),
        kind=_derived_kind(groups[0], edges, num_devices),
    )


def _num_devices_in(vertices: Iterable[int], num_devices: int) -> int:
    return sum(vertex < num_devices for vertex in vertices)


def _cuts_Bps(parts: Sequence[Sequence[int]], edges: Iterable[_Edge]) -> list[float]:
    """Width of all edges that leave each part."""
    part_of = {vertex: number for number, part in enumerate(parts) for vertex in part}
    cuts_Bps = [0.0] * len(parts)
    for edge in edges:
        one, other = (part_of.get(end) for end in edge.ends)
        if one != other:
            for number in (one, other):
                if number is not None:
                    cuts_Bps[number] += edge.width_Bps
    return cuts_Bps


def _eccentricities_s(groups: Iterable[Sequence[int]], edges: Iterable[_Edge], num_devices: int) -> Iterator[float]:
    """Dijkstra by latency from each group's first device to its farthest device."""
    neighbours: dict[int, list[tuple[int, float]]] = {}
    for edge in edges:
        one, other = edge.ends
        neighbours.setdefault(one, []).append((other, edge.latency_s))
        neighbours.setdefault(other, []).append((one, edge.latency_s))
    for group in groups:
        distance_s: dict[int, float] = {}
        queue = [(0.0, group[0])]
        while queue:
            so_far_s, vertex = heapq.heappop(queue)
            if vertex in distance_s:
                continue
            distance_s[vertex] = so_far_s
            for neighbour, latency_s in neighbours.get(vertex, []):
                heapq.heappush(queue, (so_far_s + latency_s, neighbour))
        yield max(distance_s[vertex] for vertex in group if vertex < num_devices)


def _derived_kind(group: Sequence[int], edges: Iterable[_Edge], num_devices: int) -> LinkKind:
    """Switch where one takes part, else full mesh or ring by the number of neighbours, else other."""
    if group[-1] >= num_devices:
        return LinkKind.SWITCH
    degree = dict.fromkeys(group, 0)
    for edge in edges:
        if edge.ends[0] in degree:
            degree[edge.ends[0]] += 1
            degree[edge.ends[1]] += 1
    if set(degree.values()) == {len(group) - 1}:
        return LinkKind.MESH
    return LinkKind.RING if set(degree.values()) == {2} else LinkKind.OTHER


# --- validation -----------------------------------------------------------------------------------------------------


def cluster_problems(cluster: Cluster) -> list[Problem]:
    """Everything that is wrong with a cluster; an empty list where nothing is.

    >>> level = Level("net", 8, Quantity(-1.0, "[derived] test"), Quantity(1e-6, "[derived] test"), LinkKind.SWITCH)
    >>> groups = preset_cluster("dgx-a100x2").groups
    >>> for problem in cluster_problems(Cluster("wrong", groups, (level,))):
    ...     print(problem)
    levels[0].bandwidth_Bps = -1.0: must be positive and finite
    levels[0].group_size = 8: the last level joins all 16 devices (nearest: 16)
    """
    problems = [problem for where, quantity in _quantities(cluster) for problem in _quantity_problems(where, quantity)]
    problems += _group_problems(cluster)
    if cluster.levels and (cluster.links or cluster.vertices):
        problems.append(Problem("levels", str(len(cluster.levels)), "give levels, or vertices and links, not both"))
    elif cluster.levels:
        problems += _level_problems(cluster)
    elif cluster.links or cluster.vertices:
        problems += _graph_problems(cluster)
    else:
        problems.append(Problem("levels", "", "give levels, or vertices and links; both are missing"))
    return problems


def _quantities(cluster: Cluster) -> Iterator[tuple[str, Quantity]]:
    for i, group in enumerate(cluster.groups):
        where = f"groups[{i}].device"
        for dtype, peak in group.device.peak_flops.items():
            yield f"{where}.peak_flops.{dtype}", peak
        yield f"{where}.memory_bytes", group.device.memory_bytes
        yield f"{where}.memory_bandwidth_Bps", group.device.memory_bandwidth_Bps
        if group.device.host_launch_s is not None:
            yield f"{where}.host_launch_s", group.device.host_launch_s
        for name, share in group.device.efficiency.items():
            yield f"{where}.efficiency.{name}", share
    wires: list[tuple[str, Level | Link]] = [(f"levels[{i}]", level) for i, level in enumerate(cluster.levels)]
    wires += [(f"links[{i}]", link) for i, link in enumerate(cluster.links)]
    for where, wire in wires:
        yield f"{where}.bandwidth_Bps", wire.bandwidth_Bps
        yield f"{where}.latency_s", wire.latency_s


def _quantity_problems(where: str, quantity: Quantity) -> Iterator[Problem]:
    # Zero latency is a fair what-if question; zero bandwidth divides by zero.
    can_be_zero = where.endswith(("latency_s", "host_launch_s"))
    if not math.isfinite(quantity.value) or quantity.value < 0 or (quantity.value == 0 and not can_be_zero):
        rule = "must be finite and not negative" if can_be_zero else "must be positive and finite"
        yield Problem(where, str(quantity.value), rule)
    elif quantity.value and not SMALLEST_QUANTITY <= quantity.value <= 1 / SMALLEST_QUANTITY:
        rule = f"must lie between {SMALLEST_QUANTITY:g} and {1 / SMALLEST_QUANTITY:g}"
        yield Problem(where, str(quantity.value), rule)
    if not quantity.source.strip():
        yield Problem(f"{where}.source", "''", "every number names its source", "[spec] the datasheet's name")


def _group_problems(cluster: Cluster) -> Iterator[Problem]:
    if not cluster.groups:
        yield Problem("groups", "", "needs at least one device group")
    if cluster.num_devices > MAX_DEVICES:
        yield Problem("groups", f"{cluster.num_devices} devices", f"more than {MAX_DEVICES:,} devices")
    for i, group in enumerate(cluster.groups):
        if group.count < 1:
            yield Problem(f"groups[{i}].count", str(group.count), "must be 1 or more", "1")
        if not group.device.peak_flops:
            yield Problem(f"groups[{i}].device.peak_flops", "{}", "needs the dense peak of at least one dtype")
        for dtype in group.device.peak_flops:
            if dtype not in PEAK_DTYPES:
                rule = "known dtypes: " + ", ".join(PEAK_DTYPES)
                yield Problem(f"groups[{i}].device.peak_flops", dtype, rule, nearest_name(dtype, PEAK_DTYPES))


def _level_problems(cluster: Cluster) -> Iterator[Problem]:
    num_devices, inner = cluster.num_devices, 0
    for i, level in enumerate(cluster.levels):
        where = f"levels[{i}].group_size"
        if level.group_size < 1:
            yield Problem(where, str(level.group_size), "must be 1 or more", "1")
        elif inner and level.group_size <= inner:
            yield Problem(where, str(level.group_size), f"must be more than the {inner} of the level inside it")
        elif inner and level.group_size % inner:
            nearest = str(max(2, round(level.group_size / inner)) * inner)
            yield Problem(
                where, str(level.group_size), f"must be a multiple of the {inner} of the level below", nearest
            )
        inner = max(level.group_size, 0) or inner
        if not level.oversubscription >= 1 or math.isinf(level.oversubscription):
            rule = "must be 1 (full bandwidth) or more"
            yield Problem(f"levels[{i}].oversubscription", str(level.oversubscription), rule, "1")
    last = len(cluster.levels) - 1
    if num_devices > 0 and cluster.levels[last].group_size != num_devices:
        rule = f"the last level joins all {num_devices} devices"
        yield Problem(f"levels[{last}].group_size", str(cluster.levels[last].group_size), rule, str(num_devices))


def wiring_problems(cluster: Cluster) -> list[Problem]:
    """What is wrong with the vertices and links of a graph and with their numbers; whether paths join all devices is no
    part of it."""
    numbers = [problem for where, quantity in _quantities(cluster) for problem in _quantity_problems(where, quantity)]
    return [*_vertex_problems(cluster), *_link_problems(cluster), *numbers]


def _graph_problems(cluster: Cluster) -> list[Problem]:
    problems = list(_vertex_problems(cluster)) + list(_link_problems(cluster))
    sound = all(link.bandwidth_Bps.value > 0 for link in cluster.links) and cluster.num_devices > 0
    if not problems and sound:
        problems += _reach_problems(cluster)
    return problems


def _vertex_problems(cluster: Cluster) -> Iterator[Problem]:
    if len(cluster.vertices) < cluster.num_devices:
        rule = f"the first {cluster.num_devices} vertices are the devices, so there must be at least as many"
        yield Problem("vertices", f"{len(cluster.vertices)} names", rule)
    seen: set[str] = set()
    for i, vertex in enumerate(cluster.vertices):
        if vertex in seen:
            yield Problem(f"vertices[{i}]", vertex, "is named twice")
        seen.add(vertex)


def _link_problems(cluster: Cluster) -> Iterator[Problem]:
    known = set(cluster.vertices)
    for i, link in enumerate(cluster.links):
        for end, vertex in (("source", link.source), ("target", link.target)):
            if vertex not in known:
                rule = "is not among the vertices"
                yield Problem(f"links[{i}].{end}", vertex, rule, nearest_name(vertex, cluster.vertices))
        if link.source == link.target:
            yield Problem(f"links[{i}]", link.source, "joins a vertex to itself")


def _reach_problems(cluster: Cluster) -> Iterator[Problem]:
    """Devices that no path joins, or whose groups are not consecutive ranks (which levels take for granted)."""
    num_devices = cluster.num_devices
    find, union = _union_find(len(cluster.vertices))
    for edge in _edges(cluster):
        union(*edge.ends)
    lost = [cluster.vertices[device] for device in range(num_devices) if find(device) != find(0)]
    if lost:
        yield Problem("links", _some(lost), f"no path from device {cluster.vertices[0]}")
    for merge in _merges(cluster):
        for group, _ in merge.groups:
            devices = [vertex for vertex in group if vertex < num_devices]
            if devices[-1] - devices[0] + 1 != len(devices):
                names = _some([cluster.vertices[device] for device in devices])
                rule = f"joined at {merge.width_Bps:g} B/s but not consecutive: list a group's devices side by side"
                yield Problem("vertices", names, rule)
                return


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


# --- presets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterTemplate:
    """A machine from which clusters of any size are built; `NAMExN` has N of what `counts` says.

    `counts` is node, rack, chip or process; each has `devices_per_unit` devices. The `group_size` of a level is here
    the *most* devices that it can join (`MAX_DEVICES` for the outermost). `notes` says what to know before use.
    """

    name: str
    counts: str
    devices_per_unit: int
    device: Device
    levels: tuple[Level, ...]
    notes: str = ""

    def cluster(self, num_units: int) -> Cluster:
        """The cluster of `num_units` nodes, racks, chips or processes.

        Each level takes the largest equal groups that fit it; levels beyond the first that joins all are dropped, so
        one node has no network. Raises `InputError` where the devices can't be divided into fairly full groups (5,000
        chips of TPU v4 make 2 pods of 2,500; 4,099 is prime).
        """
        where, num_devices = "cluster", num_units * self.devices_per_unit
        text = f"{self.name}x{num_units}"
        if num_units < 1:
            rule = f"the number of {_plural(self.counts)} must be 1 or more"
            raise InputError([Problem(where, text, rule, f"{self.name}x1")])
        if num_devices > MAX_DEVICES:
            nearest = f"{self.name}x{MAX_DEVICES // self.devices_per_unit}"
            raise InputError([Problem(where, text, f"more than {MAX_DEVICES:,} devices", nearest)])
        levels: list[Level] = []
        for level in self.levels:
            inner = levels[-1].group_size if levels else 1
            size = _equal_group(num_devices, level.group_size, inner)
            if size is None:
                fewest = -(-num_devices // level.group_size)
                nearest = f"{self.name}x{-(-num_units // fewest) * fewest}"
                rule = f"can't be divided into equal, fairly full groups of at most {level.group_size} ({level.name})"
                raise InputError([Problem(where, text, rule, nearest)])
            levels.append(
                Level(level.name, size, level.bandwidth_Bps, level.latency_s, level.kind, level.oversubscription)
            )
            if size == num_devices:
                break
        return Cluster(text, (DeviceGroup(self.device, num_devices),), tuple(levels))


def _equal_group(num_devices: int, at_most: int, multiple_of: int) -> int | None:
    """The largest divisor of `num_devices` that is a multiple of `multiple_of` and not above `at_most`.

    None where that takes more than twice the fewest groups: a prime number of chips is no row of one-chip pods.

    >>> _equal_group(6144, 4096, 1), _equal_group(64, 8, 1), _equal_group(4099, 4096, 1)
    (3072, 8, None)
    """
    fewest = -(-num_devices // at_most)
    for num_groups in range(fewest, 2 * fewest + 1):
        if num_devices % (num_groups * multiple_of) == 0:
            return num_devices // num_groups
    return None


def preset_cluster(text: str) -> Cluster:
    """The cluster that `NAMExN` means; N counts nodes, racks of *-nvl72, chips of tpu-*, processes of local-cpu.

    Raises `InputError`, with the nearest text that would do, for an unknown name and a missing or impossible N.

    >>> preset_cluster("tpu-v4x6144").levels[0].group_size
    3072
    >>> preset_cluster("dgx-h10x8")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    meshwright.errors.InputError: cluster = dgx-h10x8: 'dgx-h10' is no preset; known: ... (nearest: dgx-h100x8)
    """
    names = preset_names()
    name = max((name for name in names if text.startswith(name)), key=len, default="")
    rest = text[len(name) :]
    if not name or (rest and not rest.startswith("x") and not rest.isdecimal()):
        raise InputError([_unknown_preset(text, names)])
    template = _read_template(name)
    units = _plural(template.counts)
    if rest in ("", "x"):
        rule = f"how many {units}? {name} needs xN after its name"
        raise InputError([Problem("cluster", text, rule, f"{name}x1")])
    if rest.isdecimal():  # mi300x8: the x belongs to the name
        rule = f"how many {units}? x and their number follow the whole name {name}"
        raise InputError([Problem("cluster", text, rule, f"{name}x{rest}")])
    if not re.fullmatch(r"-?[0-9]+", rest[1:]):
        rule = f"{rest[1:]!r} is no whole number of {units}"
        raise InputError([Problem("cluster", text, rule, f"{name}x1")])
    if len(rest) > 20:  # int() refuses thousands of digits, and nobody wants to read them
        nearest = f"{name}x{MAX_DEVICES // template.devices_per_unit}"
        raise InputError([Problem("cluster", f"{text[:40]}...", f"more than {MAX_DEVICES:,} devices", nearest)])
    return template.cluster(int(rest[1:]))


def preset_names() -> tuple[str, ...]:
    """Names of the machines that `preset_cluster` knows, in alphabetical order."""
    files = (entry.name for entry in _preset_folder().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def cluster_templates() -> dict[str, ClusterTemplate]:
    """All machine templates by name."""
    return {name: _read_template(name) for name in preset_names()}


def _unknown_preset(text: str, names: Sequence[str]) -> Problem:
    head, x, count = text.rpartition("x")
    asked, count = (head, count) if x and count.isdecimal() else (text, "1")
    nearest = nearest_name(asked.lower(), names)
    rule = f"{asked!r} is no preset; known: {', '.join(names)}"
    return Problem("cluster", text, rule, f"{nearest}x{count}" if nearest else None)


def _plural(noun: str) -> str:
    return "processes" if noun == "process" else noun + "s"


def _preset_folder() -> Any:
    import importlib.resources  # here: it costs more than the rest of this module to import

    return importlib.resources.files("meshwright") / "data" / "clusters"


def _read_template(name: str) -> ClusterTemplate:
    data = json.loads((_preset_folder() / f"{name}.json").read_text(encoding="utf-8"))
    version = data.pop("version")
    assert version == 1, f"data/clusters/{name}.json has version {version}"
    levels = tuple(_read_level(level) for level in data.pop("levels"))
    return ClusterTemplate(device=_read_device(data.pop("device")), levels=levels, **data)


def _read_device(data: Mapping[str, Any]) -> Device:
    launch = data.get("host_launch_s")
    return Device(
        name=data["name"],
        peak_flops={dtype: Quantity(**peak) for dtype, peak in data["peak_flops"].items()},
        memory_bytes=Quantity(**data["memory_bytes"]),
        memory_bandwidth_Bps=Quantity(**data["memory_bandwidth_Bps"]),
        host_launch_s=None if launch is None else Quantity(**launch),
        efficiency={name: Quantity(**share) for name, share in data.get("efficiency", {}).items()},
    )


def _read_level(data: Mapping[str, Any]) -> Level:
    return Level(
        name=data["name"],
        group_size=MAX_DEVICES if data["group_size"] is None else data["group_size"],
        bandwidth_Bps=Quantity(**data["bandwidth_Bps"]),
        latency_s=Quantity(**data["latency_s"]),
        kind=LinkKind(data["kind"]),
        oversubscription=data["oversubscription"],
    )
