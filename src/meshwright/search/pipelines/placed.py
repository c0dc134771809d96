"""A model's blocks placed operator by operator on every group of devices: options for models of any operators.

Where the degree shorthand's rules know a model's dims, `pricing` prices its options. This is for the others (modules,
ONNX), and what Alpa does: the kernel chooses splits for every operator inside a group. Each group of devices gives
several logical meshes (2201.12023, section 5.2), and each of these several options: the fastest placement, placements
that fit where each group of that size holds its share of the model, and data parallelism alone. They are found for the
whole model on the group, so that stages can begin anywhere, and are priced by `cost.placed`: nothing overlaps.

What it leaves out: recomputation (a strategy says it per block, not per stage); going from one option to another inside
a stage; of a placement's activations at rest all are counted as kept, whether a backward reads them or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.choice import Array, peak_of
from meshwright.cluster import Cluster
from meshwright.cost.analytic import usable_memory
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.layouts import Machine, machine_of
from meshwright.cost.placed import PlacedBlock, PlacedTensor, moved
from meshwright.engine import Engine
from meshwright.errors import InputError
from meshwright.graph import Block, Graph, Role, Segment
from meshwright.search.choose.elimination import eliminate, plan_of
from meshwright.search.choose.solver import ENDLESS, Deadline, within
from meshwright.search.operators import OperatorSpace
from meshwright.search.pipelines.pricing import checked, group_sizes, node_size
from meshwright.search.place import place
from meshwright.search.stages import StageOption, StageProblem
from meshwright.sharding import Phase
from meshwright.strategy import PLACED_AXES, MeshAxis, Strategy
from meshwright.workload import Workload

#: Of the memory of all devices, what placements that fit may take: all, and a half (the rest holds microbatches in
#: flight).
MEMORY_SHARES = (1.0, 0.5)

#: Seconds that one such placement may take.
MOST_SECONDS = 5.0


def is_named(graph: Graph) -> bool:
    """Whether a model's dims are those that the shorthand's rules split: its tokens are the dim `seq`."""
    return any("seq" in tensor.dims for block in graph.blocks for tensor in block.tensors)


def placed_problem_of(
    graph: Graph,
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    num_microbatches: int,
    *,
    sizes: Sequence[int] = (),
    deadline: Deadline = ENDLESS,
) -> StageProblem:
    """The problem of cutting a model into stages whose operators are placed one by one. At the deadline groups that
    are not yet placed are left out. Raises `InputError` where the batch does not divide."""
    checked(graph, workload, num_microbatches)
    machine = machine_of(cluster, engine, workload)
    micro = replace(workload, global_batch=workload.global_batch // num_microbatches)
    options: list[_Option] = []
    room = usable_memory(cluster) * cluster.num_devices
    for size in sizes or group_sizes(cluster):
        for mesh in logical_meshes(size, node_size(cluster)):
            if not options or not deadline.passed:
                options += _placed_on(graph, mesh, machine, micro, room, deadline)
    columns: dict[str, Any] = {
        name: np.stack([option.columns[name] for option in options], axis=1) for name in options[0].columns
    }
    names = [block.name for block in graph.blocks]
    devices_K = np.array([option.option.num_devices for option in options])
    levels = machine.levels
    latency_K = np.broadcast_to(point_to_point_time(0.0, devices_K, levels), devices_K.shape)
    byte_K = np.broadcast_to(point_to_point_time(1.0, devices_K, levels), devices_K.shape) - latency_K
    # Options do not follow one another inside a stage.
    switch_AB = np.where(np.eye(len(options)) > 0, 0.0, np.inf)
    whole_H = np.array([_handed_bytes(block, graph, micro) for block in graph.blocks])
    units = len(graph.sequence)
    return StageProblem(
        units=graph.sequence,
        kind_U=np.array([names.index(name) for name in graph.sequence]),
        edges_E=np.array([(unit, unit + 1) for unit in range(units - 1)], dtype=np.int64).reshape(-1, 2),
        bytes_E=np.array([whole_H[names.index(name)] for name in graph.sequence[:-1]]),
        options=tuple(replace(each.option, layout=index) for index, each in enumerate(options)),
        **columns,
        latency_K=latency_K,
        seconds_per_byte_K=byte_K * np.array([option.share for option in options]),
        num_devices=cluster.num_devices,
        num_microbatches=num_microbatches,
        memory_limit=usable_memory(cluster) - engine.memory.reserved_bytes,
        switch_AB=switch_AB,
    )


def logical_meshes(size: int, node: int) -> Iterator[tuple[MeshAxis, ...]]:
    """One axis, or two of which the inner one lies within a node.

    >>> [[axis.size for axis in mesh] for mesh in logical_meshes(16, 8)]
    [[2, 8], [4, 4], [8, 2]]
    >>> [[axis.size for axis in mesh] for mesh in logical_meshes(4, 8)]
    [[4], [2, 2]]
    """
    if size <= node:
        yield (MeshAxis(PLACED_AXES[0], size),)
    for outer in range(2, size):
        if size % outer == 0 and size // outer <= node:
            yield MeshAxis(PLACED_AXES[0], outer), MeshAxis(PLACED_AXES[1], size // outer)


@dataclass(frozen=True, eq=False)
class _Option:
    """An option with its columns, a number for each block, and the share of a hand-over that one rank holds."""

    option: StageOption
    columns: Mapping[str, Array]
    share: float


def _placed_on(
    graph: Graph, mesh: tuple[MeshAxis, ...], machine: Machine, micro: Workload, room: float, deadline: Deadline
) -> Iterator[_Option]:
    """Distinct placements on one mesh."""
    seen: set[str] = set()
    label = "x".join(str(axis.size) for axis in mesh)
    for words, strategy, is_copied in _strategies(graph, mesh, machine, micro, room, deadline):
        if (key := repr(strategy.splits)) not in seen:
            seen.add(key)
            columns, share = _columns(graph, strategy, machine, micro)
            size = math.prod(axis.size for axis in mesh)
            option = StageOption(f"{label} {words}", size, None, mesh, strategy.splits, is_copied)
            yield _Option(option, columns, share)


def _strategies(
    graph: Graph, mesh: tuple[MeshAxis, ...], machine: Machine, micro: Workload, room: float, deadline: Deadline
) -> Iterator[tuple[str, Strategy, bool]]:
    size = math.prod(axis.size for axis in mesh)
    fastest = place(graph, mesh, machine, micro, memory_limit=math.inf, deadline=deadline)
    assert fastest.strategy is not None
    yield "fastest", fastest.strategy, size == 1
    if size == 1:
        return
    if len(mesh) == 1 and (copied := _copied(fastest.space)) is not None:
        yield "copies", copied, True
    for share in MEMORY_SHARES:
        if deadline.passed:
            return
        limit, until = share * room / size, earlier(deadline, within(MOST_SECONDS))
        less = place(graph, mesh, machine, micro, memory_limit=limit, with_state=True, deadline=until)
        if less.strategy is None:
            return
        yield f"within {share:.0%}", less.strategy, False


def earlier(one: Deadline, other: Deadline) -> Deadline:
    """The deadline that comes first."""
    return min(one, other, key=lambda each: each.at_s)


def _copied(space: OperatorSpace) -> Strategy | None:
    """Data parallelism alone: every operator that has the batch is split over it, the others run everywhere; None where
    an operator does not allow it."""
    axis = space.mesh[0].name
    splits = {
        block.name: {
            operator.name: {axis: "batch"} if operator.splittable("batch") else {} for operator in block.operators
        }
        for block in space.graph.blocks
    }
    try:
        plan = plan_of(space.pinned(splits))
    except InputError:
        return None  # the batch of a microbatch is no multiple of the ranks
    if plan is None:
        return None
    found = eliminate(plan)
    choice_N = found.choice()
    return space.strategy(choice_N) if math.isfinite(found.least) and peak_of(space.instance, choice_N) else None


def _columns(graph: Graph, strategy: Strategy, machine: Machine, micro: Workload) -> tuple[dict[str, Array], float]:
    """Each block's numbers under a placement, and the share of a hand-over on one rank."""
    step = moved(graph, strategy, machine, micro)
    rows: dict[str, list[float]] = {}
    shares = [0.0]
    for placed in step.blocks:
        alone = _alone(graph, placed.block, strategy, machine, micro)
        kept = sum(_bytes(placed.block, each, micro) for each in placed.resting if _is_kept(placed.block, each))
        own = {
            "forward_HK": _seconds(placed, Phase.FORWARD) + sum(each.seconds.forward for each in placed.operators),
            "backward_HK": _seconds(placed, Phase.BACKWARD, Phase.REGATHER)
            + sum(each.seconds.backward for each in placed.operators),
            "update_HK": _seconds(placed, Phase.UPDATE) + placed.update_s,
            "weights_HK": alone["parameters"],
            "state_HK": sum(alone[name] for name in ("parameters", "gradients", "optimizer", "inputs")),
            "kept_HK": kept,
            "working_HK": alone["working_set"],
        }
        for name, value in own.items():
            rows.setdefault(name, []).append(float(value))
        shares += _shares(graph, placed, micro)
    return {name: np.array(row) for name, row in rows.items()}, max(shares) or 1.0


def _seconds(placed: PlacedBlock, *phases: Phase) -> float:
    return sum(move.seconds for move in placed.moves if move.phase in phases)


def _alone(graph: Graph, block: Block, strategy: Strategy, machine: Machine, micro: Workload) -> Mapping[str, float]:
    """The memory of one instance of a block by itself."""
    single = replace(graph, blocks=(block,), segments=(Segment((block.name,)),), tied=())
    own = replace(strategy, splits={block.name: strategy.splits[block.name]}, stages=(), recomputed={})
    found: Mapping[str, float] = moved(single, own, machine, micro).memory
    return found


def _is_kept(block: Block, placed: PlacedTensor) -> bool:
    return block.tensor[placed.tensor].role is Role.ACTIVATION and placed.tensor not in block.outputs


def _bytes(block: Block, placed: PlacedTensor, micro: Workload) -> float:
    return math.prod(placed.local_shape) * micro.bytes_of(block.tensor[placed.tensor].dtype)


def _handed_bytes(block: Block, graph: Graph, micro: Workload) -> float:
    """Bytes of all that a block hands on, whole."""
    sizes: Mapping[str, Any] = graph.sizes(micro.global_batch, micro.seq_len)
    tensors = [block.tensor[name] for name in block.outputs]
    return float(sum(math.prod(sizes[dim] for dim in each.dims) * micro.bytes_of(each.dtype) for each in tensors))


def _shares(graph: Graph, placed: PlacedBlock, micro: Workload) -> list[float]:
    whole = _handed_bytes(placed.block, graph, micro)
    local = sum(_bytes(placed.block, each, micro) for each in placed.resting if each.tensor in placed.block.outputs)
    return [local / whole] if whole and local else []
