"""The strategy: how a model, a batch and their state are split over a mesh of devices and over time.

A `Strategy` says everything: the mesh of named axes, the dim that each axis splits in every operator (all placements
follow, see `sharding`), the stages, the schedule, the microbatch, where training state lies, what is recomputed. The
degree shorthand, `tp=8,pp=64,dp=6,mbs=1,vpp=2,schedule=Interleaved1F1B,zero=1,recompute=selective,sp=1`, is sugar:
`expand` turns it into the full strategy, `shorthand_of` back where it can. `strategy_problems` names every rule that
a strategy breaks for a given model, cluster size and workload.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cache
from itertools import pairwise, product
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph, Role
from meshwright.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    Table,
    actions,
    check_table,
    compute_parts,
    parse_action,
    rank_of_stage,
    schedule_problems,
    stages_of_rank,
)
from meshwright.sharding import AxisRule, BlockLayout, StatePlacement, lay_out, operator_splits, zero_placement
from meshwright.workload import Workload

#: Mesh axes, outermost first: neighbours on the innermost axis are neighbours in the machine.
AXIS_ORDER = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp", "tp_kv", "tp_group")

#: Dims that need not divide: the vocabulary is padded to the degree, flat runs of state too; rows are a mean.
PADDED_DIMS = frozenset({"vocab", "flat", "rows"})


class Recompute(StrEnum):
    """What the backward computes again: nothing, operators in a recompute group (core attention), or whole blocks."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True)
class MeshAxis:
    """A named axis of the mesh and its number of ranks."""

    name: str
    size: int


@dataclass(frozen=True)
class BlockRange:
    """Blocks `start` up to, not including, `stop` of the model's sequence."""

    start: int
    stop: int


@dataclass(frozen=True)
class Stage:
    """One (virtual) pipeline stage: where on the `pp` axis it lives, and its blocks, contiguous or not."""

    pipeline_rank: int
    blocks: tuple[BlockRange, ...]


@dataclass(frozen=True)
class Strategy:
    """The full strategy; see the module's docstring.

    `mesh` is outermost first; the rank of a device is its row-major index. `splits` gives, per block and operator (or
    boundary tensor), the dim that each axis splits. `stages` are in the order in which a microbatch passes them.
    `microbatch` is in sequences per data-parallel rank. `recompute` is per block. Where `schedule` is `custom`, `table`
    has a row for each pipeline rank: actions in PyTorch's notation, with commas between.
    """

    mesh: tuple[MeshAxis, ...]
    splits: dict[str, dict[str, dict[str, str]]]
    stages: tuple[Stage, ...]
    schedule: str
    microbatch: int
    state: StatePlacement
    recompute: dict[str, Recompute] = field(default_factory=dict)
    table: tuple[str, ...] = ()

    @property
    def degrees(self) -> dict[str, int]:
        """Size of every mesh axis, outermost first."""
        return {axis.name: axis.size for axis in self.mesh}

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh."""
        sizes = [axis.size for axis in self.mesh]
        return math.prod(sizes)

    @property
    def pipeline_size(self) -> int:
        """Ranks of the `pp` axis."""
        return self.degrees.get("pp", 1)

    @property
    def virtual_stages(self) -> int:
        """Stages on each pipeline rank."""
        return len(self.stages) // self.pipeline_size

    @property
    def most_messages(self) -> int:
        """Messages that the busiest pipeline rank sends to other ranks for a microbatch, forward and backward."""
        sent: Counter[int] = Counter()
        for one, following in pairwise(self.stages):
            if one.pipeline_rank != following.pipeline_rank:
                sent.update((one.pipeline_rank, following.pipeline_rank))
        return max(sent.values(), default=0)

    def num_microbatches(self, workload: Workload) -> int:
        """Microbatches of one step on each data-parallel rank."""
        return workload.global_batch // (self.microbatch * int(degree_of("dp", self.degrees)))

    def layouts(self, graph: Graph) -> dict[str, BlockLayout]:
        """The layout of every distinct block."""
        return {block.name: lay_out(block, self.splits[block.name]) for block in graph.blocks}


#: The schedule of a strategy that brings its own table.
CUSTOM = "custom"


def strategy_table(strategy: Strategy, num_microbatches: int) -> Table:
    """The actions of each pipeline rank; where stages lie in another order than the schedule's, so do its rows."""
    if strategy.schedule == CUSTOM:
        return tuple(tuple(parse_action(text) for text in row.split(",")) for row in strategy.table)
    table = actions(strategy.schedule, strategy.pipeline_size, strategy.virtual_stages, num_microbatches)
    rows: dict[int, tuple[Action, ...]] = {strategy.stages[row[0].stage].pipeline_rank: row for row in table}
    return tuple(rows[rank] for rank in range(strategy.pipeline_size))


def root_axis(axis: str) -> str:
    """The degree that an axis is a part of: `tp_kv` and `tp_group` are `tp`, `dp_shard` is `dp`.

    >>> root_axis("tp_group")
    'tp'
    """
    return axis.split("_")[0]


def degree_of(root: str, degrees: Mapping[str, Any]) -> Any:
    """The product of the axes that make up a degree; the ranks of expert parallelism are data-parallel ones too.

    >>> degree_of("dp", {"dp_shard": 4, "ep": 8, "tp": 2})
    32
    """
    parts = (root, "ep") if root == "dp" else (root,)
    return math.prod(size for axis, size in degrees.items() if root_axis(axis) in parts)


#: The degrees whose product is the number of devices.
PRODUCT = ("tp", "pp", "dp", "cp")


# --- the degree shorthand -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shorthand:
    """A uniform strategy by its degrees. `dp` is the whole data-parallel degree; `dp_shard` (0: all of it where zero
    is at least 1) the part over which state is sharded. Experts are spread over `ep` of the dp*cp ranks, and each is
    split over `etp` of the tensor-parallel ones (0: all); with etp=1 the experts are spread over the tp ranks too."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    mbs: int = 1
    vpp: int = 1
    schedule: str = "1F1B"
    zero: int = 0
    recompute: Recompute = Recompute.NONE
    sp: int = 0
    dp_shard: int = 0
    etp: int = 0

    def __str__(self) -> str:
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        return ",".join(f"{key}={value}" for key, value in parts.items() if value or key not in ("dp_shard", "etp"))

    @property
    def num_devices(self) -> int:
        """Devices that the degrees ask for."""
        degrees: list[int] = [getattr(self, name) for name in PRODUCT]
        return math.prod(degrees)

    @property
    def state_degree(self) -> int:
        """Data-parallel ranks over which state is sharded."""
        return self.dp_shard or (self.dp if self.zero else 1)

    @property
    def spread(self) -> Spread:
        """How experts are spread."""
        return spread_experts(self.ep, tp=self.tp, cp=self.cp, over_tp=self.etp == 1)


@dataclass(frozen=True)
class Spread:
    """Over which ranks experts are spread: `axis` ranks of the `ep` axis, and all ranks of the degrees `over`."""

    axis: int
    over: tuple[str, ...]


def spread_experts(ep: int, *, tp: int, cp: int, over_tp: bool) -> Spread:
    """Neighbours first, as Megatron-Core folds its groups: tensor-parallel ranks (where `over_tp`), those of context
    parallelism, then data-parallel ones, which make up the `ep` axis.

    >>> spread_experts(32, tp=2, cp=1, over_tp=True)
    Spread(axis=16, over=('tp',))
    """
    over = []
    for root, degree in (("tp", tp if over_tp else 1), ("cp", cp)):
        if degree > 1 and ep % degree == 0 and ep > 1:
            over.append(root)
            ep //= degree
    return Spread(ep, tuple(over))


def with_folded_experts(shorthand: Shorthand) -> Shorthand:
    """Experts spread over the tensor-parallel ranks too, where `ep` needs them and `etp` is not given."""
    fits = shorthand.dp * shorthand.cp % shorthand.ep == 0
    return shorthand if fits or shorthand.etp else replace(shorthand, etp=1)


def parse_shorthand(text: str) -> Shorthand:
    """Read `tp=8,pp=4,...`; every fault is named at once.

    >>> str(parse_shorthand("tp=2,pp=2,sp=1"))
    'tp=2,pp=2,dp=1,cp=1,ep=1,mbs=1,vpp=1,schedule=1F1B,zero=0,recompute=none,sp=1'
    """
    return Shorthand(**parse_shorthand_keys(text))


def parse_shorthand_keys(text: str) -> dict[str, Any]:
    """The keys that a shorthand gives, with their values."""
    known = [item.name for item in fields(Shorthand)]
    values: dict[str, str] = {}
    problems = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value or "=" in value:
            problems.append(Problem("strategy", repr(part), "each part is key=value", "tp=2,pp=2,dp=1"))
        elif key not in known:
            problems.append(Problem(key, value, f"not a key; keys: {', '.join(known)}", nearest_name(key, known)))
        elif key in values:
            problems.append(Problem(key, value, f"given twice (before: {values[key]})", f"{key}={values[key]}"))
        else:
            values[key] = value
    parsed = {}
    for key, value in values.items():
        try:
            parsed[key] = _PARSERS.get(key, _positive)(key, value)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return parsed


def _positive(key: str, value: str) -> int:
    return _integer(key, value, 1, 10**9)


def _integer(key: str, value: str, low: int, high: int) -> int:
    rule = f"a whole number from {low} to {high}" if high < 10**9 else f"a whole number, at least {low}"
    if not (value.isascii() and value.isdigit()) or len(value) > 12:
        raise InputError([Problem(key, value, rule, f"{key}={low}")])
    if not low <= int(value) <= high:
        raise InputError([Problem(key, value, rule, f"{key}={min(max(int(value), low), high)}")])
    return int(value)


def _choice(key: str, value: str, known: Iterable[str]) -> str:
    names = list(known)
    if value not in names:
        lowered = {name.lower(): name for name in names}
        nearest = lowered.get(value.lower()) or nearest_name(value, names)
        raise InputError([Problem(key, value, f"known: {', '.join(names)}", f"{key}={nearest}" if nearest else None)])
    return value


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "zero": lambda key, value: _integer(key, value, 0, 3),
    "sp": lambda key, value: _integer(key, value, 0, 1),
    "schedule": lambda key, value: _choice(key, value, SCHEDULES),
    "recompute": lambda key, value: Recompute(_choice(key, value, [kind.value for kind in Recompute])),
}


# --- the uniform layout: what each axis of a degree grid splits -----------------------------------------------------

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
    if any(_number_problems(strategy)) or len(strategy.stages) < strategy.pipeline_size:
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


# --- legality -------------------------------------------------------------------------------------------------------


def legal_strategy(shorthand: Shorthand, graph: Graph, num_devices: int, workload: Workload) -> Strategy:
    """The strategy that a shorthand stands for; raises `InputError` with every rule that it breaks."""
    problems = _degree_problems(shorthand, graph, num_devices)
    faulty = {problem.where for problem in problems}
    # What cannot be expanded is set aside, so that the rest can still be judged.
    if "pp*vpp" in faulty:
        shorthand = replace(shorthand, pp=1, vpp=1, schedule="1F1B")
    if "dp_shard" in faulty:
        shorthand = replace(shorthand, dp_shard=0)
    if faulty & {"ep", "etp"}:
        shorthand = replace(shorthand, ep=1, etp=0)
    strategy = expand(shorthand, graph)
    # The number of devices was said of the degrees, in the user's words.
    problems += [
        problem for problem in strategy_problems(strategy, graph, num_devices, workload) if problem.where != "mesh"
    ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return strategy


def _degree_problems(shorthand: Shorthand, graph: Graph, num_devices: int) -> list[Problem]:
    """Rules that concern the degrees themselves, before they are expanded."""
    problems = []
    if shorthand.num_devices != num_devices:
        names = [name for name in PRODUCT if getattr(shorthand, name) > 1] or ["tp"]
        product = f"{'*'.join(names)} = {shorthand.num_devices}"
        rest = shorthand.num_devices // shorthand.dp
        nearest = f"dp={num_devices // rest}" if num_devices % rest == 0 else None
        problems.append(Problem("strategy", product, f"must be the cluster's {num_devices} devices", nearest))
    problems += _expert_problems(shorthand, graph)
    if shorthand.dp_shard and not shorthand.zero:
        problems.append(Problem("dp_shard", str(shorthand.dp_shard), "shards nothing with zero=0", "zero=1"))
    elif shorthand.dp_shard and shorthand.dp % shorthand.dp_shard:
        nearest = f"dp_shard={nearest_divisor(shorthand.dp, shorthand.dp_shard)}"
        problems.append(Problem("dp_shard", str(shorthand.dp_shard), f"must divide dp={shorthand.dp}", nearest))
    problems += _stage_number_problems(shorthand.pp * shorthand.vpp, graph)
    return problems


def _expert_problems(shorthand: Shorthand, graph: Graph) -> Iterator[Problem]:
    ep, ranks = shorthand.ep, shorthand.dp * shorthand.cp
    if shorthand.etp not in (0, 1, shorthand.tp):
        yield Problem("etp", str(shorthand.etp), f"must be 1, or tp={shorthand.tp}", "etp=1")
    if ep == 1:
        return
    if "experts" not in graph.dims:
        yield Problem("ep", str(ep), f"{graph.name} has no experts", "ep=1")
        return
    over_tp = shorthand.etp == 1 and shorthand.tp > 1
    if over_tp and ep % shorthand.tp:
        rule = f"with etp=1 experts are spread over all tp={shorthand.tp} ranks: a multiple of that"
        yield Problem("ep", str(ep), rule, f"ep={shorthand.tp}")
    elif (ranks * shorthand.tp if over_tp else ranks) % ep or shorthand.dp % shorthand.spread.axis:
        words = f"dp*cp*tp = {ranks * shorthand.tp}" if over_tp else f"dp*cp = {ranks}"
        nearest = nearest_divisor(ranks * shorthand.tp if over_tp else ranks, ep)
        yield Problem("ep", str(ep), f"must divide {words}", f"ep={nearest}")
    elif shorthand.dp_shard % shorthand.spread.axis:
        rule = f"must be a multiple of the {shorthand.spread.axis} ranks over which experts are spread"
        yield Problem("dp_shard", str(shorthand.dp_shard), rule, f"dp_shard={shorthand.dp}")


def _stage_number_problems(num_stages: int, graph: Graph) -> list[Problem]:
    total = len(graph.sequence)
    if num_stages <= total:
        return []
    rule = f"at most {total} stages: {total - 2} layers, and embedding and head may be stages of their own"
    return [Problem("pp*vpp", str(num_stages), rule, str(total))]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`.

    >>> nearest_divisor(64, 3)
    2
    """
    return min(divisors(number), key=lambda divisor: (abs(divisor - wanted), divisor))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending; of a number beyond 10^12 only those up to 10^6 and the numbers of times they go into it.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [candidate for candidate in range(1, math.isqrt(min(number, 10**12)) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // candidate for candidate in small)}))


def strategy_problems(strategy: Strategy, graph: Graph, num_devices: int, workload: Workload) -> list[Problem]:
    """Every rule that a strategy breaks, memory excepted (that is an estimate's to say)."""
    if problems := list(_number_problems(strategy)):
        return problems  # the other rules divide by these numbers
    if strategy.num_devices != num_devices:
        product = " x ".join(f"{axis.name}={axis.size}" for axis in strategy.mesh) or "one device"
        problems.append(Problem("mesh", product, f"must be the cluster's {num_devices} devices"))
    problems += batch_problems(strategy.microbatch, degree_of("dp", strategy.degrees), workload)
    problems += stage_problems(strategy, graph)
    sizes = graph.sizes(strategy.microbatch * degree_of("dp", strategy.degrees), workload.seq_len)
    problems += split_problems(graph, strategy.splits, sizes, strategy.degrees)
    problems += _recompute_problems(strategy, graph)
    problems += _state_problems(strategy, graph)
    problems += position_problems(graph, workload)
    return problems or _order_problems(strategy, strategy.num_microbatches(workload))


def _order_problems(strategy: Strategy, num_microbatches: int) -> list[Problem]:
    """What is wrong with the schedule, for stages that lie where they lie."""
    size, name, v = strategy.pipeline_size, strategy.schedule, strategy.virtual_stages
    if name == CUSTOM:
        return _table_problems(strategy, num_microbatches)
    if problems := schedule_problems(name, size, v, num_microbatches):
        return problems
    if strategy.table:
        return [Problem("table", f"{len(strategy.table)} rows", f"only where the schedule is {CUSTOM}", "no rows")]
    if not SCHEDULES[name].has_backward:
        trains = ", ".join(each for each in SCHEDULES if SCHEDULES[each].has_backward)
        return [Problem("schedule", name, f"has no backward, and a step trains; that have one: {trains}", "1F1B")]
    found = []
    for rank in range(size):
        own = stages_of_rank(name, rank, size, v)
        places = [strategy.stages[stage].pipeline_rank for stage in own]
        if len(set(places)) > 1:
            rule = f"{name} runs these stages on one rank"
            found.append(Problem("stages", f"stages {list(own)} on ranks {places}", rule, f"all on rank {places[0]}"))
    return found


def _table_problems(strategy: Strategy, num_microbatches: int) -> list[Problem]:
    """What is wrong with a table of one's own."""
    if len(strategy.table) != strategy.pipeline_size:
        rule = "a row for each pipeline rank"
        return [Problem("table", f"{len(strategy.table)} rows", rule, f"{strategy.pipeline_size} rows")]
    try:
        table = strategy_table(strategy, num_microbatches)
    except InputError as error:
        return list(error.problems)
    problems = check_table(table, len(strategy.stages), num_microbatches)
    if problems:
        return problems
    for rank, row in enumerate(table):
        for stage in sorted({part.stage for action in row for part in compute_parts(action)}):
            if (place := strategy.stages[stage].pipeline_rank) != rank:
                rule = f"the table runs it on rank {rank}, and it lies on rank {place}"
                problems.append(Problem("table", f"stage {stage}", rule))
    if not any(part.kind is not ActionKind.F for row in table for action in row for part in compute_parts(action)):
        problems.append(Problem("table", "forwards alone", "a step trains: each microbatch has a backward too"))
    return problems


def _number_problems(strategy: Strategy) -> Iterator[Problem]:
    for axis in strategy.mesh:
        if axis.name not in AXIS_ORDER:
            rule = f"no such axis; known: {', '.join(AXIS_ORDER)}"
            yield Problem("mesh", axis.name, rule, nearest_name(axis.name, AXIS_ORDER))
        if axis.size < 1:
            yield Problem(f"mesh.{axis.name}", str(axis.size), "must be at least 1", "1")
    names = [axis.name for axis in strategy.mesh]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Problem("mesh", name, "an axis is named once")
    if strategy.microbatch < 1:
        yield Problem("microbatch", str(strategy.microbatch), "must be at least 1", "1")


def _recompute_problems(strategy: Strategy, graph: Graph) -> Iterator[Problem]:
    for name in sorted(set(graph.block) ^ set(strategy.recompute)):
        if name in strategy.recompute:
            yield Problem("recompute", name, "no such block", nearest_name(name, graph.block))
        else:
            yield Problem("recompute", name, "its choice is missing")


def _state_problems(strategy: Strategy, graph: Graph) -> Iterator[Problem]:
    """State is sharded over axes along which some parameter is otherwise copied."""
    splitting: Counter[str] = Counter()
    num_parameters = 0
    for block in graph.blocks:
        for operator in block.operators:
            split = strategy.splits.get(block.name, {}).get(operator.name, {})
            for name, dims in zip(operator.inputs, operator.input_dims, strict=True):
                if block.tensor[name].role is Role.PARAMETER:
                    num_parameters += 1
                    splitting.update(axis for axis, dim in split.items() if dim in dims)
    for axis in strategy.state.axes:
        if axis not in strategy.degrees:
            rule = f"no such mesh axis; axes: {', '.join(strategy.degrees)}"
            yield Problem("state.axes", axis, rule, nearest_name(axis, strategy.degrees))
        elif axis == "pp" or (axis not in STATE_AXES and splitting[axis]) or splitting[axis] == num_parameters:
            yield Problem("state.axes", axis, "splits parameters, so it holds no copies whose state could be sharded")


def batch_problems(mbs: int, dp: int, workload: Workload) -> list[Problem]:
    """The global batch must fall into whole microbatches on every data-parallel rank."""
    batch = workload.global_batch
    if batch % dp:
        return [Problem("dp", str(dp), f"must divide the global batch of {batch}", f"dp={nearest_divisor(batch, dp)}")]
    if (batch // dp) % mbs:
        nearest = nearest_divisor(batch // dp, mbs)
        return [Problem("mbs", str(mbs), f"must divide the {batch // dp} sequences of a rank", f"mbs={nearest}")]
    return []


def position_problems(graph: Graph, workload: Workload) -> list[Problem]:
    """A table of learned positions ends somewhere."""
    positions = graph.dims.get("positions")
    if positions is not None and workload.seq_len > positions:
        return [Problem("seq_len", str(workload.seq_len), f"{graph.name} has {positions} positions", f"{positions}")]
    return []


def stage_problems(strategy: Strategy, graph: Graph) -> list[Problem]:
    """Every block on exactly one stage, every stage on a pipeline rank, the same number of stages on each."""
    size, total = strategy.pipeline_size, len(graph.sequence)
    if len(strategy.stages) > total:
        return _stage_number_problems(len(strategy.stages), graph)
    problems = []
    held = [0] * total
    for index, stage in enumerate(strategy.stages):
        if not 0 <= stage.pipeline_rank < size:
            problems.append(Problem(f"stages[{index}].pipeline_rank", str(stage.pipeline_rank), f"0 to {size - 1}"))
        for part in stage.blocks:
            if not 0 <= part.start < part.stop <= total:
                where = f"stages[{index}].blocks"
                problems.append(Problem(where, f"{part.start}-{part.stop}", f"a range within 0 to {total}"))
            else:
                held[part.start : part.stop] = [count + 1 for count in held[part.start : part.stop]]
    on_rank = Counter(stage.pipeline_rank for stage in strategy.stages)
    # A file may claim any number of ranks: one more than there are stages is enough to find one without.
    per_rank = [on_rank[rank] for rank in range(min(size, len(strategy.stages) + 1))]
    if any(count * size != len(strategy.stages) for count in per_rank):
        problems.append(Problem("stages", str(per_rank[:8]), "every pipeline rank has the same number of stages"))
    wrong = [index for index, count in enumerate(held) if count != 1]
    if wrong:
        problems.append(Problem("stages", f"blocks {wrong[:8]}", "every block is on exactly one stage"))
    return problems


def split_problems(
    graph: Graph,
    splits: Mapping[str, Mapping[str, Mapping[str, str]]],
    sizes: Mapping[str, int],
    degrees: Mapping[str, int],
) -> list[Problem]:
    """Splits that name what is not there, or that do not divide what they split."""
    problems: dict[Problem, None] = {}
    for name in sorted(set(splits) - set(graph.block)):
        problems[Problem("splits", name, "no such block", nearest_name(name, graph.block))] = None
    for block in graph.blocks:
        given = splits.get(block.name, {})
        names = {operator.name for operator in block.operators} | set(block.inputs) | set(block.outputs)
        for name in sorted(names ^ set(given)):
            rule = "no such operator in the block" if name in given else "its split is missing"
            nearest = nearest_name(name, names) if name in given else None
            problems[Problem(f"splits.{block.name}", name, rule, nearest)] = None
        for operator in block.operators:
            found = _operator_split_problems(
                f"splits.{block.name}.{operator.name}",
                operator.dims,
                operator.unsplit,
                given.get(operator.name, {}),
                block.dim_aliases(operator),
                sizes,
                degrees,
            )
            problems |= dict.fromkeys(found)
        for name in (*block.inputs, *block.outputs):
            dims = block.tensor[name].dims
            where = f"splits.{block.name}.{name}"
            found = _operator_split_problems(where, dims, (), given.get(name, {}), {}, sizes, degrees)
            problems |= dict.fromkeys(found)
    return list(problems)


def _operator_split_problems(
    where: str,
    dims: Sequence[str],
    unsplit: Sequence[str],
    split: Mapping[str, str],
    aliases: Mapping[str, str],
    sizes: Mapping[str, int],
    degrees: Mapping[str, int],
) -> Iterator[Problem]:
    for axis, dim in split.items():
        if axis not in degrees:
            yield Problem(where, axis, f"no such mesh axis; axes: {', '.join(degrees)}", nearest_name(axis, degrees))
        elif dim not in dims or dim in unsplit:
            allowed = [name for name in dims if name not in unsplit]
            yield Problem(where, f"{axis}: {dim}", f"dims that may be split: {', '.join(allowed)}")
    for dim in dict.fromkeys(split.values()):
        axes = [axis for axis, split_dim in split.items() if split_dim == dim and axis in degrees]
        degree = math.prod(degrees[axis] for axis in axes)
        if dim in dims and dim not in PADDED_DIMS and sizes[aliases.get(dim, dim)] % degree:
            yield _division_problem(dim, axes, sizes[aliases.get(dim, dim)], sizes, degrees)


def _division_problem(
    dim: str, axes: Sequence[str], size: int, sizes: Mapping[str, int], degrees: Mapping[str, int]
) -> Problem:
    roots = list(dict.fromkeys(root_axis(axis) for axis in axes))
    degree = math.prod(degree_of(root, degrees) for root in roots)
    root = "*".join(roots)
    if dim in ("kv_heads", "group"):
        heads, kv_heads = sizes["kv_heads"] * sizes["group"], sizes["kv_heads"]
        legal = [number for number in divisors(heads) if kv_heads % number == 0 or number % kv_heads == 0]
        nearest = min(legal, key=lambda number: (abs(number - degree), number))
        rule = f"must divide the {heads} heads, and divide or be a multiple of the {kv_heads} key/value heads"
        return Problem(root, str(degree), rule, f"{root}={nearest}")
    rule = f"must divide {_DIM_WORDS.get(dim, dim)} = {size}"
    return Problem(root, str(degree), rule, f"{root}={nearest_divisor(size, degree)}")


_DIM_WORDS = {"ffn": "the MLP's inner size", "seq": "the sequence", "hidden": "the hidden size"}
