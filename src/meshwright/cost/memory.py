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
from meshwright.cost.stages import Members, Rows
from meshwright.schedule import peak_in_flight
from meshwright.sharding import StatePlacement, group_size, local_numel, shards_of
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
    """Bytes per block: of each kind of state (Z x 1 x U), kept for the backward (1 x C x U; `kept_head` apart, of
    which one microbatch is in flight), and what exists once, of the largest block. `tied` are bytes of tied
    parameters, by the kinds of state, that a rank holding both ends does not hold twice."""

    state: dict[str, ByBlock]
    tied: dict[str, list[tuple[str, str, Any]]]
    kept: ByBlock
    kept_head: ByBlock
    redone: ByBlock
    working: ByBlock
    gathered: ByBlock
    reserved: float


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

    def kept(name: str, kind: Recompute) -> Any:
        return blocks[name].kept_bytes[kind]

    last = priced.graph.sequence[-1]
    head = [last] if last in end_blocks(priced.graph) else []  # of equal blocks all the way through none is a head
    return MemoryColumns(
        state={"parameters": held("parameter"), "gradients": held("gradient"), "optimizer": held("optimizer")},
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
        kept=per_recompute(kept, [name for name in blocks if name not in head]),
        kept_head=per_recompute(kept, head),
        redone=per_recompute(lambda name, kind: kept(name, Recompute.NONE) - kept(name, kind), list(blocks)),
        working={name: stacked(priced, [[_working_bytes(priced, name)]]) for name in blocks},
        gathered=per_state(
            lambda state, price: (
                (GATHERED_BLOCKS * bytes_.parameter * state.parameter + bytes_.gradient * state.gradient)
                * price.numel
                * (price.shard_numel < price.numel)
            )
        ),
        reserved=priced.machine.engine.reserved_bytes,
    )


def memory_ledger(columns: MemoryColumns, rows: Rows, members: Members) -> dict[str, Any]:
    """Bytes on each kind of rank, by category: K x Z x C x M, with ones where a category does not depend."""
    in_flight = rows.spread(_in_flight(rows, members) / members.num_virtual_M)
    every = members.num_microbatches_M if members.schedule == "GPipe" else 1
    state = {}
    for category, held in columns.state.items():
        state[category] = rows.add(held)
        for one, other, size in columns.tied[category]:
            state[category] = state[category] - rows.holds_both(one, other) * rows.column(size)
    return {
        **state,
        "activations": in_flight * rows.add(columns.kept) + every * rows.add(columns.kept_head),
        "recompute_buffer": rows.largest(columns.redone),
        "working_set": rows.largest(columns.working),
        "gathered_state": rows.largest(columns.gathered),
        "reserved": columns.reserved * rows.spread(rows.ranks_KM > 0),
    }


def stacked(priced: PricedLayouts, rows: Sequence[Sequence[Any]]) -> Any:
    """Numbers or columns of U layouts, in rows, as one array, with dims for all choices of the machine."""
    values = [[np.asarray(value, dtype=float) for value in row] for row in rows]
    least = (1,) * priced.machine.num_choices + np.shape(priced.microbatch)
    shape = np.broadcast_shapes(least, *(value.shape for row in values for value in row))
    return np.stack([np.stack([np.broadcast_to(value, shape) for value in row]) for row in values])


def _in_flight(rows: Rows, members: Members) -> Any:
    """Forwards of a chunk whose backward has not ended, at most, on the first rank of each kind."""
    num_ranks = rows.ranks_KM.sum(axis=0)
    return peak_in_flight(
        members.schedule,
        num_ranks,
        members.num_virtual_M,
        members.num_microbatches_M,
        np.minimum(rows.first_KM, num_ranks - 1),
    )


def _working_bytes(priced: PricedLayouts, name: str) -> Any:
    """The operands of a block's largest operator, whose gradients exist while it runs backward."""
    return np.maximum.reduce([np.asarray(price.bytes, dtype=float) for price in priced.blocks[name].operators])


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
    return local_numel(layout.block.tensor[name].dims, layout.made[name], priced.pricing.sizes, priced.degrees)
