"""A step of training: priced blocks composed over stages, microbatches and state, on columns of strategies.

The same code prices one strategy (columns of length one) and a whole space. A `Family` holds strategies that differ in
numbers alone: the same splits, schedule, recomputation and ZeRO level. Legend of shape suffixes: U layouts (degrees
and microbatch), R strategies, K kinds of pipeline rank (equal stages folded), padded with ranks that hold nothing.

Assumptions: ranks of one kind are equally fast; communication that computation could hide is exposed to the engine's
share, or to what is left over where there is not enough computation; the step ends when the slowest rank has reduced
its gradients, updated and gathered its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.block import (
    BlockPrice,
    Machine,
    StatePrice,
    attributed,
    exposed_seconds,
    price_block,
    price_state,
    price_step,
)
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.compute import device_rates
from meshwright.cost.pipeline import pipeline_time
from meshwright.engine import Engine
from meshwright.graph import Graph, operator_flops
from meshwright.schedule import peak_in_flight
from meshwright.sharding import BlockLayout, StatePlacement, group_size, local_numel
from meshwright.strategy import Recompute, Stage, degree_of, root_axis
from meshwright.workload import Workload

#: Share of a device's memory that a plan leaves free: allocators round, fragment and need room to move.
MEMORY_RESERVE = 0.06  # [derived] published runs within 6 % of the card were slowed by allocator retries

#: Blocks whose parameters are gathered at once under ZeRO-3: the one in use and the one fetched ahead.
GATHERED_BLOCKS = 2  # [spec: FSDP2's default prefetch]

#: The update reads and writes each state once, reads the gradient and writes the parameter.
UPDATE_PASSES = 2  # [derived]


@dataclass(frozen=True)
class RankTable:
    """What each kind of pipeline rank holds: blocks by kind, its first rank, and how many ranks are like it.

    Leading shape: T tables; `counts_TKB` block instances, `first_TK`, `ranks_TK` (0: padding)."""

    blocks: tuple[str, ...]
    counts_TKB: np.ndarray[Any, Any]
    first_TK: np.ndarray[Any, Any]
    ranks_TK: np.ndarray[Any, Any]


def rank_table(graph: Graph, stage_lists: Sequence[Sequence[Stage]]) -> RankTable:
    """The table of each list of stages, equal ranks folded; entries are padded to the longest."""
    names = tuple(block.name for block in graph.blocks)
    folded = [_fold(graph, names, stages) for stages in stage_lists]
    width = max(len(rows) for rows in folded)
    counts = np.zeros((len(folded), width, len(names)), dtype=np.int64)
    first, ranks = np.zeros((2, len(folded), width), dtype=np.int64)
    for table, rows in enumerate(folded):
        for kind, (row, members) in enumerate(rows.items()):
            counts[table, kind], first[table, kind], ranks[table, kind] = row, members[0], len(members)
    return RankTable(names, counts, first, ranks)


def _fold(graph: Graph, names: Sequence[str], stages: Sequence[Stage]) -> dict[tuple[int, ...], list[int]]:
    held: dict[int, list[int]] = {}
    for stage in stages:
        row = held.setdefault(stage.pipeline_rank, [0] * len(names))
        for part in stage.blocks:
            for name in graph.sequence[part.start : part.stop]:
                row[names.index(name)] += 1
    folded: dict[tuple[int, ...], list[int]] = {}
    for rank in sorted(held):
        folded.setdefault(tuple(held[rank]), []).append(rank)
    return folded


@dataclass(frozen=True)
class PricedLayouts:
    """Every block priced under one set of splits, for U layouts."""

    graph: Graph
    workload: Workload
    machine: Machine
    layouts: Mapping[str, BlockLayout]
    degrees: Mapping[str, Any]
    microbatch: Any
    blocks: Mapping[str, BlockPrice]

    def sizes(self) -> dict[str, Any]:
        """Sizes of all dims, the batch being a microbatch of all data-parallel ranks together."""
        return self.graph.sizes(self.microbatch * degree_of("dp", self.degrees), self.workload.seq_len)


def machine_of(cluster: Cluster, engine: Engine, precision: str) -> Machine:
    """What pricing needs of a cluster and an engine."""
    return Machine(device_rates(cluster.slowest_device, precision), cluster.hierarchy(), engine)


def price_layouts(
    graph: Graph,
    layouts: Mapping[str, BlockLayout],
    degrees: Mapping[str, Any],
    microbatch: Any,
    machine: Machine,
    workload: Workload,
) -> PricedLayouts:
    """Price all blocks; `degrees` of all mesh axes outermost first and `microbatch`, as columns of length U."""
    priced = PricedLayouts(graph, workload, machine, layouts, degrees, microbatch, {})
    sizes = priced.sizes()
    blocks = {name: price_block(layout, sizes, degrees, machine, workload) for name, layout in layouts.items()}
    return replace(priced, blocks=blocks)


def price_states(priced: PricedLayouts, state: StatePlacement) -> dict[str, StatePrice]:
    """The training state of all blocks under one placement."""
    sizes = priced.sizes()
    return {name: price_state(layout, state, sizes, priced.degrees) for name, layout in priced.layouts.items()}


@dataclass(frozen=True)
class Family:
    """R strategies that differ in numbers alone. `layout_R` and `table_R` point into the layouts and rank tables."""

    state: StatePlacement
    schedule: str
    recompute: Mapping[str, Recompute]
    layout_R: Any
    table_R: Any
    num_virtual_R: Any
    num_microbatches_R: Any


@dataclass(frozen=True)
class StepColumns:
    """Columns of length R: the ledgers of time and memory, and what goes with them. Entries sum to the totals.

    `worst_rank` is the pipeline rank that needs most memory, `slowest_rank` the one whose time the ledger splits."""

    time: dict[str, Any]
    memory: dict[str, Any]
    step_time_s: Any
    peak_memory_bytes: Any
    bubble_fraction: Any
    mfu: Any
    hfu: Any
    communication: dict[str, Any]
    worst_rank: Any
    slowest_rank: Any


# --- one microbatch in one block -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """Seconds of the forward or backward of one microbatch in a block, by cause; columns of length U."""

    compute: Any
    recompute: Any
    exposed: dict[str, Any]
    launch: Any

    @property
    def total(self) -> Any:
        return self.compute + self.recompute + sum(self.exposed.values()) + self.launch


def _launch_seconds(engine: Engine, launches_s: Any, busy_s: Any) -> Any:
    """What starting operators adds to the `busy_s` of the device: what is more than that, or all of it."""
    return np.maximum(launches_s - busy_s, 0.0) if engine.launch_overlaps else launches_s + 0.0 * busy_s


def _exposed_behind(took_s: Any, share: float, compute_s: Any) -> Any:
    """Of a transfer that can run beside `compute_s`: the engine's share stays exposed, or what does not fit."""
    return np.maximum(share * took_s, took_s - (1 - share) * compute_s)


def state_seconds(
    priced: PricedLayouts, transfers: Iterable[tuple[Any, Any]], bytes_per_element: float
) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Bytes sent and seconds, by joint axes, of transfers of parameters or gradients."""
    found: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for step, numel in transfers:
        sent, took_s = price_step(step, numel * bytes_per_element, priced.degrees, priced.machine)
        before = found.get(step.axes, (0.0, 0.0))
        found[step.axes] = (before[0] + sent, before[1] + took_s)
    return found


def _add_state(
    exposed: dict[str, Any],
    seconds: Mapping[tuple[str, ...], tuple[Any, Any]],
    priced: PricedLayouts,
    compute_s: Any,
) -> dict[str, Any]:
    merged = dict(exposed)
    for axes, (_, took_s) in seconds.items():
        for axis, share in attributed(axes, priced.degrees).items():
            root = root_axis(axis)
            hidden = _exposed_behind(took_s, priced.machine.engine.exposed.get(root, 1.0), compute_s)
            merged[root] = merged.get(root, 0.0) + share * hidden
    return merged


def block_passes(
    priced: PricedLayouts, states: Mapping[str, StatePrice], name: str, kind: Recompute
) -> tuple[Pass, Pass]:
    """Forward and backward of one microbatch in block `name`."""
    block, state, engine = priced.blocks[name], states[name], priced.machine.engine
    bytes_ = state_bytes(engine, priced.workload)
    gathers = state_seconds(priced, state.each_use, bytes_.parameter)
    forward_s = block.math_s + block.memory_s
    forward_exposed = exposed_seconds(block.forward.seconds, priced.degrees, engine)
    exposed = _add_state(forward_exposed, gathers, priced, forward_s)
    launch = _launch_seconds(engine, block.launch_s, forward_s + sum(exposed.values()))
    forward = Pass(forward_s, 0.0, exposed, launch)

    accumulate_s = 2 * bytes_.gradient * state.numel / priced.machine.rates.memory_Bps
    backward_s = block.math_backward_s + block.memory_backward_s + accumulate_s
    again_s = block.recompute_s[kind]
    exposed = exposed_seconds(block.backward.seconds, priced.degrees, engine)
    launches = 2 * block.launch_s
    if kind is Recompute.FULL:
        launches = launches + block.launch_s
        for root, took_s in forward_exposed.items():
            exposed[root] = exposed.get(root, 0.0) + took_s
    scatters = state_seconds(priced, state.each_backward, bytes_.gradient)
    for seconds in (gathers, scatters):
        exposed = _add_state(exposed, seconds, priced, (backward_s + again_s) / max(1, bool(gathers) + bool(scatters)))
    launch = _launch_seconds(engine, launches, backward_s + again_s + sum(exposed.values()))
    return forward, Pass(backward_s, again_s, exposed, launch)


# --- bytes of state ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of each kind of training state."""

    parameter: float
    gradient: float
    optimizer: float


def state_bytes(engine: Engine, workload: Workload) -> StateBytes:
    """What an engine keeps per parameter: Adam's two moments, and a float32 master copy of 16-bit parameters."""
    size = workload.bytes_of("compute")
    master = engine.master_weights and size < 4
    moment = 4 if engine.master_weights else size
    return StateBytes(
        parameter=size,
        gradient=workload.bytes_of(engine.gradient_dtype) if size < 4 else size,
        optimizer=2 * max(moment, 4 if master else 0) + (4 if master else 0),
    )


# --- composition ---------------------------------------------------------------------------------------------------


def evaluate(priced: PricedLayouts, states: Mapping[str, StatePrice], tables: RankTable, family: Family) -> StepColumns:
    """Price every strategy of a family."""
    rows = _Rows(tables, family, priced)
    passes = {name: block_passes(priced, states, name, family.recompute[name]) for name in tables.blocks}
    forward_RK = rows.add({name: forward.total for name, (forward, _) in passes.items()})
    backward_RK = rows.add({name: backward.total for name, (_, backward) in passes.items()})
    message_s, message_bytes = _messages(priced, rows, family)
    forward_RK, backward_RK = forward_RK + message_s, backward_RK + message_s
    pipeline_s = pipeline_time(
        family.schedule, forward_RK, backward_RK, rows.ranks_RK, family.num_virtual_R, family.num_microbatches_R
    )
    turn_RK = forward_RK + backward_RK
    slowest_R = turn_RK.argmax(axis=1)
    end = _step_end(priced, states, rows, family, forward_RK, backward_RK)
    time = _time_ledger(passes, rows, slowest_R, message_s, family)
    busy_R = sum(time.values())
    time["bubble"] = np.maximum(pipeline_s - busy_R, 0.0)  # the maximum is for rounding only
    for cause, seconds_R in end.items():
        time[cause] = time.get(cause, 0.0) + seconds_R
    time["constant"] = np.full_like(pipeline_s, priced.machine.engine.step_constant_s)
    step_s = sum(time.values())
    memory_RK = _memory(priced, states, rows, family)
    peak_RK = sum(memory_RK.values())
    worst_R = peak_RK.argmax(axis=1)
    mfu, hfu = _utilisation(priced, family, step_s)
    return StepColumns(
        time=time,
        memory={name: rows.pick(bytes_RK, worst_R) for name, bytes_RK in memory_RK.items()},
        step_time_s=step_s,
        peak_memory_bytes=rows.pick(peak_RK, worst_R),
        bubble_fraction=time["bubble"] / pipeline_s,
        mfu=mfu,
        hfu=hfu,
        communication=_communication(priced, states, rows, family, message_bytes),
        worst_rank=rows.pick(rows.first_RK, worst_R),
        slowest_rank=rows.pick(rows.first_RK, slowest_R),
    )


class _Rows:
    """Sums block columns (U) over the blocks that each kind of rank holds (R x K)."""

    def __init__(self, tables: RankTable, family: Family, priced: PricedLayouts) -> None:
        self.blocks = tables.blocks
        self.counts_RKB = tables.counts_TKB[family.table_R]
        self.first_RK = tables.first_TK[family.table_R]
        self.ranks_RK = tables.ranks_TK[family.table_R]
        self.layout_R = family.layout_R
        self.num_layouts = len(np.atleast_1d(priced.microbatch))

    def column(self, values_U: Any) -> Any:
        """A layout column as a strategy column."""
        return np.broadcast_to(np.asarray(values_U, dtype=float), (self.num_layouts,))[self.layout_R]

    def add(self, values_U: Mapping[str, Any]) -> Any:
        """Sum over the blocks of each rank."""
        total = np.zeros(self.ranks_RK.shape)
        for index, name in enumerate(self.blocks):
            if name in values_U:
                total += self.counts_RKB[:, :, index] * self.column(values_U[name])[:, None]
        return total

    def largest(self, values_U: Mapping[str, Any]) -> Any:
        """The largest over the kinds of blocks of each rank."""
        best = np.zeros(self.ranks_RK.shape)
        for index, name in enumerate(self.blocks):
            held = self.counts_RKB[:, :, index] > 0
            best = np.maximum(best, np.where(held, self.column(values_U[name])[:, None], 0.0))
        return best

    @staticmethod
    def pick(values_RK: Any, kind_R: Any) -> Any:
        """The value of one kind of rank per strategy."""
        return values_RK[np.arange(len(kind_R)), kind_R]


def _messages(priced: PricedLayouts, rows: _Rows, family: Family) -> tuple[Any, Any]:
    """Exposed seconds, forward or backward, of one microbatch's messages between stages, per rank, and the bytes of
    one message: one a chunk. What lies replicated is sent in slices by an engine that gathers it on the other side."""
    pipelined = np.asarray(priced.degrees.get("pp", 1)) > 1
    size = max((block.exit_bytes for block in priced.blocks.values()), key=lambda value: np.max(value))
    others = [axis for axis in priced.degrees if axis != "pp"]
    if priced.machine.engine.slice_messages:
        whole = max((block.exit_whole_bytes for block in priced.blocks.values()), key=lambda value: np.max(value))
        size = whole / group_size(others, priced.degrees)
    took_s = point_to_point_time(size, group_size(others, priced.degrees), priced.machine.levels) * pipelined
    share = priced.machine.engine.exposed.get("pp", 1.0)
    chunks_RK = family.num_virtual_R[:, None] * (rows.ranks_RK > 0)
    return chunks_RK * rows.column(share * took_s)[:, None], rows.column(size * pipelined)


def _message_seconds(priced: PricedLayouts, rows: _Rows, size_RK: Any) -> Any:
    """Seconds of a message of each rank to another pipeline rank."""
    others = [axis for axis in priced.degrees if axis != "pp"]
    stride = rows.column(group_size(others, priced.degrees))[:, None]
    return point_to_point_time(size_RK, stride, priced.machine.levels)


def _step_end(
    priced: PricedLayouts,
    states: Mapping[str, StatePrice],
    rows: _Rows,
    family: Family,
    forward_RK: Any,
    backward_RK: Any,
) -> dict[str, Any]:
    """Seconds after the last backward on the slowest rank: reduction, update, gathering of parameters."""
    engine, bytes_ = priced.machine.engine, state_bytes(priced.machine.engine, priced.workload)
    exposed: dict[str, Any] = {}
    # Gradients travel beside the last backward, new parameters beside the next forward. What one transfer has taken of
    # that time is not there for another: else faster computation could make a step slower.
    for name_of, size, window_RK in (
        ("step_gradient", bytes_.gradient, backward_RK),
        ("step_parameter", bytes_.parameter, forward_RK),
    ):
        seconds = {name: state_seconds(priced, getattr(state, name_of), size) for name, state in states.items()}
        for axes in dict.fromkeys(axes for found in seconds.values() for axes in found):
            took_RK = rows.add({name: found[axes][1] for name, found in seconds.items() if axes in found})
            for axis, share in attributed(axes, priced.degrees).items():
                root = root_axis(axis)
                hidden = _exposed_behind(took_RK, engine.exposed.get(root, 1.0), window_RK)
                booked = rows.column(share)[:, None] * hidden
                exposed[f"exposed_{root}"] = exposed.get(f"exposed_{root}", 0.0) + booked
            window_RK = np.maximum(window_RK - took_RK, 0.0)
    shared_RK, single_RK = _tied_numel(priced, rows)
    if single_RK.any():
        # Both ends of a tied pair exchange their gradients and go on with the sum.
        tied_s = _message_seconds(priced, rows, single_RK * bytes_.gradient)
        exposed["exposed_pp"] = engine.exposed.get("pp", 1.0) * tied_s * (single_RK > 0)
    numel_RK = rows.add({name: state.numel for name, state in states.items()}) - shared_RK
    shards = state_shards(priced, family.state) if family.state.optimizer else 1
    traffic = UPDATE_PASSES * bytes_.optimizer + bytes_.gradient + bytes_.parameter
    exposed["optimizer"] = numel_RK / rows.column(shards)[:, None] * traffic / priced.machine.rates.memory_Bps
    last_R = sum(exposed.values()).argmax(axis=1)
    return {cause: rows.pick(seconds_RK, last_R) for cause, seconds_RK in exposed.items()}


def state_shards(priced: PricedLayouts, state: StatePlacement) -> Any:
    """Into how many pieces training state is cut where it is cut."""
    return group_size(state.axes, priced.degrees)


def _time_ledger(
    passes: Mapping[str, tuple[Pass, Pass]], rows: _Rows, slowest_R: Any, message_s: Any, family: Family
) -> dict[str, Any]:
    """Seconds of all microbatches on the slowest rank, by cause."""

    def summed(values_U: Mapping[str, Any]) -> Any:
        return family.num_microbatches_R * rows.pick(rows.add(values_U), slowest_R)

    time = {
        "compute": summed({name: sum(part.compute for part in both) for name, both in passes.items()}),
        "recompute": summed({name: sum(part.recompute for part in both) for name, both in passes.items()}),
        "launch": summed({name: sum(part.launch for part in both) for name, both in passes.items()}),
    }
    for root in sorted({root for both in passes.values() for part in both for root in part.exposed}):
        exposed = {name: sum(part.exposed.get(root, 0.0) for part in both) for name, both in passes.items()}
        time[f"exposed_{root}"] = summed(exposed)
    time["exposed_pp"] = 2 * family.num_microbatches_R * rows.pick(message_s, slowest_R)
    return time


def _memory(priced: PricedLayouts, states: Mapping[str, StatePrice], rows: _Rows, family: Family) -> dict[str, Any]:
    """Bytes on each kind of rank, by category."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    numel_RK = rows.add({name: state.numel for name, state in states.items()}) - _tied_numel(priced, rows)[0]
    shards_RK = rows.column(state_shards(priced, family.state))[:, None]
    state = family.state
    in_flight_RK = _in_flight(rows, family)
    kept = {name: block.kept_bytes[family.recompute[name]] for name, block in priced.blocks.items()}
    last = priced.graph.sequence[-1]
    head = {last} if priced.graph.counts[last] == 1 else set()  # of equal blocks all the way through none is a head
    body_RK = rows.add({name: value for name, value in kept.items() if name not in head})
    every = family.num_microbatches_R[:, None] if family.schedule == "GPipe" else 1
    activations = in_flight_RK * body_RK / family.num_virtual_R[:, None] + every * rows.add(
        {name: kept[name] for name in head}
    )
    redone = {
        name: block.kept_bytes[Recompute.NONE] - block.kept_bytes[family.recompute[name]]
        for name, block in priced.blocks.items()
    }
    working = {name: _working_bytes(priced, name) for name in priced.blocks}
    block_numel_RK = rows.largest({name: found.numel for name, found in states.items()})
    gathered = GATHERED_BLOCKS * bytes_.parameter * state.parameter + bytes_.gradient * state.gradient
    return {
        "parameters": bytes_.parameter * numel_RK / (shards_RK if state.parameter else 1),
        "gradients": bytes_.gradient * numel_RK / (shards_RK if state.gradient else 1),
        "optimizer": bytes_.optimizer * numel_RK / (shards_RK if state.optimizer else 1),
        "activations": activations,
        "recompute_buffer": rows.largest(redone),
        "working_set": rows.largest(working),
        "gathered_state": gathered * block_numel_RK * (shards_RK > 1),
        "reserved": priced.machine.engine.reserved_bytes * (rows.ranks_RK > 0),
    }


def _in_flight(rows: _Rows, family: Family) -> Any:
    """Forwards of a chunk whose backward has not ended, at most, on the first rank of each kind."""
    num_ranks_R = rows.ranks_RK.sum(axis=1)
    return peak_in_flight(
        family.schedule,
        num_ranks_R[:, None],
        family.num_virtual_R[:, None],
        family.num_microbatches_R[:, None],
        np.minimum(rows.first_RK, num_ranks_R[:, None] - 1),
    )


def _working_bytes(priced: PricedLayouts, name: str) -> Any:
    """The operands of a block's largest operator, whose gradients exist while it runs backward."""
    return np.maximum.reduce([np.asarray(price.bytes, dtype=float) for price in priced.blocks[name].operators])


def _tied_numel(priced: PricedLayouts, rows: _Rows) -> tuple[Any, Any]:
    """Elements of tied pairs: on ranks that hold both ends (counted twice there), on ranks that hold one."""
    shared, single = np.zeros(rows.ranks_RK.shape), np.zeros(rows.ranks_RK.shape)
    for pair in priced.graph.tied:
        ends = [rows.counts_RKB[:, :, rows.blocks.index(end.split("/")[0])] > 0 for end in pair]
        numel = rows.column(_parameter_numel(priced, pair[1]))[:, None]
        shared += (ends[0] & ends[1]) * numel
        single += (ends[0] ^ ends[1]) * numel
    return shared, single


def _parameter_numel(priced: PricedLayouts, path: str) -> Any:
    block, _, name = path.partition("/")
    layout = priced.layouts[block]
    return local_numel(layout.block.tensor[name].dims, layout.made[name], priced.sizes(), priced.degrees)


def _utilisation(priced: PricedLayouts, family: Family, step_s: Any) -> tuple[Any, Any]:
    """MFU and HFU: three forwards of the model, and what is recomputed besides, over the dense peak."""
    graph, workload = priced.graph, priced.workload
    model = 3 * graph.forward_flops(workload.global_batch, workload.seq_len)
    again = recomputed_flops(graph, workload, family.recompute)
    num_devices = np.broadcast_to(np.asarray(group_size(priced.degrees, priced.degrees)), np.shape(priced.microbatch))
    peak = priced.machine.rates.peak_flops * np.atleast_1d(num_devices)[family.layout_R] * step_s
    return model / peak, (model + again) / peak


def recomputed_flops(graph: Graph, workload: Workload, recompute: Mapping[str, Recompute]) -> int:
    """FLOPs of contractions that the backward of a step computes again."""
    sizes = graph.sizes(workload.global_batch, workload.seq_len)
    return sum(
        graph.counts[block.name] * operator_flops(operator, block.dim_aliases(operator), sizes)
        for block in graph.blocks
        for operator in block.operators
        if recompute[block.name] is Recompute.FULL
        or (recompute[block.name] is Recompute.SELECTIVE and operator.recompute_group)
    )


def _communication(
    priced: PricedLayouts, states: Mapping[str, StatePrice], rows: _Rows, family: Family, message_bytes_R: Any
) -> dict[str, Any]:
    """Bytes that the busiest rank sends per step, by mesh axis (see `attributed` for joint collectives)."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    sent: dict[str, Any] = {}

    def add(axes: tuple[str, ...], values_U: Mapping[str, Any], times: Any) -> None:
        for axis, share in attributed(axes, priced.degrees).items():
            sent[axis] = sent.get(axis, 0.0) + times * rows.column(share)[:, None] * rows.add(values_U)

    m_RK = family.num_microbatches_R[:, None]
    for name, block in priced.blocks.items():
        again = 2 if family.recompute[name] is Recompute.FULL else 1
        for axes, value in block.forward.bytes.items():
            add(axes, {name: again * value}, m_RK)
        for axes, value in block.backward.bytes.items():
            add(axes, {name: value}, m_RK)
        for field_name, size, times in (
            ("each_use", 2 * bytes_.parameter, m_RK),
            ("each_backward", bytes_.gradient, m_RK),
            ("step_gradient", bytes_.gradient, 1),
            ("step_parameter", bytes_.parameter, 1),
        ):
            moves = state_seconds(priced, getattr(states[name], field_name), size)
            for axes, (value, _) in moves.items():
                add(axes, {name: value}, times)
    columns = {axis: value.max(axis=1) for axis, value in sent.items()}
    pp_R = rows.ranks_RK.sum(axis=1)
    per_microbatch_R = np.where(pp_R > 1, 2 * family.num_virtual_R - (pp_R == 2), 0)
    tied_R = _tied_numel(priced, rows)[1].max(axis=1) * bytes_.gradient
    columns["pp"] = per_microbatch_R * family.num_microbatches_R * message_bytes_R + tied_R
    return columns
