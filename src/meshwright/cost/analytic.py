"""The analytic evaluator: one strategy in, an `Estimate` out, by the formulas of this floor."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.block import StatePrice
from meshwright.cost.compute import precision_assumptions
from meshwright.cost.layouts import PricedLayouts, machine_of, price_layouts, price_states, state_bytes
from meshwright.cost.memory import MEMORY_RESERVE
from meshwright.cost.stages import Family, rank_table
from meshwright.cost.step import StepColumns, evaluate
from meshwright.engine import Engine
from meshwright.graph import Graph
from meshwright.results import Estimate
from meshwright.strategy import Strategy
from meshwright.units import format_bytes
from meshwright.workload import Workload


def single_strategy(
    graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine
) -> tuple[PricedLayouts, dict[str, StatePrice], StepColumns]:
    """Prices and columns of length one for a legal strategy; the code is that of whole spaces."""
    degrees = {"pp": 1, **strategy.degrees}
    columns = {axis: np.array([size]) for axis, size in degrees.items()}
    machine = machine_of(cluster, engine, workload.precision)
    layouts = strategy.layouts(graph)
    priced = price_layouts(graph, layouts, columns, np.array([strategy.microbatch]), machine, workload)
    states = price_states(priced, strategy.state)
    family = Family(
        state=strategy.state,
        schedule=strategy.schedule,
        recompute=strategy.recompute,
        layout_R=np.array([0]),
        table_R=np.array([0]),
        num_virtual_R=np.array([strategy.virtual_stages]),
        num_microbatches_R=np.array([strategy.num_microbatches(workload)]),
    )
    return priced, states, evaluate(priced, states, rank_table(graph, [strategy.stages]), family)


def estimate(graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine) -> Estimate:
    """Predict one step of a legal strategy (see `strategy.strategy_problems` for what is legal)."""
    _, _, columns = single_strategy(graph, cluster, strategy, workload, engine)
    return estimate_of(columns, 0, cluster, workload)


def estimate_of(columns: StepColumns, row: int, cluster: Cluster, workload: Workload) -> Estimate:
    """One row of evaluated columns as a record."""

    def number(column: Any) -> float:
        return float(np.broadcast_to(column, np.shape(columns.step_time_s))[row])

    step_s, peak = number(columns.step_time_s), number(columns.peak_memory_bytes)
    memory = {name: number(column) for name, column in columns.memory.items()}
    reasons = memory_reasons(memory, peak, int(columns.worst_rank[row]), cluster)
    return Estimate(
        feasible=not reasons,
        reasons=reasons,
        step_time_s=step_s,
        time={name: number(column) for name, column in columns.time.items()},
        memory=memory,
        peak_memory_bytes=peak,
        mfu=number(columns.mfu),
        hfu=number(columns.hfu),
        bubble_fraction=number(columns.bubble_fraction),
        communication={axis: number(column) for axis, column in columns.communication.items()},
        tokens_per_s=workload.tokens / step_s,
        assumptions=precision_assumptions(cluster.slowest_device, workload.precision),
    )


def usable_memory(cluster: Cluster) -> float:
    """Bytes of the smallest device that a plan may fill."""
    return cluster.slowest_device.memory_bytes.value * (1 - MEMORY_RESERVE)


def memory_reasons(memory: dict[str, float], peak: float, rank: int, cluster: Cluster) -> tuple[str, ...]:
    """Why a strategy does not fit, by its largest parts; nothing where it fits."""
    usable = usable_memory(cluster)
    if peak <= usable:
        return ()
    largest = sorted(memory.items(), key=lambda item: -item[1])[:3]
    parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in largest)
    capacity = cluster.slowest_device.memory_bytes.value
    return (
        f"pipeline rank {rank}: {parts} + ... = {format_bytes(peak)} of {format_bytes(usable)} usable "
        f"({format_bytes(capacity)} less a reserve of {MEMORY_RESERVE:.0%})",
    )


def devices_needed(graph: Graph, cluster: Cluster, workload: Workload, engine: Engine) -> str:
    """What would hold the state of a model at all: devices of this kind, if everything were sharded."""
    bytes_ = state_bytes(engine, workload)
    state = graph.num_parameters * (bytes_.parameter + bytes_.gradient + bytes_.optimizer)
    room = usable_memory(cluster) - engine.reserved_bytes
    needed = int(-(-state // room)) if room > 0 else 0
    return (
        f"parameters, gradients and optimizer take {format_bytes(state)}: at least {max(needed, 1):,} such devices "
        f"before the first activation (here: {cluster.num_devices:,})"
    )
