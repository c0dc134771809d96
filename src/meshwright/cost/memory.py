"""Memory of each kind of pipeline rank, by category: state, activations in flight, what a step needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from meshwright.cost.block import StatePrice
from meshwright.cost.layouts import PricedLayouts, state_bytes, state_shards
from meshwright.cost.stages import Family, Rows
from meshwright.schedule import peak_in_flight
from meshwright.sharding import local_numel
from meshwright.strategy import Recompute

#: Share of a device's memory that a plan leaves free: allocators round, fragment and need room to move.
MEMORY_RESERVE = 0.06  # [derived] published runs within 6 % of the card were slowed by allocator retries

#: Blocks whose parameters are gathered at once under ZeRO-3: the one in use and the one fetched ahead.
GATHERED_BLOCKS = 2  # [spec: FSDP2's default prefetch]


def memory_ledger(
    priced: PricedLayouts, states: Mapping[str, StatePrice], rows: Rows, family: Family
) -> dict[str, Any]:
    """Bytes on each kind of rank, by category."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    numel_RK = rows.add({name: state.numel for name, state in states.items()}) - tied_numel(priced, rows)[0]
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


def _in_flight(rows: Rows, family: Family) -> Any:
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


def tied_numel(priced: PricedLayouts, rows: Rows) -> tuple[Any, Any]:
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
