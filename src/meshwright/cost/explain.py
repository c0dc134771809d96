"""An estimate down to its leaves: which operator, which tensor, which collective makes each number.

The leaves come from the prices that the estimate was composed of, so they sum to its entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import Case, estimate_of, evaluate_cases
from meshwright.cost.block import attributed, kept_bytes, price_transfer
from meshwright.cost.layouts import PricedLayouts, end_blocks, state_bytes
from meshwright.cost.stages import rank_table
from meshwright.engine import Engine
from meshwright.graph import Block, Graph
from meshwright.results import Estimate
from meshwright.sharding import BlockLayout, Phase, Placements, local_size
from meshwright.strategy import Recompute, Strategy, root_axis
from meshwright.units import format_bytes, format_count, format_flops
from meshwright.workload import Workload


@dataclass(frozen=True)
class Leaf:
    """A number with its name, its unit (`s` or `B`), how it came about, and the numbers that it sums."""

    name: str
    value: float
    unit: str
    note: str = ""
    children: tuple[Leaf, ...] = ()


@dataclass(frozen=True)
class TensorPlacement:
    """Where a tensor lies: its placement on each mesh axis and its local shape, by dim."""

    block: str
    tensor: str
    placements: dict[str, str]
    local_shape: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """An estimate, its time and memory as trees, and the placement of every tensor of every block."""

    estimate: Estimate
    time: Leaf
    memory: Leaf
    placements: tuple[TensorPlacement, ...]


@dataclass(frozen=True)
class _Context:
    graph: Graph
    strategy: Strategy
    workload: Workload
    priced: PricedLayouts
    states: Mapping[str, Any]
    counts: Mapping[str, int]
    turns: int


def explain(graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine) -> Explanation:
    """Explain a legal strategy's estimate."""
    found = evaluate_cases([Case(graph, cluster, strategy, workload, engine)])
    priced, states, columns = found.priced, found.states, found.columns
    estimate = estimate_of(found, 0)
    turns = strategy.num_microbatches(workload)
    slowest, worst = (int(np.ravel(rank)[0]) for rank in (columns.slowest_rank, columns.worst_rank))
    context = _Context(graph, strategy, workload, priced, states, _counts(graph, strategy, slowest), turns)
    time = Leaf(
        "step time",
        estimate.step_time_s,
        "s",
        f"pipeline rank {slowest}, {turns} microbatches",
        tuple(_time_leaf(context, name, value) for name, value in estimate.time.items() if value > 0),
    )
    context = _Context(graph, strategy, workload, priced, states, _counts(graph, strategy, worst), turns)
    memory = Leaf(
        "peak memory",
        estimate.peak_memory_bytes,
        "B",
        f"pipeline rank {worst}",
        tuple(_memory_leaf(context, name, value) for name, value in estimate.memory.items() if value > 0),
    )
    return Explanation(estimate, time, memory, tuple(_placements(context)))


def _counts(graph: Graph, strategy: Strategy, rank: int) -> dict[str, int]:
    own = [stage for stage in strategy.stages if stage.pipeline_rank == rank]
    table = rank_table(graph, [own])
    return {name: int(count) for name, count in zip(table.blocks, table.counts_BKT[:, 0, 0], strict=True) if count}


def _scalar(value: Any) -> float:
    return float(np.atleast_1d(value)[0])


# --- time ----------------------------------------------------------------------------------------------------------


def _time_leaf(context: _Context, name: str, value: float) -> Leaf:
    if name == "compute":
        children = tuple(_compute_leaves(context))
    elif name == "recompute":
        children = tuple(_recompute_leaves(context))
    elif name.startswith("exposed_"):
        children = tuple(_transfer_leaves(context, name.removeprefix("exposed_"), value))
    else:
        children = ()
    return Leaf(name, value, "s", _TIME_NOTES.get(name, ""), children)


_TIME_NOTES = {
    "compute": "operators, forward and backward",
    "recompute": "operators whose results were not kept",
    "launch": "the host starts operators more slowly than the device ends them",
    "bubble": "the slowest rank waits for the pipeline to fill and drain",
    "optimizer": "memory traffic of the update",
    "exposed_pp": "messages between stages",
    "stall": "messages between stages that block, a fault of the engine",
}


def _compute_leaves(context: _Context) -> Iterator[Leaf]:
    bytes_ = state_bytes(context.priced.machine.engine, context.workload)
    for name, count in context.counts.items():
        price, times = context.priced.blocks[name], count * context.turns
        leaves = []
        for operator in price.operators:
            note = f"{format_flops(_scalar(operator.flops))}, " if _scalar(operator.flops) else ""
            leaves.append(
                Leaf(
                    operator.name,
                    times * _scalar(operator.forward_s + operator.backward_s),
                    "s",
                    f"{note}{format_bytes(_scalar(operator.bytes))} forward",
                )
            )
        numel = context.states[name].numel
        accumulate = 2 * bytes_.gradient * numel / context.priced.machine.rates.memory_Bps
        leaves.append(Leaf("gradient accumulation", times * _scalar(accumulate), "s"))
        leaves = [leaf for leaf in leaves if leaf.value > 0]
        yield Leaf(name, sum(leaf.value for leaf in leaves), "s", f"x{count} blocks x {context.turns}", tuple(leaves))


def _recompute_leaves(context: _Context) -> Iterator[Leaf]:
    for name, count in context.counts.items():
        kind = context.strategy.recompute[name]
        seconds = count * context.turns * _scalar(context.priced.blocks[name].recompute_s[kind])
        if seconds:
            yield Leaf(name, seconds, "s", f"{kind.value}, x{count} blocks x {context.turns}")


def _transfer_leaves(context: _Context, root: str, total: float) -> Iterator[Leaf]:
    priced = context.priced
    share = priced.machine.exposed.get(root, 1.0)
    known = 0.0
    for name, count in context.counts.items():
        layout = priced.layouts[name]
        for transfer in layout.transfers:
            booked = [axis for axis, part in attributed(transfer.step.axes, priced.degrees).items() if _scalar(part)]
            if not booked or root_axis(booked[0]) != root:
                continue
            again = context.strategy.recompute[name] is Recompute.FULL and transfer.phase is Phase.FORWARD
            moved = price_transfer(layout, transfer, priced.pricing, priced.machine.levels)
            seconds = share * _scalar(moved.took.seconds) * count * context.turns * (2 if again else 1)
            known += seconds
            sent, axes = format_bytes(_scalar(moved.bytes)), "+".join(transfer.step.axes)
            note = f"{transfer.phase.value}, {sent} each over {axes}"
            yield Leaf(f"{name}/{transfer.tensor} {transfer.step.collective.value}", seconds, "s", note)
    rest = total - known
    if root == "pp":
        yield Leaf("messages", rest, "s", f"{context.strategy.virtual_stages} a microbatch and direction")
    elif rest > 1e-9 * total:
        yield Leaf("training state", rest, "s", "gradients and parameters, what computation could not hide")


# --- memory --------------------------------------------------------------------------------------------------------


def _memory_leaf(context: _Context, name: str, value: float) -> Leaf:
    if name in ("parameters", "gradients", "optimizer"):
        parts = {block: count * _scalar(context.states[block].numel) for block, count in context.counts.items()}
        whole = sum(parts.values())
        children = tuple(
            Leaf(block, value * numel / whole, "B", f"{format_count(numel)} parameters")
            for block, numel in parts.items()
            if numel
        )
        return Leaf(name, value, "B", _state_note(context, name), children)
    if name == "activations":
        return Leaf(
            name,
            value,
            "B",
            "kept for the backward, of all microbatches in flight",
            tuple(_kept_leaves(context, value)),
        )
    return Leaf(name, value, "B", _MEMORY_NOTES.get(name, ""))


_MEMORY_NOTES = {
    "recompute_buffer": "one block's activations while it is computed again",
    "working_set": "operands of the largest operator, whose gradients exist while it runs",
    "gathered_state": "parameters and gradients of the blocks in use, gathered",
    "reserved": "context and communication buffers",
}


def _state_note(context: _Context, name: str) -> str:
    state = context.strategy.state
    sharded = {"parameters": state.parameter, "gradients": state.gradient, "optimizer": state.optimizer}[name]
    per = getattr(state_bytes(context.priced.machine.engine, context.workload), name.removesuffix("s"))
    return f"{per:g} bytes each" + (f", sharded over {'+'.join(state.axes)}" if sharded and state.axes else "")


def _kept_leaves(context: _Context, total: float) -> Iterator[Leaf]:
    priced = context.priced
    found: list[tuple[str, str, float]] = []
    for block, count in context.counts.items():
        is_end = block in end_blocks(priced.graph)
        sizes = kept_bytes(priced.layouts[block], context.strategy.recompute[block], priced.pricing, is_end=is_end)
        found += [(block, name, count * _scalar(size)) for name, size in sizes.items()]
    whole = sum(size for _, _, size in found)
    for block, name, size in sorted(found, key=lambda item: -item[2]):
        yield Leaf(f"{block}/{name}", total * size / whole, "B", f"{format_bytes(size)} a microbatch")


# --- placements ----------------------------------------------------------------------------------------------------


def _placements(context: _Context) -> Iterator[TensorPlacement]:
    for layout in context.priced.layouts.values():
        for tensor in layout.block.tensors:
            if tensor.name in layout.made:
                yield _placement(context, layout.block, layout, tensor.name)


def _placement(context: _Context, block: Block, layout: BlockLayout, name: str) -> TensorPlacement:
    made: Placements = layout.made[name]
    sizes, degrees = context.priced.pricing.extents.sizes, context.priced.degrees
    return TensorPlacement(
        block.name,
        name,
        {axis: str(placement) for axis, placement in made.items()},
        {dim: int(_scalar(local_size(dim, made, sizes, degrees))) for dim in block.tensor[name].dims},
    )
