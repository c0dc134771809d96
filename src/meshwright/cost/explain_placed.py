"""The estimate of a strategy that places single operators, down to the operator and the collective."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.cluster import Cluster
from meshwright.cost.explain import Explanation, Leaf, TensorPlacement
from meshwright.cost.layouts import machine_of
from meshwright.cost.placed import Move, PlacedBlock, PlacedStep, PlacedTensor, moved, placed_estimate
from meshwright.engine import Engine
from meshwright.graph import Graph
from meshwright.strategy import Strategy
from meshwright.units import format_bytes
from meshwright.workload import Workload


def explain_placed(
    graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine
) -> Explanation:
    """Explain a legal strategy of one stage at the level of operators: its time by block, its memory by category."""
    step = moved(graph, strategy, machine_of(cluster, engine, workload), workload)
    estimate = placed_estimate(graph, cluster, strategy, workload, engine, step)
    blocks = tuple(_block_leaf(placed) for placed in step.blocks)
    memory = tuple(Leaf(name, value, "B") for name, value in estimate.memory.items() if value > 0)
    return Explanation(
        estimate=estimate,
        time=Leaf("step time", estimate.step_time_s, "s", "nothing overlaps", blocks),
        memory=Leaf("peak memory", estimate.peak_memory_bytes, "B", "the moment that needs most", memory),
        placements=tuple(_placements(step, strategy)),
    )


def _block_leaf(placed: PlacedBlock) -> Leaf:
    n = placed.count
    operators = tuple(
        Leaf(
            found.operator,
            n * (found.seconds.forward * (2 if found.is_rerun else 1) + found.seconds.backward),
            "s",
            ", ".join(f"{axis}: {dim}" for axis, dim in found.split.items()) or "whole",
        )
        for found in placed.operators
    )
    moves = tuple(_move_leaf(move, n) for move in placed.moves if move.seconds > 0)
    parts = [
        Leaf("operators", sum(leaf.value for leaf in operators), "s", "", operators),
        Leaf("collectives", sum(leaf.value for leaf in moves), "s", "", moves),
        Leaf("update", n * placed.update_s, "s"),
    ]
    kept = tuple(leaf for leaf in parts if leaf.value > 0)
    return Leaf(placed.block.name, sum(leaf.value for leaf in kept), "s", f"{n} times" if n > 1 else "", kept)


def _move_leaf(move: Move, count: int) -> Leaf:
    steps = "; ".join(
        f"{found.step.collective} over {', '.join(found.step.axes)}, {format_bytes(found.size_bytes)}"
        for found in move.steps
        if found.seconds > 0
    )
    return Leaf(f"{move.tensor} {move.phase}", count * move.seconds, "s", steps)


def _placements(step: PlacedStep, strategy: Strategy) -> Iterator[TensorPlacement]:
    for placed in step.blocks:
        seen = set()
        operands = [tensor for found in placed.operators for tensor in (*found.inputs, *found.outputs)]
        for tensor in (*placed.resting, *operands):
            if tensor.tensor not in seen:
                seen.add(tensor.tensor)
                yield _placement(placed, tensor, strategy)


def _placement(placed: PlacedBlock, tensor: PlacedTensor, strategy: Strategy) -> TensorPlacement:
    dims = placed.block.tensor[tensor.tensor].dims
    return TensorPlacement(
        block=placed.block.name,
        tensor=tensor.tensor,
        placements={axis.name: str(tensor.placements.get(axis.name, "Replicate")) for axis in strategy.mesh},
        local_shape={dim: int(size) for dim, size in zip(dims, tensor.local_shape, strict=True)},
    )
