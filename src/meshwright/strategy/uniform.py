"""The uniform layout: what each axis of a degree grid splits, where layers lie, and the strategy of a shorthand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

from meshwright.graph import Graph
from meshwright.schedule import SCHEDULES, rank_of_stage
from meshwright.sharding import AxisRule, operator_splits, zero_placement
from meshwright.strategy.common import number_problems
from meshwright.strategy.record import AXIS_ORDER, BlockRange, MeshAxis, Recompute, Stage, Strategy, degree_of
from meshwright.strategy.shorthand import Shorthand

DATA_RULES = (AxisRule("dp_replicate", ("batch",)), AxisRule("dp_shard", ("batch",)))

#: Expert parallelism splits the experts where there are some, and the batch everywhere else: between the two, tokens
#: change places (GShard, 2006.16668, section 3.2).
EXPERT_RULES = (AxisRule("ep", ("experts",), fallback=("batch",)),)


def context_rules(over: Sequence[str] = ()) -> tuple[AxisRule, ...]:
    """Context parallelism splits the sequence of every operator, the experts where they are spread over it.

    Attention's keys and values run over another dim, which may not be split, so they are gathered there (Llama 3,
    2407.21783, section 3.3.2); a ring sends the same bytes.
    """
    return (AxisRule("cp", (*_experts("cp", over), "seq", "rows")),)


def _experts(root: str, over: Sequence[str]) -> tuple[str, ...]:
    return ("experts",) if root in over else ()


def tensor_rules(*, replicate_kv: bool, sequence_parallel: bool, over: Sequence[str] = ()) -> tuple[AxisRule, ...]:
    """What tensor parallelism splits: heads, the MLP's inner dim, the vocabulary; the sequence elsewhere if asked.

    Megatron (1909.08053) with sequence parallelism of Korthikanti et al. (2205.05198). Where there are more ranks
    than key/value heads the axis is two: `tp_kv` splits those heads, `tp_group` the query heads that share one, and
    the keys and values lie replicated over the second.
    """
    fallback = ("seq", "rows") if sequence_parallel else ()
    others = (*_experts("tp", over), "ffn", "dense_ffn", "shared_ffn", "vocab")
    if not replicate_kv:
        return (AxisRule("tp", ("kv_heads", *others), fallback),)
    return (
        AxisRule("tp_kv", ("kv_heads", *others), fallback),
        AxisRule("tp_group", ("group", *others), fallback, blocked_by=("kv_heads",)),
    )


def replicates_kv(graph: Graph, tp: int) -> bool:
    """Whether `tp` ranks hold copies of the key/value heads: where it is a larger multiple of their number."""
    heads = graph.dims.get("kv_heads", tp)
    return tp > heads and tp % heads == 0


def tensor_axes(graph: Graph, tp: int) -> dict[str, int]:
    """The mesh axes of tensor parallelism of degree `tp`."""
    if replicates_kv(graph, tp):
        heads = graph.dims["kv_heads"]
        return {"tp_kv": heads, "tp_group": tp // heads}
    return {"tp": tp}


def uniform_rules(*, replicate_kv: bool, sequence_parallel: bool, over: Sequence[str] = ()) -> tuple[AxisRule, ...]:
    """The rules of every axis of the degree grid; experts are spread over the ranks of the degrees `over` too."""
    tensor = tensor_rules(replicate_kv=replicate_kv, sequence_parallel=sequence_parallel, over=over)
    return (*DATA_RULES, *EXPERT_RULES, *context_rules(over), *tensor)


def uniform_splits(graph: Graph, rules: Sequence[AxisRule]) -> dict[str, dict[str, dict[str, str]]]:
    """The splits of all blocks that a set of axis rules gives."""
    return {block.name: operator_splits(block, rules) for block in graph.blocks}


@cache
def layers_per_stage(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """How layers are spread over stages: evenly; what is left over goes one each to the stages after the first, in
    order, then to the first; the last, which holds the head, gets none of it.

    >>> layers_per_stage(126, 16)
    (7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7)
    """
    base, extra = divmod(num_layers, num_stages)
    counts = [base] * num_stages
    for stage in [*range(1, num_stages - 1), 0][:extra]:
        counts[stage] += 1
    return tuple(counts)


def blocks_per_stage(graph: Graph, num_stages: int) -> list[int]:
    """Layers by `layers_per_stage`; the embedding joins the first stage and the head the last."""
    counts = list(layers_per_stage(graph.num_layers, num_stages))
    counts[0] += 1
    counts[-1] += 1
    return counts


def uniform_stages(
    graph: Graph, pipeline_size: int, virtual_stages: int, schedule: str = "Interleaved1F1B"
) -> tuple[Stage, ...]:
    """Contiguous stages of `blocks_per_stage`, dealt to the pipeline ranks as the schedule has them."""
    counts = blocks_per_stage(graph, pipeline_size * virtual_stages)
    stages, start = [], 0
    for index, count in enumerate(counts):
        stages.append(Stage(rank_of_stage(schedule, index, pipeline_size), (BlockRange(start, start + count),)))
        start += count
    return tuple(stages)


def expand(shorthand: Shorthand, graph: Graph) -> Strategy:
    """The full strategy that a shorthand stands for. Axes of size 1 are left out of the mesh."""
    state, spread = shorthand.state_degree, shorthand.spread
    axes = {
        "pp": shorthand.pp,
        "dp_replicate": shorthand.dp // max(state, spread.axis),
        "dp_shard": max(state // spread.axis, 1),
        "ep": spread.axis,
        "cp": shorthand.cp,
        **tensor_axes(graph, shorthand.tp),
    }
    mesh = tuple(MeshAxis(name, axes[name]) for name in AXIS_ORDER if axes.get(name, 1) > 1)
    names = {axis.name for axis in mesh}
    rules = uniform_rules(
        replicate_kv=replicates_kv(graph, shorthand.tp),
        sequence_parallel=bool(shorthand.sp and shorthand.tp > 1),
        over=spread.over,
    )
    return Strategy(
        mesh=mesh,
        splits=uniform_splits(graph, [rule for rule in rules if rule.axis in names]),
        stages=uniform_stages(graph, shorthand.pp, shorthand.vpp, shorthand.schedule),
        schedule=shorthand.schedule,
        microbatch=shorthand.mbs,
        state=zero_placement(shorthand.zero, state_axes(names)),
        recompute=recompute_blocks(graph, shorthand.recompute),
    )


def state_axes(names: Iterable[str]) -> tuple[str, ...]:
    """The axes, of those named, over which training state is sharded."""
    return tuple(name for name in AXIS_ORDER if name in STATE_AXES and name in names)


#: Axes over which training state may be sharded.
STATE_AXES = frozenset({"dp_shard", "ep", "cp"})


def recompute_blocks(graph: Graph, recompute: Recompute) -> dict[str, Recompute]:
    """One choice for every layer; the ends of the model, where they are no layers, hold none to recompute."""
    ends = {name for name in (graph.sequence[0], graph.sequence[-1]) if graph.counts[name] == 1}
    return {block.name: Recompute.NONE if block.name in ends else recompute for block in graph.blocks}


def shorthand_of(strategy: Strategy, graph: Graph) -> Shorthand | None:
    """The shorthand that expands to `strategy`, or None where none does."""
    if any(number_problems(strategy)) or len(strategy.stages) < strategy.pipeline_size:
        return None
    if strategy.schedule not in SCHEDULES:
        return None
    degrees = strategy.degrees
    dp, axis = degree_of("dp", degrees), degrees.get("ep", 1)
    shard = degrees.get("dp_shard", 1) * axis
    zero = sum((strategy.state.optimizer, strategy.state.gradient, strategy.state.parameter))
    candidate = Shorthand(
        tp=degree_of("tp", degrees),
        pp=strategy.pipeline_size,
        dp=dp,
        cp=degree_of("cp", degrees),
        mbs=strategy.microbatch,
        vpp=strategy.virtual_stages,
        schedule=strategy.schedule,
        zero=zero,
        recompute=max(strategy.recompute.values(), key=list(Recompute).index, default=Recompute.NONE),
        dp_shard=shard if zero and shard != dp else 0,
    )
    for sp, (ep, etp) in product((0, 1), _spreads(axis, candidate.tp, candidate.cp)):
        attempt = replace(candidate, sp=sp, ep=ep, etp=etp)
        if expand(attempt, graph) == strategy:
            return attempt
    return None


def _spreads(axis: int, tp: int, cp: int) -> Iterator[tuple[int, int]]:
    """Every `ep` and `etp` that may have made an `ep` axis of so many ranks."""
    yield axis, 0
    yield from ((axis * cp, 0), (axis * tp, 1), (axis * tp * cp, 1))
