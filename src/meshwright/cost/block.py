"""Prices of a block under a layout: derived once, composed into any number of strategies.

A `BlockPrice` holds what one rank does for one microbatch in one block: seconds of its operators, of each transfer by
the axes it runs over, bytes that it keeps for the backward under each kind of recomputation, and its share of the
parameters with what their state moves. Everything is a number or a column with one entry per layout (degrees and
microbatch); nothing here knows what an axis is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Level
from meshwright.cost.comm import collective_time, mesh_group
from meshwright.cost.compute import DeviceRates, OperatorPrice, price_operator
from meshwright.engine import Engine
from meshwright.graph import Role
from meshwright.sharding import (
    BlockLayout,
    Phase,
    StatePlacement,
    StateTransfers,
    Step,
    Transfer,
    group_size,
    local_numel,
    state_transfers,
    tensor_numel,
    traffic,
)
from meshwright.strategy import Recompute, root_axis
from meshwright.workload import Workload

#: Axes of one collective, and the bytes that a rank sends and the seconds that it takes.
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """Everything about hardware and software that pricing needs."""

    rates: DeviceRates
    levels: tuple[Level, ...]
    engine: Engine


@dataclass(frozen=True)
class Communication:
    """Bytes sent and seconds spent by a rank, per joint group of axes."""

    bytes: dict[Axes, Any]
    seconds: dict[Axes, Any]


@dataclass(frozen=True)
class BlockPrice:
    """See the module's docstring. Times are of one microbatch in seconds, sizes in bytes; `launch` are the host's."""

    operators: tuple[OperatorPrice, ...]
    flops: Any
    math_s: Any
    memory_s: Any
    math_backward_s: Any
    memory_backward_s: Any
    launch_s: Any
    forward: Communication
    backward: Communication
    recompute_flops: dict[Recompute, Any]
    recompute_s: dict[Recompute, Any]
    kept_bytes: dict[Recompute, Any]
    exit_bytes: Any
    exit_whole_bytes: Any


@dataclass(frozen=True)
class StatePrice:
    """The parameters of a block on one rank: elements of each, and the transfers of their state as merged messages."""

    numel: Any
    each_use: tuple[tuple[Step, Any], ...]
    each_backward: tuple[tuple[Step, Any], ...]
    step_gradient: tuple[tuple[Step, Any], ...]
    step_parameter: tuple[tuple[Step, Any], ...]


def price_block(
    layout: BlockLayout, sizes: Mapping[str, Any], degrees: Mapping[str, Any], machine: Machine, workload: Workload
) -> BlockPrice:
    """Price a block; `sizes` of all dims (batch: sequences of a microbatch on all data-parallel ranks), `degrees` of
    all axes, outermost first."""
    prices = tuple(
        price_operator(layout.block, operator, sizes, degrees, machine.rates, machine.engine, workload)
        for operator in layout.operators
    )
    launch_s = machine.engine.operator_launch_s
    forward = _communication(layout, (Phase.FORWARD,), sizes, degrees, machine, workload)
    grouped = {item.name for item in layout.block.operators if item.recompute_group}
    again = [price for price in prices if price.name in grouped]
    leaving = [layout.block.tensor[name] for name in layout.block.outputs]
    return BlockPrice(
        operators=prices,
        flops=sum(price.flops for price in prices),
        math_s=sum(price.math_s for price in prices),
        memory_s=sum(price.memory_s for price in prices),
        math_backward_s=sum(price.math_backward_s for price in prices),
        memory_backward_s=sum(price.memory_backward_s for price in prices),
        launch_s=launch_s * len(prices),
        forward=forward,
        backward=_communication(layout, (Phase.BACKWARD, Phase.REGATHER), sizes, degrees, machine, workload),
        recompute_flops={
            Recompute.NONE: 0.0,
            Recompute.SELECTIVE: sum(price.flops for price in again),
            Recompute.FULL: sum(price.flops for price in prices),
        },
        recompute_s={
            Recompute.NONE: 0.0,
            Recompute.SELECTIVE: sum(price.math_s + price.memory_s for price in again),
            Recompute.FULL: sum(price.math_s + price.memory_s for price in prices),
        },
        kept_bytes={kind: kept_bytes(layout, kind, sizes, degrees, workload) for kind in Recompute},
        exit_bytes=sum(
            local_numel(tensor.dims, layout.made[f"{tensor.name}@out"], sizes, degrees)
            * workload.bytes_of(tensor.dtype)
            for tensor in leaving
        ),
        exit_whole_bytes=sum(tensor_numel(tensor, sizes) * workload.bytes_of(tensor.dtype) for tensor in leaving),
    )


def kept_bytes(
    layout: BlockLayout,
    recompute: Recompute,
    sizes: Mapping[str, Any],
    degrees: Mapping[str, Any],
    workload: Workload,
) -> Any:
    """Bytes of activations that a block keeps from its forward to its backward.

    Each tensor that some backward reads, once, as it lies (`BlockLayout.kept`). Selective recomputation drops what is
    made and read only inside a recompute group; full recomputation keeps the block's inputs alone. Statistics of
    normalisations are left out, as in the literature's formulas (2205.05198, equations 1-6).
    """
    total: Any = 0
    for name in kept_names(layout, recompute):
        placements = layout.kept.get(name, layout.made[name])
        tensor = layout.block.tensor[name]
        total = total + local_numel(tensor.dims, placements, sizes, degrees) * workload.bytes_of(tensor.dtype)
    return total


def kept_names(layout: BlockLayout, recompute: Recompute) -> tuple[str, ...]:
    """The tensors that `kept_bytes` counts."""
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


def _communication(
    layout: BlockLayout,
    phases: Sequence[Phase],
    sizes: Mapping[str, Any],
    degrees: Mapping[str, Any],
    machine: Machine,
    workload: Workload,
) -> Communication:
    bytes_: dict[Axes, Any] = defaultdict(float)
    seconds: dict[Axes, Any] = defaultdict(float)
    for transfer in layout.transfers:
        if transfer.phase in phases:
            sent, took_s = price_transfer(layout, transfer, sizes, degrees, machine, workload)
            bytes_[transfer.step.axes] = bytes_[transfer.step.axes] + sent
            seconds[transfer.step.axes] = seconds[transfer.step.axes] + took_s
    return Communication(dict(bytes_), dict(seconds))


def price_transfer(
    layout: BlockLayout,
    transfer: Transfer,
    sizes: Mapping[str, Any],
    degrees: Mapping[str, Any],
    machine: Machine,
    workload: Workload,
) -> tuple[Any, Any]:
    """Bytes that a rank sends in one transfer of a block, and its seconds."""
    tensor = layout.block.tensor[transfer.tensor]
    size = local_numel(tensor.dims, transfer.step.larger, sizes, degrees) * workload.bytes_of(tensor.dtype)
    return price_step(transfer.step, size, degrees, machine)


def price_step(step: Step, size_bytes: Any, degrees: Mapping[str, Any], machine: Machine) -> tuple[Any, Any]:
    """Bytes that a rank sends in one collective, and its seconds; `size_bytes` is the larger side's local size."""
    group = mesh_group(step.axes, degrees, machine.levels)
    sent = traffic(step.collective, group_size(step.axes, degrees), size_bytes)
    return sent, collective_time(step.collective, group, size_bytes, machine.levels, machine.engine.collective_skew_s)


def price_state(
    layout: BlockLayout, state: StatePlacement, sizes: Mapping[str, Any], degrees: Mapping[str, Any]
) -> StatePrice:
    """The parameters of a block and what moves them; sizes in elements, the type is the composer's business.

    Transfers of one kind over the same axes go as one message: a block is the unit in which state is gathered.
    """
    merged: dict[str, dict[tuple[Any, ...], tuple[Step, Any]]] = {name: {} for name in _STATE_FIELDS}
    numel: Any = 0
    for tensor in layout.block.parameters:
        stored = layout.made[tensor.name]
        numel = numel + local_numel(tensor.dims, stored, sizes, degrees)
        moves = state_transfers(stored, layout.partial_gradients[tensor.name], state)
        for name in _STATE_FIELDS:
            for step in _steps_of(moves, name):
                size = local_numel(tensor.dims, step.larger, sizes, degrees)
                key = (step.collective, step.axes)
                merged[name][key] = (step, merged[name].get(key, (step, 0))[1] + size)
    return StatePrice(numel, *(tuple(merged[name].values()) for name in _STATE_FIELDS))


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


def exposed_seconds(seconds: Mapping[Axes, Any], degrees: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """Seconds that computation cannot hide, by degree."""
    exposed: dict[str, Any] = defaultdict(float)
    for axes, took_s in seconds.items():
        for axis, share in attributed(axes, degrees).items():
            root = root_axis(axis)
            exposed[root] = exposed[root] + engine.exposed.get(root, 1.0) * share * took_s
    return dict(exposed)
