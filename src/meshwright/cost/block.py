"""Prices of a block under a layout: derived once, composed into any number of strategies.

A `BlockPrice` holds what one rank does for one microbatch in one block: seconds of its operators, of each transfer by
the axes it runs over, bytes that it keeps for the backward under each kind of recomputation, and its share of the
parameters with what their state moves. Everything is a number or a column with one entry per layout (degrees and
microbatch); nothing here knows what an axis is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.comm import Took, Wires, collective_time
from meshwright.cost.compute import OperatorPrice, Pricing, is_quantized, price_operators
from meshwright.cost.extents import Extents
from meshwright.graph import Role
from meshwright.sharding import (
    BlockLayout,
    Collective,
    Phase,
    StatePlacement,
    StateTransfers,
    Step,
    Transfer,
    shards_of,
    state_transfers,
    tensor_numel,
    traffic,
)
from meshwright.strategy import Recompute, root_axis

#: Axes of one collective.
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Communication:
    """What a rank sends: bytes and seconds per joint group of axes; of the seconds those that hops take, the number of
    collectives, the doublings that their groups take and the ranks of these, summed (groups of one count for nothing),
    and the ranks of the largest."""

    bytes: dict[Axes, Any]
    seconds: dict[Axes, Any]
    latency_s: Any = 0.0
    count: Any = 0
    doublings: Any = 0
    ranks: Any = 0
    largest: Any = 1


@dataclass(frozen=True)
class BlockPrice:
    """See the module's docstring. Times are of one microbatch in seconds, sizes in bytes; of `backward_s`, `weight_s`
    makes gradients of parameters. `launches` is how many operators the host is charged for starting in a forward."""

    operators: tuple[OperatorPrice, ...]
    forward_s: Any
    backward_s: Any
    weight_s: Any
    launches: Any
    recompute_s: dict[Recompute, Any]
    recompute_launches: dict[Recompute, Any]
    forward: Communication
    backward: Communication
    kept_bytes: dict[Recompute, Any]
    working_bytes: Any
    gathered_bytes: Any
    exit_bytes: Any
    exit_whole_bytes: Any


@dataclass(frozen=True)
class StatePrice:
    """The parameters of a block on one rank: elements, elements where state is sharded, and the transfers of their
    state as merged messages."""

    numel: Any
    shard_numel: Any
    each_use: tuple[tuple[Step, Any], ...]
    each_backward: tuple[tuple[Step, Any], ...]
    step_gradient: tuple[tuple[Step, Any], ...]
    step_parameter: tuple[tuple[Step, Any], ...]


def price_block(layout: BlockLayout, pricing: Pricing, levels: Wires, *, is_end: bool) -> BlockPrice:
    """Price a block; `is_end` where it is the embedding or the head of a model."""
    block = layout.block
    prices = price_operators(layout.operators, block, pricing, is_end=is_end)
    grouped = {item.name for item in block.operators if item.recompute_group}
    again = [price for price in prices if price.name in grouped]
    leaving = [block.tensor[name] for name in block.outputs]
    bytes_of = pricing.workload.bytes_of
    return BlockPrice(
        operators=prices,
        forward_s=sum(price.forward_s for price in prices),
        backward_s=sum(price.backward_s for price in prices),
        weight_s=sum(price.weight_s for price in prices),
        launches=sum(price.launches for price in prices),
        recompute_s={
            Recompute.NONE: 0.0,
            Recompute.SELECTIVE: sum(price.forward_s for price in again),
            Recompute.FULL: sum(price.forward_s for price in prices),
        },
        recompute_launches={
            Recompute.NONE: 0,
            Recompute.SELECTIVE: sum(price.launches for price in again),
            Recompute.FULL: sum(price.launches for price in prices),
        },
        forward=_communication(layout, (Phase.FORWARD,), pricing, levels),
        backward=_communication(layout, (Phase.BACKWARD, Phase.REGATHER), pricing, levels),
        kept_bytes={kind: sum(kept_bytes(layout, kind, pricing, is_end=is_end).values()) for kind in Recompute},
        working_bytes=_working_bytes(layout, prices, pricing),
        gathered_bytes=sum(
            _transferred_bytes(layout, transfer, pricing)
            for transfer in layout.transfers
            if transfer.phase is Phase.FORWARD and transfer.step.collective is Collective.ALL_GATHER
        ),
        exit_bytes=sum(
            pricing.extents.numel(tensor.dims, layout.made[f"{tensor.name}@out"]) * bytes_of(tensor.dtype)
            for tensor in leaving
        ),
        exit_whole_bytes=sum(tensor_numel(item, pricing.extents.sizes) * bytes_of(item.dtype) for item in leaving),
    )


def kept_bytes(layout: BlockLayout, recompute: Recompute, pricing: Pricing, *, is_end: bool) -> dict[str, Any]:
    """Bytes of the activations that a block keeps from its forward to its backward, by tensor.

    Each tensor that some backward reads, once, as it lies (`BlockLayout.kept`); what a product in a smaller type reads
    is kept in that type, beside the tensor itself where another operator reads that. Selective recomputation drops what
    is made and read only inside a recompute group; full recomputation keeps the block's inputs alone. Statistics of
    normalisations are left out, as in the literature's formulas (2205.05198, equations 1-6).
    """
    block, kept = layout.block, {}
    readers: dict[str, set[bool]] = defaultdict(set)
    for item in block.operators:
        for name in item.saves:
            readers[name].add(is_quantized(block, item, pricing, is_end=is_end))
    for name in _kept_names(layout, recompute):
        tensor = block.tensor[name]
        size: float = 0
        if readers[name] != {True} or recompute is Recompute.FULL:
            size += pricing.workload.bytes_of(tensor.dtype)
        if True in readers[name] and recompute is not Recompute.FULL:
            size += pricing.rates.product_bytes or 0
        placements = layout.kept.get(name, layout.made[name])
        kept[name] = pricing.extents.numel(tensor.dims, placements) * size
    return kept


def _kept_names(layout: BlockLayout, recompute: Recompute) -> tuple[str, ...]:
    block = layout.block
    if recompute is Recompute.FULL:
        names = set(block.inputs) | {name for name in layout.kept if block.tensor[name].role is Role.INPUT}
    elif recompute is Recompute.SELECTIVE:
        inside = {name for item in block.operators if item.recompute_group for name in item.outputs}
        names = {name for item in block.operators if not item.recompute_group for name in item.saves}
        names |= {name for item in block.operators if item.recompute_group for name in item.saves} - inside
    else:
        names = set(layout.kept)
    return tuple(sorted(names))


def _working_bytes(layout: BlockLayout, prices: Sequence[OperatorPrice], pricing: Pricing) -> Any:
    """Bytes that exist beside what is kept while a block runs backward: the operands of its largest operator, and
    logits with their copies and gradient as the engine's loss makes them."""
    block, total = layout.block, np.zeros(())
    logits = [item.inputs[0] for item in block.operators if item.kind == "cross_entropy"]
    dims = {block.tensor[name].dims for name in logits}
    for item, price in zip(block.operators, prices, strict=True):
        if dims.isdisjoint(block.tensor[name].dims for name in (*item.inputs, *item.outputs)):
            total = np.maximum(total, price.bytes)
    for name in logits:
        tensor = block.tensor[name]
        beside = pricing.engine.memory.logit_bytes - pricing.workload.bytes_of(tensor.dtype)
        numel = pricing.extents.numel(tensor.dims, layout.made[name])
        total = np.maximum(total, max(beside, 0.0) * numel)
    return total


def _communication(layout: BlockLayout, phases: Sequence[Phase], pricing: Pricing, levels: Wires) -> Communication:
    moves = [
        (transfer.step, price_transfer(layout, transfer, pricing, levels))
        for transfer in layout.transfers
        if transfer.phase in phases
    ]
    return communication(moves, pricing.extents)


def communication(moves: Iterable[tuple[Step, Moved]], extents: Extents) -> Communication:
    """Moves with what each takes, summed."""
    bytes_: dict[Axes, Any] = defaultdict(float)
    seconds: dict[Axes, Any] = defaultdict(float)
    latency_s: Any = 0.0
    count: Any = 0
    doubled: Any = 0
    ranks: Any = 0
    largest: Any = 1
    for step, moved in moves:
        bytes_[step.axes] = bytes_[step.axes] + moved.bytes
        seconds[step.axes] = seconds[step.axes] + moved.took.seconds
        latency_s = latency_s + moved.took.latency_s
        size = np.asarray(extents.ranks(step.axes))
        count, doubled, ranks = count + (size > 1), doubled + extents.doublings(step.axes), ranks + size * (size > 1)
        largest = np.maximum(largest, size)
    return Communication(dict(bytes_), dict(seconds), latency_s, count, doubled, ranks, largest)


@dataclass(frozen=True)
class Moved:
    """Bytes that a rank sends in one collective, and what it takes."""

    bytes: Any
    took: Took


def price_transfer(layout: BlockLayout, transfer: Transfer, pricing: Pricing, levels: Wires) -> Moved:
    """What one transfer of a block takes."""
    return price_step(transfer.step, _transferred_bytes(layout, transfer, pricing), pricing, levels)


def _transferred_bytes(layout: BlockLayout, transfer: Transfer, pricing: Pricing) -> Any:
    """The larger side's local size."""
    tensor = layout.block.tensor[transfer.tensor]
    numel = pricing.extents.numel(tensor.dims, transfer.step.larger)
    return numel * pricing.workload.bytes_of(tensor.dtype)


def price_step(step: Step, size_bytes: Any, pricing: Pricing, levels: Wires) -> Moved:
    """What one collective takes; `size_bytes` is the larger side's local size."""
    if pricing.networks:
        levels = pricing.networks.get(_booked_on(step, pricing.extents.degrees), levels)
    group = pricing.extents.group(step.axes, tuple(level.group_size for level in levels))
    sent = traffic(step.collective, group.num_ranks, size_bytes)
    return Moved(sent, collective_time(step.collective, group, size_bytes, levels))


def _booked_on(step: Step, degrees: Mapping[str, Any]) -> str:
    """The degree whose network a collective runs over: that of its first axis of more than one rank."""
    return root_axis(next((axis for axis in step.axes if np.max(degrees[axis]) > 1), step.axes[0]))


def price_state(layout: BlockLayout, state: StatePlacement, pricing: Pricing) -> StatePrice:
    """The parameters of a block and what moves them; sizes in elements, the type is the composer's business.

    Transfers of one kind over the same axes go as one message: a block is the unit in which state is gathered.
    """
    merged: dict[str, dict[tuple[Any, ...], tuple[Step, Any]]] = {name: {} for name in _STATE_FIELDS}
    numel: Any = 0
    shard_numel: Any = 0
    for tensor in layout.block.parameters:
        stored = layout.made[tensor.name]
        held = pricing.extents.numel(tensor.dims, stored)
        numel = numel + held
        shard_numel = shard_numel + held / pricing.extents.ranks(shards_of(stored, state))
        moves = state_transfers(stored, layout.partial_gradients[tensor.name], state)
        for name in _STATE_FIELDS:
            for step in _steps_of(moves, name):
                size = pricing.extents.numel(tensor.dims, step.larger)
                key = (step.collective, step.axes)
                merged[name][key] = (step, merged[name].get(key, (step, 0))[1] + size)
    return StatePrice(numel, shard_numel, *(tuple(merged[name].values()) for name in _STATE_FIELDS))


_STATE_FIELDS = ("each_use", "each_backward", "step_gradient", "step_parameter")


def _steps_of(moves: StateTransfers, name: str) -> tuple[Step, ...]:
    steps: tuple[Step, ...] = getattr(moves, name)
    return steps


def attributed(axes: Axes, degrees: Mapping[str, Any]) -> dict[str, Any]:
    """For a joint collective, the axis that it is booked on: the outermost of more than one rank, as a 0/1 column.

    A strategy whose mesh leaves out axes of size 1 and a column in which they stand as 1 are booked alike.
    """
    order = [axis for axis in degrees if axis in axes]
    shares = {}
    free: Any = 1.0
    for axis in order:
        here = free * (np.asarray(degrees[axis]) > 1)
        shares[axis] = here
        free = free - here
    return shares


def by_root(seconds: Mapping[Axes, Any], degrees: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds by the degree on which each joint collective is booked."""
    booked: dict[str, Any] = defaultdict(float)
    for axes, took_s in seconds.items():
        for axis, share in attributed(axes, degrees).items():
            booked[root_axis(axis)] = booked[root_axis(axis)] + share * took_s
    return dict(booked)
