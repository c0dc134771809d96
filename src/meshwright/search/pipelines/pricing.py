"""A model, a cluster and a workload as a stage problem: every block priced under every option of every group.

Options are those of the degree shorthand inside one stage: tensor parallelism within a node (with and without sequence
parallelism), data parallelism over the rest, experts spread over it or not, ZeRO levels, recomputation. The prices are
the analytic evaluator's, on columns: all groups at once.

What it leaves out, beside what `search.stages` does: tied parameters are held and reduced by each of their blocks; what
an update needs besides; faults of engines between nodes. A working set is that of a unit with the copies that the
blocks that need most gather and make again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import usable_memory
from meshwright.cost.block import attributed, price_step
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.compute import Pricing
from meshwright.cost.extents import Extents, doublings
from meshwright.cost.layouts import Machine, PricedLayouts, machine_of, price_layouts
from meshwright.cost.passes import exposed_behind
from meshwright.cost.step import Prepared, prepare
from meshwright.engine import Engine
from meshwright.errors import InputError, Problem
from meshwright.graph import Graph, Tensor
from meshwright.search.space import Pattern, degree_splits, divides
from meshwright.search.stages import Array, StageOption, StageProblem
from meshwright.sharding import REPLICATE, Placement, Shard, lay_out, redistribution, zero_placement
from meshwright.strategy import (
    STATE_AXES,
    Recompute,
    Shorthand,
    divisors,
    position_problems,
    recompute_blocks,
    replicates_kv,
    root_axis,
    uniform_splits,
)
from meshwright.workload import Workload


@dataclass(frozen=True)
class Choices:
    """What options may differ in: sizes of groups (none: `group_sizes`), ZeRO levels, kinds of recomputation."""

    sizes: tuple[int, ...] = ()
    levels: tuple[int, ...] = (0, 1, 2, 3)
    recomputes: tuple[Recompute, ...] = tuple(Recompute)


def group_sizes(cluster: Cluster) -> tuple[int, ...]:
    """Numbers of devices that a stage may have: divisors of a node and powers of two within one, powers of two of whole
    nodes, and all (the submeshes of 2201.12023, section 5.2, but for the numbers of nodes that are no powers of two).

    >>> from meshwright.cluster import preset_cluster
    >>> group_sizes(preset_cluster("dgx-h100x6"))
    (1, 2, 4, 8, 16, 32, 48)
    """
    total, node = cluster.num_devices, node_size(cluster)
    parts = {*divisors(node), *(1 << power for power in range(node.bit_length()))}
    nodes = {node << power for power in range((total // node).bit_length())}
    return tuple(sorted(size for size in parts | nodes | {total} if size <= total))


def node_size(cluster: Cluster) -> int:
    """Devices of the innermost level, all where there is one level alone."""
    return min(int(cluster.hierarchy()[0].group_size), cluster.num_devices) if cluster.hierarchy() else 1


def microbatch_counts(workload: Workload, most: int = 8) -> tuple[int, ...]:
    """Numbers of microbatches worth trying: the powers of two that divide the batch, and the batch; where these are
    more than `most`, so many of them evenly spread: one microbatch waits for no other, the most need the least memory.

    >>> microbatch_counts(Workload(global_batch=24, seq_len=1))
    (1, 2, 4, 8, 24)
    >>> microbatch_counts(Workload(global_batch=64, seq_len=1), most=3)
    (1, 8, 64)
    """
    batch = workload.global_batch
    twos = [2**power for power in range(batch.bit_length()) if batch % 2**power == 0]
    counts = sorted({*twos, batch})
    last = len(counts) - 1
    return tuple(counts[round(place * last / (most - 1))] for place in range(most)) if last >= most else tuple(counts)


def stage_problem_of(
    graph: Graph,
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    num_microbatches: int,
    choices: Choices = Choices(),
    *,
    with_switches: bool = False,
) -> StageProblem:
    """The problem of cutting a model into stages for so many microbatches; `with_switches` prices what it takes to go
    from one option to another inside a group. Raises `InputError` where there is nothing to choose from."""
    checked(graph, workload, num_microbatches)
    machine = machine_of(cluster, engine, workload)
    sequences = workload.global_batch // num_microbatches
    parts = [
        _priced_part(graph, machine, workload, sequences, pattern, rows, choices)
        for pattern, rows in _patterns(graph, cluster, workload, sequences, choices).items()
    ]
    if not parts:
        rule = "no group of devices divides the sequences of a microbatch and what tensor parallelism splits"
        raise InputError([Problem("microbatches", str(num_microbatches), rule)])
    options = [option for part in parts for option in part.options]
    columns = {name: np.concatenate([part.columns[name] for part in parts], axis=1) for name in parts[0].columns}
    causes = dict.fromkeys(cause for part in parts for cause in part.causes)
    layouts = {key: index for index, key in enumerate(dict.fromkeys(_layout_key(option) for option in options))}
    options = [replace(option, layout=layouts[_layout_key(option)]) for option in options]
    names = [block.name for block in graph.blocks]
    sizes = [part.exit_bytes for part in parts]
    return StageProblem(
        units=graph.sequence,
        kind_U=np.array([names.index(name) for name in graph.sequence]),
        edges_E=np.array([(unit, unit + 1) for unit in range(len(graph.sequence) - 1)], dtype=np.int64).reshape(-1, 2),
        bytes_E=np.array([sizes[0][names.index(name)] for name in graph.sequence[:-1]]),
        options=tuple(options),
        **columns,
        **_messages(machine, np.array([option.num_devices for option in options]), _concatenated(parts, "share_K")),
        num_devices=cluster.num_devices,
        num_microbatches=num_microbatches,
        memory_limit=usable_memory(cluster) - engine.memory.reserved_bytes,
        switch_AB=_switches(graph, machine, workload, sequences, list(layouts)) if with_switches else _free(layouts),
        factor=engine.pace * (1 + machine.constants.straggler * float(doublings(_num_nodes(cluster)))),
        constant_s=engine.pace * engine.step_constant_s,
        causes={
            cause: np.concatenate(
                [part.causes.get(cause, np.zeros((len(names), len(part.options)))) for part in parts], axis=1
            )
            for cause in causes
        },
    )


def checked(graph: Graph, workload: Workload, num_microbatches: int) -> None:
    """Raise `InputError` where a batch is no whole number of such microbatches, or sequences are too long."""
    problems = position_problems(graph, workload)
    batch = workload.global_batch
    if num_microbatches < 1 or batch % num_microbatches:
        nearest = str(min(divisors(batch), key=lambda number: abs(number - num_microbatches)))
        problems.append(Problem("microbatches", str(num_microbatches), f"must divide the batch of {batch}", nearest))
    if problems:
        raise InputError(problems)


def _num_nodes(cluster: Cluster) -> float:
    return max(cluster.num_devices / node_size(cluster), 1.0)


def _free(layouts: Iterable[Any]) -> Array:
    number = len(list(layouts))
    return np.zeros((number, number))


# --- options ----------------------------------------------------------------------------------------------------------

#: Tensor-parallel, data-parallel and expert-parallel degree of an option.
Row = tuple[int, int, int]


def _patterns(
    graph: Graph, cluster: Cluster, workload: Workload, sequences: int, choices: Choices
) -> dict[Pattern, list[Row]]:
    """The degrees of all options, by which dims their axes split."""
    node = node_size(cluster)
    found: dict[Pattern, list[Row]] = {}

    @cache
    def legal(pattern: Pattern, tp: int) -> bool:
        if replicates_kv(graph, tp) is not pattern.replicate_kv or (pattern.sequence_parallel and tp == 1):
            return False
        return divides(graph, degree_splits(graph, pattern), workload.seq_len, tp)

    for size in choices.sizes or group_sizes(cluster):
        for tp in divisors(math.gcd(size, node)):
            dp = size // tp
            if sequences % dp:
                continue
            for replicate_kv, sequence_parallel in product((False, True), repeat=2):
                pattern = Pattern(replicate_kv, sequence_parallel)
                if legal(pattern, tp):
                    for ep in {1, math.gcd(dp, graph.dims.get("experts", 1))}:
                        found.setdefault(replace(pattern, expert_axis=ep > 1), []).append((tp, dp, ep))
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """Options of one pattern: their columns, H x K."""

    options: list[StageOption]
    columns: dict[str, Array]
    causes: dict[str, Array]
    share_K: Array
    exit_bytes: Array


def _priced_part(
    graph: Graph,
    machine: Machine,
    workload: Workload,
    sequences: int,
    pattern: Pattern,
    rows: Sequence[Row],
    choices: Choices,
) -> _Part:
    tp_U, dp_U, ep_U = np.array(rows, dtype=np.int64).T
    levels = choices.levels if dp_U.max() > 1 else choices.levels[:1]
    kinds = _kinds(graph, choices)
    priced = _price(graph, machine, workload, pattern, tp_U, dp_U, ep_U, sequences)
    axes = tuple(axis for axis in priced.degrees if axis in STATE_AXES)
    prepared = prepare(
        priced, [zero_placement(level, axes) for level in levels], [recompute_blocks(graph, kind) for kind in kinds]
    )
    grid = [
        (z, c, u)
        for u, (_, dp, _) in enumerate(rows)
        for z in range(len(levels) if dp > 1 else 1)
        for c in range(len(kinds))
    ]
    index = tuple(np.array(grid).T)
    shape = (len(levels), len(kinds), len(rows))

    def taken(by_block: dict[str, Any]) -> Array:
        return np.stack([np.broadcast_to(by_block.get(block.name, 0.0), shape)[index] for block in graph.blocks])

    memory = prepared.memory
    state_HK = sum(taken(by_block) for by_block in memory.state.values())
    kept_HK = taken({**memory.kept, **memory.kept_head})
    copies_K = taken(memory.redone).max(axis=0) + taken(memory.gathered).max(axis=0)
    update = _update_seconds(prepared)
    return _Part(
        options=[_option(rows[u], levels[z], kinds[c], pattern, sequences) for z, c, u in grid],
        columns={
            "forward_HK": taken(prepared.forward_s),
            "backward_HK": taken(prepared.backward_s),
            "update_HK": taken(update),
            "weights_HK": taken(memory.state["parameters"]),
            "state_HK": state_HK + memory.habits.gaps * kept_HK,
            "kept_HK": kept_HK,
            "working_HK": taken(memory.working) + copies_K,
        },
        causes={cause: taken(by_block) for cause, by_block in prepared.causes.items()},
        share_K=_share_sent(priced)[index[2]],
        exit_bytes=np.array(
            [float(np.max(priced.blocks[block.name].exit_whole_bytes, initial=0.0)) for block in graph.blocks]
        ),
    )


def _kinds(graph: Graph, choices: Choices) -> list[Recompute]:
    """Kinds of recomputation that differ."""
    has_groups = any(operator.recompute_group for block in graph.blocks for operator in block.operators)
    return [kind for kind in choices.recomputes if kind is not Recompute.SELECTIVE or has_groups] or [Recompute.NONE]


def _option(row: Row, level: int, kind: Recompute, pattern: Pattern, sequences: int) -> StageOption:
    tp, dp, ep = row
    shorthand = Shorthand(
        tp=tp,
        dp=dp,
        ep=ep,
        mbs=sequences // dp,
        zero=level,
        recompute=kind,
        sp=int(pattern.sequence_parallel),
    )
    words = [f"tp={tp}", f"dp={dp}", *([f"ep={ep}"] if ep > 1 else []), *([f"zero={level}"] if level else [])]
    words += ["sp=1"] if pattern.sequence_parallel else []
    words += [f"recompute={kind}"] if kind is not Recompute.NONE else []
    return StageOption(",".join(words), tp * dp, shorthand, is_copied=tp == 1 and ep == 1 and level == 0)


def _price(
    graph: Graph,
    machine: Machine,
    workload: Workload,
    pattern: Pattern,
    tp_U: Array,
    dp_U: Array,
    ep_U: Array,
    sequences: int,
) -> PricedLayouts:
    kv = graph.dims.get("kv_heads", 1)
    tensor = {"tp_kv": np.full_like(tp_U, kv), "tp_group": tp_U // kv} if pattern.replicate_kv else {"tp": tp_U}
    degrees = {
        "pp": np.ones_like(tp_U),
        "dp_replicate": np.ones_like(tp_U),
        "dp_shard": dp_U // ep_U,
        **({"ep": ep_U} if pattern.expert_axis else {}),
        "cp": np.ones_like(tp_U),
        **tensor,
    }
    splits = uniform_splits(graph, pattern.rules())
    layouts = {block.name: lay_out(block, splits[block.name]) for block in graph.blocks}
    return price_layouts(graph, layouts, degrees, sequences // dp_U, machine, workload)


def _update_seconds(prepared: Prepared) -> dict[str, Any]:
    """Seconds of an update by block: what the reduction of gradients and the gathering of parameters leave exposed
    beside the block's own backward and forward, and the optimizer."""
    priced = prepared.priced
    windows = {"step_gradient": dict(prepared.backward_s), "step_parameter": dict(prepared.forward_s)}
    total = dict(prepared.update_s)
    for name_of, axes, columns in prepared.moves:
        for block, took in columns.items():
            window = windows[name_of][block]
            for axis, share in attributed(axes, priced.degrees).items():
                exposed = priced.machine.exposed.get(root_axis(axis), 1.0)
                total[block] = total[block] + share * exposed_behind(took, exposed, window)
            windows[name_of][block] = np.maximum(window - took, 0.0)
    return total


def _share_sent(priced: PricedLayouts) -> Array:
    """Share of what a block hands over that one rank holds, hence sends: the largest of all blocks."""
    shape = np.shape(priced.microbatch)
    if priced.machine.slice_messages:
        return np.asarray(1 / priced.pricing.extents.ranks(tuple(priced.degrees)) * np.ones(shape))
    shares = [
        np.broadcast_to(block.exit_bytes / block.exit_whole_bytes, shape)
        for block in priced.blocks.values()
        if np.max(block.exit_whole_bytes) > 0
    ]
    return np.max(shares, axis=0) if shares else np.ones(shape)


def _concatenated(parts: Sequence[_Part], name: str) -> Array:
    return np.concatenate([getattr(part, name) for part in parts])


def _messages(machine: Machine, devices_K: Array, share_K: Array) -> dict[str, Array]:
    """Latency, and seconds for each byte that a stage hands over, of a group's messages to a neighbour."""
    exposed, levels = machine.exposed.get("pp", 1.0), machine.networks.get("pp", machine.levels)
    latency_K = np.broadcast_to(point_to_point_time(0.0, devices_K, levels), devices_K.shape)
    byte_K = np.broadcast_to(point_to_point_time(1.0, devices_K, levels), devices_K.shape) - latency_K
    return {"latency_K": exposed * latency_K, "seconds_per_byte_K": exposed * byte_K * share_K}


# --- from one option to another ---------------------------------------------------------------------------------------


def _layout_key(option: StageOption) -> tuple[int, int, bool]:
    """How what is handed over lies: devices, ranks over which sequences are dealt, whether their tokens are split."""
    assert option.shorthand is not None
    return option.num_devices, option.shorthand.dp, bool(option.shorthand.sp)


def _switches(
    graph: Graph, machine: Machine, workload: Workload, sequences: int, keys: Sequence[tuple[int, int, bool]]
) -> Array:
    """Seconds per byte, there and back, between layouts on one group; infinite between groups of other sizes."""
    tensor = _handed(graph)
    found = np.full((len(keys), len(keys)), np.inf)
    for size in {size for size, _, _ in keys}:
        own = [index for index, key in enumerate(keys) if key[0] == size]
        factors = _prime_factors(size)
        degrees = {f"d{index}": np.array([factor]) for index, factor in enumerate(factors)}
        pricing = Pricing(
            machine.rates,
            machine.engine,
            machine.constants,
            workload,
            Extents(graph.sizes(sequences, workload.seq_len), degrees),
        )
        size_bytes = float(math.prod(pricing.extents.sizes[dim] for dim in tensor.dims)) * workload.bytes_of(
            tensor.dtype
        )
        for one, other in product(own, repeat=2):
            if one == other:
                found[one, other] = 0.0
                continue
            a, b = (_lies(tensor, keys[index], factors) for index in (one, other))
            seconds = _moved_seconds(tensor, a, b, pricing, machine) + _moved_seconds(tensor, b, a, pricing, machine)
            found[one, other] = seconds / size_bytes
    return found


def _handed(graph: Graph) -> Tensor:
    """The tensor that blocks hand on: that of the block that stands most often."""
    block = max((block for block in graph.blocks if block.outputs), key=lambda block: graph.counts[block.name])
    return block.tensor[block.outputs[0]]


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _lies(tensor: Tensor, key: tuple[int, int, bool], factors: Sequence[int]) -> dict[str, Placement] | None:
    """The placement over axes of the group's prime factors: sequences over the outermost ones, tokens over the rest;
    None where the degree is no product of the outermost."""
    _, dp, splits_tokens = key
    found: dict[str, Placement] = {}
    reached = 1
    for index, factor in enumerate(factors):
        name = f"d{index}"
        if reached < dp:
            reached *= factor
            found[name] = Shard("batch")
        else:
            found[name] = Shard("seq") if splits_tokens and "seq" in tensor.dims else REPLICATE
    return found if reached == dp else None


def _moved_seconds(tensor: Tensor, source: Any, target: Any, pricing: Pricing, machine: Machine) -> float:
    order = tuple(pricing.extents.degrees)
    # What does not nest is gathered whole, and a slice of it is free.
    scattered: dict[str, Placement] = dict.fromkeys(order, Shard("batch"))
    gathered: dict[str, Placement] = dict.fromkeys(order, REPLICATE)
    steps = redistribution(source or scattered, target or gathered, order)
    total: Any = 0.0
    for step in steps:
        numel = pricing.extents.numel(tensor.dims, step.larger)
        size = numel * pricing.workload.bytes_of(tensor.dtype)
        total = total + price_step(step, size, pricing, machine.levels).took.seconds
    return float(np.max(total))


def options_of(problem: StageProblem, **wanted: Any) -> Iterator[int]:
    """Options whose shorthand has the wanted values."""
    for k, option in enumerate(problem.options):
        if option.shorthand and all(getattr(option.shorthand, key) == value for key, value in wanted.items()):
            yield k
