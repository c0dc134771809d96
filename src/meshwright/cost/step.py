"""A step of training: priced blocks composed over stages, microbatches and state, on columns of strategies.

The same code prices one strategy (columns of length one), a list of runs, and a whole space: layouts are priced once,
`prepare` derives from them what a microbatch takes under each placement of state and each choice of recomputation, and
`evaluate` composes members of one schedule. Legend of shape suffixes: see `stages`; results are Z x C x M.

Assumptions: ranks of one kind are equally fast; communication that computation could hide is exposed to the engine's
share, or to what is left over where there is not enough computation; a rank reduces its gradients while the ranks
before it still drain; the step ends when the last rank has reduced its gradients, updated and gathered its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.block import StatePrice, attributed
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.extents import doublings
from meshwright.cost.layouts import PricedLayouts, price_states, state_bytes
from meshwright.cost.memory import (
    InFlight,
    Memory,
    MemoryColumns,
    Recomputes,
    States,
    in_flight,
    memory_columns,
    memory_ledger,
    parameter_numel,
    stacked,
)
from meshwright.cost.passes import block_passes, crosses_nodes, exposed_behind, in_order, num_nodes, state_moves
from meshwright.cost.pipeline import pipeline_time
from meshwright.cost.stages import Members, RankTable, Rows, pick
from meshwright.graph import Graph, operator_flops
from meshwright.schedule import is_asynchronous, updates_each_microbatch
from meshwright.sharding import StatePlacement, group_size
from meshwright.strategy import Recompute, degree_of, root_axis
from meshwright.workload import Workload

#: The update reads and writes each state once, reads the gradient and writes the parameter.
UPDATE_PASSES = 2  # [derived]


@dataclass(frozen=True)
class StepColumns:
    """Arrays of Z x C x M: the ledgers of time and memory, and what goes with them. Entries sum to the totals.

    `worst_rank` is the pipeline rank that needs most memory, `slowest_rank` the one whose time the ledger splits."""

    time: dict[str, Any]
    memory: dict[str, Any]
    step_time_s: Any
    peak_memory_bytes: Any
    bubble_fraction: Any
    worst_rank: Any
    slowest_rank: Any


@dataclass(frozen=True)
class Prepared:
    """What layouts and choices give, before stages and microbatches: columns of Z x C x U per block.

    `causes` sum the seconds of a microbatch forward and backward by cause; `moves` are the transfers of state that
    follow the last backward, as (attribute of a state's price, axes, seconds per block); `update_s` the optimizer's
    seconds per block; `blocks` and `blocks_many` where messages block their ranks, the latter with many microbatches
    only."""

    priced: PricedLayouts
    states: States
    forward_s: dict[str, Any]
    backward_s: dict[str, Any]
    weights_s: dict[str, Any]
    causes: dict[str, dict[str, Any]]
    moves: list[tuple[str, tuple[str, ...], dict[str, Any]]]
    update_s: dict[str, Any]
    message_s: Any
    blocks: Any
    blocks_many: Any
    step_rank_s: Any
    memory: MemoryColumns


def prepare(priced: PricedLayouts, placements: Sequence[StatePlacement], recomputes: Recomputes) -> Prepared:
    """Everything about layouts that does not depend on stages, schedule and number of microbatches."""
    states: States = [(state, price_states(priced, state)) for state in placements]
    forward_s, backward_s, weights_s = {}, {}, {}
    causes: dict[str, dict[str, Any]] = {}
    for name, block in priced.blocks.items():
        grid = [
            [block_passes(priced, block, prices[name], kinds[name]) for kinds in recomputes] for _, prices in states
        ]
        forward_s[name] = stacked(priced, [[row[0][0].total] for row in grid])
        backward_s[name] = stacked(priced, [[both[1].total for both in row] for row in grid])
        weights_s[name] = stacked(priced, [[both[1].weights for both in row] for row in grid])
        roots = sorted({root for row in grid for both in row for each in both for root in each.exposed})
        for cause in ("compute", "recompute", "launch", "skew"):
            values = [[sum(getattr(each, cause) for each in both) for both in row] for row in grid]
            causes.setdefault(cause, {})[name] = stacked(priced, values)
        for root in roots:
            values = [[sum(each.exposed.get(root, 0.0) for each in both) for both in row] for row in grid]
            causes.setdefault(f"exposed_{root}", {})[name] = stacked(priced, values)
    engine, bytes_ = priced.machine.engine, state_bytes(priced.machine.engine, priced.workload)
    traffic = UPDATE_PASSES * bytes_.optimizer + bytes_.gradient + bytes_.parameter
    byte_s = priced.machine.constants.update_traffic / priced.machine.rates.memory_Bps
    return Prepared(
        priced=priced,
        states=states,
        forward_s=forward_s,
        backward_s=backward_s,
        weights_s=weights_s,
        causes=causes,
        moves=_end_moves(priced, states),
        update_s={
            name: stacked(
                priced,
                [
                    [traffic * byte_s * (prices[name].shard_numel if state.optimizer else prices[name].numel)]
                    for state, prices in states
                ],
            )
            for name in priced.blocks
        },
        message_s=priced.machine.exposed.get("pp", 1.0) * message_seconds(priced),
        blocks=stacked(priced, [[_blocks(priced)]]),
        blocks_many=stacked(priced, [[_blocks_many(priced, state)] for state, _ in states]),
        step_rank_s=stacked(
            priced,
            [
                [engine.step_rank_s * group_size(state.axes, priced.degrees) if state.optimizer else 0.0]
                for state, _ in states
            ],
        ),
        memory=memory_columns(priced, states, recomputes),
    )


def _end_moves(priced: PricedLayouts, states: States) -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Gradients travel beside the last backward, new parameters beside the next forward."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    found: list[tuple[str, tuple[str, ...], dict[str, Any]]] = []
    for name_of, size in (("step_gradient", bytes_.gradient), ("step_parameter", bytes_.parameter)):
        moves = [
            {name: state_moves(priced, getattr(price, name_of), size).seconds for name, price in prices.items()}
            for _, prices in states
        ]
        for axes in dict.fromkeys(axes for by_block in moves for seconds in by_block.values() for axes in seconds):
            columns = {
                name: stacked(priced, [[by_block[name].get(axes, 0.0)] for by_block in moves]) for name in priced.blocks
            }
            found.append((name_of, axes, columns))
    return found


def message_bytes(priced: PricedLayouts) -> Any:
    """Bytes of a microbatch's message between stages, per rank. What lies replicated is sent in slices by an engine
    that gathers it on the other side."""
    size = max((block.exit_bytes for block in priced.blocks.values()), key=lambda value: np.max(value))
    whole = max((block.exit_whole_bytes for block in priced.blocks.values()), key=lambda value: np.max(value))
    others = [axis for axis in priced.degrees if axis != "pp"]
    size = np.where(priced.machine.slice_messages, whole / group_size(others, priced.degrees), size)
    return size * (np.asarray(priced.degrees.get("pp", 1)) > 1)


def message_seconds(priced: PricedLayouts) -> Any:
    """Seconds of a microbatch's message between stages."""
    pipelined = np.asarray(priced.degrees.get("pp", 1)) > 1
    return _point_to_point(priced, message_bytes(priced)) * pipelined


def _point_to_point(priced: PricedLayouts, size_bytes: Any) -> Any:
    """Seconds of a message of a rank to the next stage."""
    others = [axis for axis in priced.degrees if axis != "pp"]
    levels = priced.machine.networks.get("pp", priced.machine.levels)
    return point_to_point_time(size_bytes, group_size(others, priced.degrees), levels)


def _blocks(priced: PricedLayouts) -> Any:
    """Whether messages block their ranks whatever the state and the number of microbatches (see `engine.Crossing`)."""
    fault = priced.machine.engine.crossing
    if not fault.stall_s or len(priced.machine.levels) == 1:
        return False
    large: Any = False
    for block in priced.blocks.values():
        large = large | (block.forward.largest >= fault.stall_group)
    return (num_nodes(priced) >= fault.stall_nodes) | (large & crosses_nodes(priced))


def _blocks_many(priced: PricedLayouts, state: StatePlacement) -> Any:
    """Whether they do with many microbatches of one sequence, where state lies whole on several data-parallel ranks."""
    if not priced.machine.engine.crossing.stall_s or state.optimizer:
        return False
    copied = np.asarray(degree_of("dp", priced.degrees)) > 1
    return copied & (np.asarray(priced.microbatch) == 1) & crosses_nodes(priced)


# --- composition ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """A microbatch on each kind of rank, through all of its stages: seconds of the forward and of the backward (and the
    part of it that makes gradients of weights), of which in each the exposed part of messages, waiting where they
    block, and half of what memory pressure takes."""

    forward_K: Any
    backward_K: Any
    weights_K: Any
    message: Any
    stall_K: Any
    retry_K: Any
    memory: Memory


def turns(prepared: Prepared, rows: Rows, members: Members, held: InFlight) -> Turns:
    """What turns take and need, with so many microbatches in flight."""
    m, v = members.num_microbatches_M, members.num_virtual_M
    engine = prepared.priced.machine.engine
    many = m >= engine.crossing.stall_microbatches
    waits = (rows.column(prepared.blocks) > 0) | ((rows.column(prepared.blocks_many) > 0) & many)
    memory = memory_ledger(prepared.memory, rows, held, waits)
    message = v * rows.column(prepared.message_s)
    sent_K = message * rows.spread(rows.ranks_KM > 0)
    stall_K = engine.crossing.stall_s * waits * rows.spread(_num_neighbours(rows))
    retry_K = engine.memory.retry_s_per_byte / 2 * memory.reallocated
    return Turns(
        forward_K=rows.add(prepared.forward_s) + sent_K + stall_K + retry_K,
        backward_K=rows.add(prepared.backward_s) + sent_K + stall_K + retry_K,
        weights_K=rows.add(prepared.weights_s),
        message=message,
        stall_K=stall_K,
        retry_K=retry_K,
        memory=memory,
    )


def evaluate(prepared: Prepared, tables: RankTable, members: Members) -> StepColumns:
    """Price members of one schedule under every placement of state and choice of recomputation prepared."""
    rows = Rows(tables, members, prepared.priced.machine.num_choices)
    m, v = members.num_microbatches_M, members.num_virtual_M
    engine = prepared.priced.machine.engine
    turn = turns(prepared, rows, members, in_flight(rows, members))
    memory, forward_K, backward_K = turn.memory, turn.forward_K, turn.backward_K
    pipeline_s = pipeline_time(
        members.schedule, forward_K, backward_K, turn.weights_K, rows.spread(rows.ranks_KM), v, m
    )
    slowest = (forward_K + backward_K).argmax(axis=0)

    at_slowest = rows.at(slowest)
    time = {cause: m * at_slowest(columns) for cause, columns in prepared.causes.items()}
    time["exposed_pp"] = 2 * m * turn.message
    if engine.crossing.stall_s:
        time["stall"] = 2 * m * pick(turn.stall_K, slowest)
    if engine.memory.retry_s_per_byte:
        time["reallocation"] = 2 * m * pick(turn.retry_K, slowest)
    busy_s = in_order(time)
    time["bubble"] = np.maximum(pipeline_s - busy_s, 0.0)  # the maximum is for rounding only
    bubble_fraction = time["bubble"] / pipeline_s
    end, end_s = _step_end(prepared, rows, turn, v, members.schedule)
    updates = m if updates_each_microbatch(members.schedule) else 1
    end, end_s = {cause: updates * seconds for cause, seconds in end.items()}, updates * end_s
    for cause, seconds in end.items():
        time[cause] = time.get(cause, 0.0) + seconds
    spent_s = busy_s + time["bubble"] + end_s
    lost = prepared.priced.machine.constants.straggler * rows.column(doublings(num_nodes(prepared.priced)))
    time["stragglers"] = lost * spent_s
    time["constant"] = engine.step_constant_s + rows.column(prepared.step_rank_s)

    step_s = spent_s + time["stragglers"] + time["constant"]
    if engine.pace != 1:
        time, step_s = {cause: engine.pace * seconds for cause, seconds in time.items()}, engine.pace * step_s

    peak_K = in_order(memory.ledger)
    worst = peak_K.argmax(axis=0)
    return StepColumns(
        time=time,
        memory={category: pick(bytes_K, worst) for category, bytes_K in memory.ledger.items()},
        step_time_s=step_s,
        peak_memory_bytes=peak_K.max(axis=0),
        bubble_fraction=bubble_fraction,
        worst_rank=pick(rows.spread(rows.first_KM), worst),
        slowest_rank=pick(rows.spread(rows.first_KM), slowest),
    )


def _num_neighbours(rows: Rows) -> Any:
    """Stages with which each kind of rank exchanges messages: one at the ends, two between; what blocks messages takes
    as long without a pipeline as between two neighbours."""
    last_M = rows.ranks_KM.sum(axis=0) - 1
    neighbours = (rows.first_KM > 0).astype(int) + (rows.first_KM < last_M) + 2 * (last_M == 0)
    return neighbours * (rows.ranks_KM > 0)


@dataclass(frozen=True)
class EndTransfer:
    """A transfer of gradients (beside the last backward) or new parameters (beside the next forward), of one degree:
    seconds that computation does not hide and that it does."""

    root: str
    is_gradient: bool
    exposed_K: Any
    hidden_K: Any


def end_transfers(prepared: Prepared, rows: Rows, forward_K: Any, backward_K: Any) -> Iterator[EndTransfer]:
    """What moves once a step. What one transfer has taken of the time beside it is not there for another: else faster
    computation could make a step slower."""
    priced = prepared.priced
    windows = {"step_gradient": backward_K, "step_parameter": forward_K}
    for name_of, axes, columns in prepared.moves:
        took = rows.add(columns)
        for axis, share in attributed(axes, priced.degrees).items():
            root = root_axis(axis)
            behind = exposed_behind(took, rows.column(priced.machine.exposed.get(root, 1.0)), windows[name_of])
            ours = rows.column(share)
            yield EndTransfer(root, name_of == "step_gradient", ours * behind, ours * (took - behind))
        windows[name_of] = np.maximum(windows[name_of] - took, 0.0)


def tied_exchanges(prepared: Prepared, rows: Rows) -> Iterator[tuple[tuple[str, str], Any, Any]]:
    """Pairs of blocks with a tied parameter, the kinds of rank that hold one of them alone, and the seconds in which
    both exchange their gradients, to go on with the sum."""
    priced = prepared.priced
    gradient = state_bytes(priced.machine.engine, priced.workload).gradient
    for one, other in priced.graph.tied:
        took = _point_to_point(priced, parameter_numel(priced, other) * gradient)
        owners = (one.split("/")[0], other.split("/")[0])
        yield owners, rows.holds_one(*owners), rows.column(priced.machine.exposed.get("pp", 1.0) * took)


def _step_end(
    prepared: Prepared, rows: Rows, turn: Turns, num_virtual: Any, schedule: str
) -> tuple[dict[str, Any], Any]:
    """Seconds after the last backward of the first rank, by cause and in all, of the rank that ends last: reduction,
    update, gathering of parameters. The ranks behind the first have ended their backwards before it; without a flush
    there is no such head start."""
    forward_K, backward_K = turn.forward_K, turn.backward_K
    exposed: dict[str, Any] = {}
    for move in end_transfers(prepared, rows, forward_K, backward_K):
        exposed[f"exposed_{move.root}"] = exposed.get(f"exposed_{move.root}", 0.0) + move.exposed_K
    for _, apart, took in tied_exchanges(prepared, rows):
        exposed["exposed_pp"] = exposed.get("exposed_pp", 0.0) + apart * took
    exposed["optimizer"] = rows.add(prepared.update_s)
    # Padding has no backward to be the shortest.
    shortest_s = (backward_K + np.where(rows.spread(rows.ranks_KM > 0), 0.0, np.inf)).min(axis=0) / num_virtual
    total, first_K = in_order(exposed), rows.spread(rows.first_KM)
    shortest_s = shortest_s * (not is_asynchronous(schedule))
    last = (total - first_K * shortest_s).argmax(axis=0)
    ends_s, ahead = pick(total, last), pick(first_K, last) * shortest_s
    # What is hidden is taken off each cause in proportion.
    left_s = np.maximum(ends_s - ahead, 0.0)
    share = left_s / np.maximum(ends_s, 1e-300)
    return {cause: share * pick(seconds, last) for cause, seconds in exposed.items()}, left_s


# --- what goes with a step: utilisation and communication ------------------------------------------------------------


def utilisation(
    graph: Graph, workload: Workload, recompute: Mapping[str, Recompute], peak_flops: Any
) -> tuple[float, float]:
    """MFU and HFU times the step's seconds: three forwards of the model, and what is recomputed besides, over the
    dense peak of all devices."""
    model = 3 * graph.forward_flops(workload.global_batch, workload.seq_len)
    return model / peak_flops, (model + recomputed_flops(graph, workload, recompute)) / peak_flops


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


def communication_ledger(
    priced: PricedLayouts,
    prices: Mapping[str, StatePrice],
    recompute: Mapping[str, Recompute],
    rows: Rows,
    members: Members,
    messages_M: Any,
) -> dict[str, Any]:
    """Bytes that the busiest rank sends per step, by mesh axis (see `attributed` for joint collectives); `messages_M`
    are those that it sends to other stages for a microbatch."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    m = members.num_microbatches_M
    updates = m if updates_each_microbatch(members.schedule) else 1
    sent: dict[str, Any] = {}

    def add(axes: tuple[str, ...], name: str, value_U: Any, times: Any) -> None:
        for axis, share in attributed(axes, priced.degrees).items():
            column = stacked(priced, [[value_U * share]])
            sent[axis] = sent.get(axis, 0.0) + times * rows.add({name: column})

    for name, block in priced.blocks.items():
        again = 2 if recompute[name] is Recompute.FULL else 1
        for axes, value in block.forward.bytes.items():
            add(axes, name, again * value, m)
        for axes, value in block.backward.bytes.items():
            add(axes, name, value, m)
        for field_name, size, times in (
            ("each_use", 2 * bytes_.parameter, m),
            ("each_backward", bytes_.gradient, m),
            ("step_gradient", bytes_.gradient, updates),
            ("step_parameter", bytes_.parameter, updates),
        ):
            moves = state_moves(priced, getattr(prices[name], field_name), size)
            for axes, value in moves.bytes.items():
                add(axes, name, value, times)
    columns = {axis: value.max(axis=0)[0, 0] for axis, value in sent.items()}
    tied: Any = 0.0
    for one, other in priced.graph.tied:
        apart = rows.holds_one(one.split("/")[0], other.split("/")[0])[:, 0, 0]
        tied = tied + (apart * rows.column(parameter_numel(priced, other))).max(axis=0) * bytes_.gradient
    columns["pp"] = messages_M * m * rows.column(message_bytes(priced)) + tied
    return columns
