"""Rules that hold for strategies of every kind: numbers, the batch, positions, stages, and the order of actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph
from meshwright.schedule import SCHEDULES, ActionKind, check_table, compute_parts, schedule_problems, stages_of_rank
from meshwright.strategy.divide import nearest_divisor
from meshwright.strategy.record import AXIS_ORDER, CUSTOM, PLACED_AXES, Strategy, strategy_table
from meshwright.workload import Workload


def stage_number_problems(num_stages: int, graph: Graph) -> list[Problem]:
    """There are at most as many stages as blocks in the model's sequence."""
    total = len(graph.sequence)
    if num_stages <= total:
        return []
    rule = f"at most {total} stages: {total - 2} layers, and embedding and head may be stages of their own"
    return [Problem("pp*vpp", str(num_stages), rule, str(total))]


def order_problems(strategy: Strategy, num_microbatches: int) -> list[Problem]:
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


def number_problems(strategy: Strategy) -> Iterator[Problem]:
    """Axes that are unknown, empty or named twice, and no microbatch: the other rules divide by these."""
    known = ("pp", *PLACED_AXES) if strategy.is_placed else AXIS_ORDER
    meshes = {"mesh": strategy.mesh}
    meshes |= {f"stages[{index}].mesh": stage.mesh for index, stage in enumerate(strategy.stages) if stage.mesh}
    for where, mesh in meshes.items():
        for axis in mesh:
            if axis.name not in known:
                rule = f"no such axis; known: {', '.join(known)}"
                yield Problem(where, axis.name, rule, nearest_name(axis.name, known))
            if axis.size < 1:
                yield Problem(f"{where}.{axis.name}", str(axis.size), "must be at least 1", "1")
        names = [axis.name for axis in mesh]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield Problem(where, name, "an axis is named once")
    if strategy.microbatch < 1:
        yield Problem("microbatch", str(strategy.microbatch), "must be at least 1", "1")


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
        return stage_number_problems(len(strategy.stages), graph)
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
