"""The analytic evaluator: strategies in, an `Estimate` of each out, by the formulas of this floor.

One strategy is a list of one. Strategies of models of one structure, under one engine on one kind of machine, are
priced together on columns whatever their sizes: the code is that of whole spaces.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.block import StatePrice
from meshwright.cost.compute import precision_assumptions
from meshwright.cost.extents import Extents
from meshwright.cost.layouts import (
    Machine,
    PricedLayouts,
    end_blocks,
    handover_shares,
    machine_of,
    price_sized,
    state_bytes,
)
from meshwright.cost.memory import MEMORY_RESERVE
from meshwright.cost.spread import interval, probability_below, spread, unknowns
from meshwright.cost.stages import Members, RankTable, Rows, rank_table_of
from meshwright.cost.step import Prepared, StepColumns, communication_ledger, evaluate, prepare, utilisation
from meshwright.engine import Engine
from meshwright.graph import Graph, Operator
from meshwright.profile import Profile
from meshwright.results import Estimate
from meshwright.sharding import BlockLayout
from meshwright.strategy import Strategy, degree_of
from meshwright.units import format_bytes
from meshwright.workload import Workload


@dataclass(frozen=True)
class Case:
    """All that an estimate depends on."""

    graph: Graph
    cluster: Cluster
    strategy: Strategy
    workload: Workload
    engine: Engine


@dataclass(frozen=True)
class Evaluation:
    """Cases of one structure priced together: row i of every column is case i."""

    cases: Sequence[Case]
    priced: PricedLayouts
    states: Mapping[str, StatePrice]
    tables: RankTable
    members: Members
    columns: StepColumns

    @cached_property
    def communication(self) -> dict[str, Any]:
        """Bytes that the busiest rank sends per step, by mesh axis."""
        recompute = self.cases[0].strategy.recompute
        rows = Rows(self.tables, self.members)
        messages = _column([case.strategy.most_messages for case in self.cases])
        return communication_ledger(self.priced, self.states, recompute, rows, self.members, messages)


def estimate(graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine) -> Estimate:
    """Predict one step of a legal strategy (see `strategy.strategy_problems` for what is legal)."""
    return estimate_case(Case(graph, cluster, strategy, workload, engine))


def estimate_case(case: Case, profile: Profile | None = None) -> Estimate:
    """Predict one case, with measured times of single operators where a profile has them."""
    machine = machine_of(case.cluster, case.engine, case.workload, profile=profile)
    return estimate_of(evaluate_batch(batch_of([case]), machine), 0)


@dataclass(frozen=True)
class Batch:
    """Cases of one group with all that does not depend on speeds: what is priced again finds it done."""

    cases: Sequence[Case]
    layouts: Mapping[str, BlockLayout]
    extents: Extents
    shares: Mapping[tuple[str, str], Any]
    microbatch: Any
    tables: RankTable
    members: Members


def batch_of(cases: Sequence[Case]) -> Batch:
    """Gather cases of one group (see `grouped`)."""
    first = cases[0]
    degrees = {axis: _column([_degrees(case)[axis] for case in cases]) for axis in _degrees(first)}
    shares = [handover_shares(case.graph) for case in cases]
    return Batch(
        cases=cases,
        layouts=first.strategy.layouts(first.graph),
        extents=Extents(_sizes(cases), degrees),
        shares={pair: _column([share.get(pair, 0.0) for share in shares]) for pair in set().union(*shares)},
        microbatch=_column([case.strategy.microbatch for case in cases]),
        tables=rank_table_of(
            [block.name for block in first.graph.blocks],
            [(case.graph.sequence, case.strategy.stages) for case in cases],
        ),
        members=Members(
            schedule=first.strategy.schedule,
            layout_M=np.arange(len(cases)),
            table_M=np.arange(len(cases)),
            num_virtual_M=_column([case.strategy.virtual_stages for case in cases]),
            num_microbatches_M=_column([case.strategy.num_microbatches(case.workload) for case in cases]),
        ),
    )


def evaluate_batch(batch: Batch, machine: Machine) -> Evaluation:
    """Price a batch on a machine."""
    prepared = prepare_batch(batch, machine)
    columns = evaluate(prepared, batch.tables, batch.members)
    return evaluation_of(batch, prepared, columns)


def prepare_batch(batch: Batch, machine: Machine) -> Prepared:
    """All that a batch's layouts give on a machine, before stages and schedule."""
    first = batch.cases[0]
    priced = price_sized(
        first.graph, batch.layouts, batch.extents, batch.shares, batch.microbatch, machine, first.workload
    )
    return prepare(priced, [first.strategy.state], [first.strategy.recompute])


def evaluation_of(batch: Batch, prepared: Prepared, columns: StepColumns) -> Evaluation:
    """A batch with what was found of it."""
    return Evaluation(batch.cases, prepared.priced, prepared.states[0][1], batch.tables, batch.members, columns)


def evaluate_cases(cases: Sequence[Case]) -> Evaluation:
    """Price cases of one group (see `grouped`) on the machine of the first."""
    return evaluate_batch(batch_of(cases), machine_of(cases[0].cluster, cases[0].engine, cases[0].workload))


def _column(values: Sequence[Any]) -> Any:
    return np.array(values)


def _degrees(case: Case) -> dict[str, int]:
    return {"pp": 1, **case.strategy.degrees}


def _sizes(cases: Sequence[Case]) -> dict[str, Any]:
    rows = [
        case.graph.sizes(case.strategy.microbatch * int(degree_of("dp", case.strategy.degrees)), case.workload.seq_len)
        for case in cases
    ]
    return {dim: _column([row[dim] for row in rows]) for dim in rows[0]}


def grouped(cases: Iterable[Case]) -> list[list[int]]:
    """The indices of cases by structure: each group can be priced together (`evaluate_cases`)."""
    operators: dict[int, Hashable] = {}
    groups: dict[Hashable, list[int]] = {}
    for index, case in enumerate(cases):
        key = id(case.graph)
        if key not in operators:
            operators[key] = _graph_structure(case.graph)
        groups.setdefault((operators[key], *_structure(case)), []).append(index)
    return list(groups.values())


def _graph_structure(graph: Graph) -> Hashable:
    """What prices depend on in a graph, but for the sizes of its dims and the number of its blocks."""
    blocks = [
        (block.name, block.inputs, block.outputs, block.tensors, tuple(map(_priced_part, block.operators)))
        for block in graph.blocks
    ]
    return (tuple(blocks), end_blocks(graph), graph.sequence[0], graph.sequence[-1], graph.tied)


def _priced_part(operator: Operator) -> Hashable:
    attributes = tuple((name, operator.attributes.get(name)) for name in ("causal", "window"))
    plain = [item.name for item in fields(Operator) if item.name not in ("attributes", "halo")]
    return (*(getattr(operator, name) for name in plain), attributes, tuple(operator.halo.items()))


def _structure(case: Case) -> tuple[Hashable, ...]:
    """What cases of one group share besides: how operators are split, state, schedule, recomputation, software, and
    the kind of machine. Sizes, degrees and the number of devices may differ."""
    strategy, device, levels = case.strategy, case.cluster.slowest_device, case.cluster.hierarchy()
    splits = [
        (block, name, tuple(split.items())) for block, own in strategy.splits.items() for name, split in own.items()
    ]
    wires = [(level.group_size, level.bandwidth_Bps, level.latency_s, level.oversubscription) for level in levels]
    return (
        *(tuple(_degrees(case)), tuple(splits), strategy.state, strategy.schedule, tuple(strategy.recompute.items())),
        *(case.workload.precision, case.workload.product_precision, case.engine.name, id(case.engine)),
        *(device.name, device.memory_bytes, device.memory_bandwidth_Bps, tuple(device.peak_flops.items())),
        *(tuple(device.efficiency.items()), tuple(wires[:-1]), wires[-1][1:]),
    )


def estimate_of(found: Evaluation, row: int) -> Estimate:
    """One row of evaluated columns as a record."""
    case, columns = found.cases[row], found.columns
    shape = np.shape(columns.step_time_s)

    def number(column: Any) -> float:
        return float(np.broadcast_to(column, shape)[0, 0, row])

    step_s, peak = number(columns.step_time_s), number(columns.peak_memory_bytes)
    memory = {name: number(column) for name, column in columns.memory.items()}
    reasons = memory_reasons(memory, peak, int(number(columns.worst_rank)), case.cluster)
    peak_flops = found.priced.machine.rates.peak_flops * case.strategy.num_devices
    mfu, hfu = utilisation(case.graph, case.workload, case.strategy.recompute, peak_flops * step_s)
    known, told = spread(), unknowns(case.graph, case.cluster.slowest_device, case.engine)
    time_width, memory_width = known.step_time.of(told), known.peak_memory.of(told)
    time = {name: number(column) for name, column in columns.time.items()}
    return Estimate(
        feasible=not reasons,
        reasons=reasons,
        step_time_s=step_s,
        time=time,
        memory=memory,
        peak_memory_bytes=peak,
        mfu=mfu,
        hfu=hfu,
        bubble_fraction=number(columns.bubble_fraction),
        communication={axis: float(column[row]) for axis, column in found.communication.items()},
        tokens_per_s=case.workload.tokens / step_s,
        assumptions=precision_assumptions(case.cluster.slowest_device, case.workload),
        warnings=tuple(
            f"{why}: {time[cause] / step_s:.0%} of the step"
            for cause, why in FAULTS.items()
            if time.get(cause, 0.0) > NOTED_SHARE * step_s
        ),
        step_time_interval_s=interval(step_s, time_width),
        peak_memory_interval_bytes=interval(peak, memory_width),
        fit_probability=probability_below(case.cluster.slowest_device.memory_bytes.value, peak, memory_width),
    )


#: Causes of time that are faults of an engine, in words.
FAULTS = {
    "stall": "messages between stages block their ranks",
    "reallocation": "memory pressure: the allocator frees and allocates again",
}

#: A fault is told of where it takes more than this share of the step.
NOTED_SHARE = 0.02


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
    room = usable_memory(cluster) - engine.memory.reserved_bytes
    needed = int(-(-state // room)) if room > 0 else 0
    return (
        f"parameters, gradients and optimizer take {format_bytes(state)}: at least {max(needed, 1):,} such devices "
        f"before the first activation (here: {cluster.num_devices:,})"
    )
