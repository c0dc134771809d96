"""Memory of each kind of pipeline rank, by category: state, activations in flight, what a step needs besides.

Legend as in `stages`. What depends on a layout alone is prepared once (`memory_columns`), then summed over what each
rank holds (`memory_ledger`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.block import StatePrice
from meshwright.cost.layouts import PricedLayouts, end_blocks, state_bytes
from meshwright.cost.passes import in_order
from meshwright.cost.stages import Members, Rows
from meshwright.engine import Footprint
from meshwright.schedule import num_deferred, peak_in_flight, weight_versions
from meshwright.sharding import StatePlacement, group_size, shards_of
from meshwright.strategy import Recompute

#: Share of a device's memory that a plan leaves free: allocators round, fragment and need room to move.
MEMORY_RESERVE = 0.06  # [derived] published runs within 6 % of the card were slowed by allocator retries

#: Blocks whose parameters are gathered at once under ZeRO-3: the one in use and the one fetched ahead.
GATHERED_BLOCKS = 2  # [spec: FSDP2's default prefetch]

States = Sequence[tuple[StatePlacement, Mapping[str, StatePrice]]]
Recomputes = Sequence[Mapping[str, Recompute]]
ByBlock = dict[str, Any]


@dataclass(frozen=True)
class MemoryColumns:
    """Bytes per block: of each kind of state and what its update needs besides (Z x 1 x U), kept for the backward
    (1 x C x U; `kept_head` apart, of which one microbatch is in flight), copies gathered in the forward, and what
    exists once, of the largest block. `tied` are bytes of tied parameters, by the kinds of state, that a rank holding
    both ends does not hold twice."""

    state: dict[str, ByBlock]
    update: ByBlock
    tied: dict[str, list[tuple[str, str, Any]]]
    kept: ByBlock
    kept_head: ByBlock
    copies: ByBlock
    redone: ByBlock
    working: ByBlock
    gathered: ByBlock
    habits: Footprint
    device_bytes: float


@dataclass(frozen=True)
class Memory:
    """Bytes on each kind of rank by category, at the moment that needs most (K x Z x C x M, with ones where a category
    does not depend), and what had to be freed and allocated again in each microbatch to stay within the device."""

    ledger: dict[str, Any]
    reallocated: Any


def memory_columns(priced: PricedLayouts, states: States, recomputes: Recomputes) -> MemoryColumns:
    """What memory needs of layouts."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    blocks = priced.blocks

    def per_state(value: Callable[[StatePlacement, StatePrice], Any]) -> ByBlock:
        return {name: stacked(priced, [[value(state, prices[name])] for state, prices in states]) for name in blocks}

    def per_recompute(value: Callable[[str, Recompute], Any], names: Sequence[str]) -> ByBlock:
        return {name: stacked(priced, [[value(name, kinds[name]) for kinds in recomputes]]) for name in names}

    def held(kind: str) -> ByBlock:
        size = getattr(bytes_, kind)
        return per_state(lambda state, price: size * (price.shard_numel if getattr(state, kind) else price.numel))

    habits = priced.machine.engine.memory

    def kept(name: str, kind: Recompute) -> Any:
        return blocks[name].kept_bytes[kind]

    def gradient(state: StatePlacement, price: StatePrice) -> Any:
        copy = 0 if state.gradient else bytes_.gradient_copy
        return bytes_.gradient * (price.shard_numel if state.gradient else price.numel) + copy * price.numel

    last = priced.graph.sequence[-1]
    head = [last] if last in end_blocks(priced.graph) else []  # of equal blocks all the way through none is a head
    return MemoryColumns(
        state={"parameters": held("parameter"), "gradients": per_state(gradient), "optimizer": held("optimizer")},
        update=per_state(lambda state, price: habits.update_bytes * price.numel * state.optimizer),
        tied={
            f"{kind}s" if kind != "optimizer" else kind: [
                (
                    *owners,
                    getattr(bytes_, kind)
                    * stacked(priced, [[_held(priced, path, state, kind)] for state, _ in states]),
                )
                for owners, path in _tied(priced)
            ]
            for kind in ("parameter", "gradient", "optimizer")
        },
        kept=per_recompute(
            lambda name, kind: habits.kept_factor * kept(name, kind), [name for name in blocks if name not in head]
        ),
        kept_head=per_recompute(kept, head),
        copies={name: stacked(priced, [[block.gathered_bytes]]) for name, block in blocks.items()},
        redone=per_recompute(
            lambda name, kind: habits.kept_factor * (kept(name, Recompute.NONE) - kept(name, kind)), list(blocks)
        ),
        working={name: stacked(priced, [[block.working_bytes]]) for name, block in blocks.items()},
        gathered=per_state(
            lambda state, price: (
                (GATHERED_BLOCKS * bytes_.parameter * state.parameter + bytes_.gradient * state.gradient)
                * price.numel
                * (price.shard_numel < price.numel)
            )
        ),
        habits=habits,
        device_bytes=priced.machine.memory_bytes,
    )


@dataclass(frozen=True)
class InFlight:
    """Microbatches of which something is kept for a backward, at most: by kind of rank, as shares of all that a rank
    holds (a rank of two stages with three of one and two of the other: 2.5), and those of the head; and the versions of
    the weights that a schedule without a flush keeps."""

    rank_KM: Any
    head_M: Any
    versions_KM: Any = 1  # of the weights


def memory_ledger(columns: MemoryColumns, rows: Rows, held: InFlight, waits: Any) -> Memory:
    """What each kind of rank needs; `waits` where its host waits for its device (Z x C x M, or 1)."""
    habits = columns.habits
    in_flight = rows.spread(held.rank_KM)
    gaps = habits.gaps * (rows.ranks_KM.sum(axis=0) > 2)
    state = {}
    for category, per_block in columns.state.items():
        state[category] = rows.add(per_block)
        for one, other, size in columns.tied[category]:
            state[category] = state[category] - rows.holds_both(one, other) * rows.column(size)
    if np.max(held.versions_KM) > 1:
        state["weight_versions"] = rows.spread(held.versions_KM - 1) * state["parameters"]
    state["reserved"] = habits.reserved_bytes * rows.spread(rows.ranks_KM > 0)
    passes = {
        "activations": (in_flight + gaps) * rows.add(columns.kept) + held.head_M * rows.add(columns.kept_head),
        "recompute_buffer": rows.largest(columns.redone),
        "working_set": rows.largest(columns.working),
        "gathered_state": rows.largest(columns.gathered),
    }
    reallocated: Any = np.zeros_like(in_flight)
    if habits.run_ahead_blocks:
        ahead = in_flight * _held_copies(columns, rows) * ~np.asarray(waits)
        beyond = in_order({**state, **passes}) + ahead - habits.pressed_at * columns.device_bytes
        reallocated = np.clip(beyond, 0.0, ahead)
        passes["run_ahead"] = ahead * (beyond <= 0)
    if not habits.update_bytes:
        return Memory({**state, **passes}, reallocated)
    update, during_passes = rows.add(columns.update), in_order(passes)
    ledger = {**state, **{name: value * (during_passes >= update) for name, value in passes.items()}}
    return Memory({**ledger, "update": update * (during_passes < update)}, reallocated)


def _held_copies(columns: MemoryColumns, rows: Rows) -> Any:
    """Bytes of gathered copies of a microbatch that are held where the host never waits: without a pipeline, or on
    ranks between its ends, of a number of blocks at most."""
    num_ranks = rows.ranks_KM.sum(axis=0)
    free_KM = (num_ranks == 1) | ((rows.first_KM > 0) & (rows.first_KM < num_ranks - 1))
    share_KM = columns.habits.run_ahead_blocks / np.maximum(rows.counts_BKM.sum(axis=0), 1)
    return rows.spread(free_KM * np.minimum(share_KM, 1.0)) * rows.add(columns.copies)


def stacked(priced: PricedLayouts, rows: Sequence[Sequence[Any]]) -> Any:
    """Numbers or columns of U layouts, in rows, as one array, with dims for all choices of the machine."""
    values = [[np.asarray(value, dtype=float) for value in row] for row in rows]
    least = (1,) * priced.machine.num_choices + np.shape(priced.microbatch)
    shape = np.broadcast_shapes(least, *(value.shape for row in values for value in row))
    return np.stack([np.stack([np.broadcast_to(value, shape) for value in row]) for row in values])


def in_flight(rows: Rows, members: Members) -> InFlight:
    """What named schedules hold, on the first rank of each kind."""
    num_ranks = rows.ranks_KM.sum(axis=0)
    first_KM = np.minimum(rows.first_KM, num_ranks - 1)
    sizes = (num_ranks, members.num_virtual_M, members.num_microbatches_M, first_KM)
    held_KM = peak_in_flight(members.schedule, *sizes) + num_deferred(members.schedule, *sizes)
    head_M = members.num_microbatches_M if members.schedule in ("GPipe", "LoopedBFS") else 1
    return InFlight(held_KM / members.num_virtual_M, head_M, weight_versions(members.schedule, *sizes))


def _tied(priced: PricedLayouts) -> list[tuple[tuple[str, str], str]]:
    """The blocks that own each tied pair, and the path of the parameter."""
    return [((one.split("/")[0], other.split("/")[0]), other) for one, other in priced.graph.tied]


def _held(priced: PricedLayouts, path: str, state: StatePlacement, kind: str) -> Any:
    """Elements of one kind of a parameter's state on a rank."""
    numel = parameter_numel(priced, path)
    if not getattr(state, kind):
        return numel
    block, _, name = path.partition("/")
    return numel / group_size(shards_of(priced.layouts[block].made[name], state), priced.degrees)


def parameter_numel(priced: PricedLayouts, path: str) -> Any:
    """Elements of the parameter `block/name` on a rank."""
    block, _, name = path.partition("/")
    layout = priced.layouts[block]
    return priced.pricing.extents.numel(layout.block.tensor[name].dims, layout.made[name])
