"""A step of training: priced blocks composed over stages, microbatches and state, on columns of strategies.

The same code prices one strategy (columns of length one) and a whole space. A `Family` holds strategies that differ in
numbers alone: the same splits, schedule, recomputation and ZeRO level. Legend of shape suffixes: U layouts (degrees
and microbatch), R strategies, K kinds of pipeline rank (equal stages folded), padded with ranks that hold nothing.

Assumptions: ranks of one kind are equally fast; communication that computation could hide is exposed to the engine's
share, or to what is left over where there is not enough computation; the step ends when the slowest rank has reduced
its gradients, updated and gathered its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.block import (
    StatePrice,
    attributed,
    exposed_seconds,
    price_step,
)
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.layouts import PricedLayouts, state_bytes, state_shards
from meshwright.cost.memory import memory_ledger, tied_numel
from meshwright.cost.pipeline import pipeline_time
from meshwright.cost.stages import Family, RankTable, Rows
from meshwright.engine import Engine
from meshwright.graph import Graph, operator_flops
from meshwright.sharding import group_size
from meshwright.strategy import Recompute, root_axis
from meshwright.workload import Workload

#: The update reads and writes each state once, reads the gradient and writes the parameter.
UPDATE_PASSES = 2  # [derived]


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


# --- composition ---------------------------------------------------------------------------------------------------


def evaluate(priced: PricedLayouts, states: Mapping[str, StatePrice], tables: RankTable, family: Family) -> StepColumns:
    """Price every strategy of a family."""
    rows = Rows(tables, family, priced)
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
    memory_RK = memory_ledger(priced, states, rows, family)
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


def _messages(priced: PricedLayouts, rows: Rows, family: Family) -> tuple[Any, Any]:
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


def _message_seconds(priced: PricedLayouts, rows: Rows, size_RK: Any) -> Any:
    """Seconds of a message of each rank to another pipeline rank."""
    others = [axis for axis in priced.degrees if axis != "pp"]
    stride = rows.column(group_size(others, priced.degrees))[:, None]
    return point_to_point_time(size_RK, stride, priced.machine.levels)


def _step_end(
    priced: PricedLayouts,
    states: Mapping[str, StatePrice],
    rows: Rows,
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
    shared_RK, single_RK = tied_numel(priced, rows)
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


def _time_ledger(
    passes: Mapping[str, tuple[Pass, Pass]], rows: Rows, slowest_R: Any, message_s: Any, family: Family
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
    priced: PricedLayouts, states: Mapping[str, StatePrice], rows: Rows, family: Family, message_bytes_R: Any
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
    tied_R = tied_numel(priced, rows)[1].max(axis=1) * bytes_.gradient
    columns["pp"] = per_microbatch_R * family.num_microbatches_R * message_bytes_R + tied_R
    return columns
