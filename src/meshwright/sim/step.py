"""The simulated evaluator: a step as events, with the same ledger as the closed forms and what only events can tell.

`simulate` spells out each pipeline rank's program from the priced blocks and the strategy's table of actions, runs it,
and reads the step from it. Compared with `cost.step`, where a step is a formula, nothing is assumed of stages (uneven,
not contiguous, on unlike devices), of the number of microbatches, or of the schedule; and each task has its moment.

Assumptions: those of `build`; one step is simulated from rest (asynchronous schedules: the second of two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cost.analytic import Case, estimate_of, evaluation_of, memory_reasons
from meshwright.cost.extents import doublings
from meshwright.cost.passes import in_order, num_nodes
from meshwright.cost.step import StepColumns
from meshwright.errors import InputError, Problem
from meshwright.profile import Profile
from meshwright.results import Estimate
from meshwright.schedule import SCHEDULES, Table
from meshwright.sim.build import Built, build, rank_cluster, rank_number
from meshwright.sim.conditions import CALM, Conditions, perturbed
from meshwright.sim.flows import simulate_shared
from meshwright.sim.program import Detail, number
from meshwright.sim.sharing import shared_cores
from meshwright.sim.sharing import shared_links as flows_of
from meshwright.sim.tasks import TaskGraph, rank_tasks, task_graph
from meshwright.strategy import CUSTOM
from meshwright.sweep import FloatArray, Swept, circle_of_waits, sweep

#: More tasks than this would need more memory than most machines have, at some 75 bytes each.
MAX_TASKS = 200_000_000


@dataclass(frozen=True)
class Simulation:
    """A simulated step: its tasks with their times, and the estimate that follows."""

    case: Case
    table: Table
    graph: TaskGraph
    swept: Swept
    estimate: Estimate
    kept_bytes: tuple[float, ...]  # by stage, of a microbatch
    memory: tuple[dict[str, float], ...]  # by pipeline rank, bytes by category

    @cached_property
    def makespan_s(self) -> float:
        """From the first task's start to the last one's end."""
        return float(self.swept.end_N[: self.graph.num_tasks].max())


def simulate(
    case: Case,
    *,
    detail: Detail = Detail.STAGE,
    unfold: bool = False,
    conditions: Conditions = CALM,
    profile: Profile | None = None,
) -> Simulation:
    """Simulate a step of a legal strategy (see `strategy.strategy_problems`)."""
    return simulate_on(build(case, detail, profile), unfold=unfold, conditions=conditions)


# --- running ---------------------------------------------------------------------------------------------------------


def simulate_on(
    built: Built,
    *,
    unfold: bool = False,
    conditions: Conditions = CALM,
    shared_links: bool = False,
    num_cores: int | None = None,
    graph: TaskGraph | None = None,
) -> Simulation:
    """Run what was built; every device has tasks of its own where they may differ or share. `graph` is the one of an
    earlier run with all devices, where there was one."""
    all_devices = unfold or shared_links or num_cores is not None or not conditions.is_calm
    graph = graph or graph_of(built, unfold=all_devices)
    return run(built, graph, conditions, shared_links=shared_links, num_cores=num_cores)


def graph_of(built: Built, *, unfold: bool = False) -> TaskGraph:
    """The task graph of what was built; raises `InputError` where it would be too large."""
    ranks, strategy = rank_tasks(built.programs), built.case.strategy
    per_rank = strategy.num_devices // strategy.pipeline_size if unfold else 1
    num_tasks = per_rank * sum(rank.num_tasks for rank in ranks)
    if num_tasks > MAX_TASKS:
        rule = f"a simulation has at most {MAX_TASKS:,} tasks; coarser ones are fewer"
        raise InputError([Problem("simulation", f"{num_tasks:,} tasks", rule, "--detail stage")])
    return task_graph(ranks, strategy.mesh, unfold=unfold)


def run(
    built: Built,
    graph: TaskGraph,
    conditions: Conditions = CALM,
    *,
    shared_links: bool = False,
    num_cores: int | None = None,
) -> Simulation:
    """Run a task graph of programs under conditions, and read the step's ledgers. Of an unfolded graph transfers may
    share the cluster's links, or devices, being processes of one machine, its cores."""
    duration_N = perturbed(graph, built.case.strategy, conditions)
    if shared_links:
        swept = simulate_shared(graph.streams, *flows_of(graph, built.case.strategy, built.case.cluster, duration_N))
    elif num_cores is not None:
        swept = simulate_shared(graph.streams, *shared_cores(graph, duration_N, num_cores))
    else:
        swept = sweep(graph.streams, duration_N)
    assert not swept.waits, f"a table that was checked deadlocks: {circle_of_waits(graph.streams, swept.waits)}"
    memory = _memory(built)
    found = estimate_from(built, graph, swept, duration_N, memory)
    return Simulation(built.case, built.table, graph, swept, found, built.kept_bytes, tuple(memory))


def estimate_from(
    built: Built, graph: TaskGraph, swept: Swept, duration_N: FloatArray, memory: Sequence[dict[str, float]]
) -> Estimate:
    """The ledgers of a simulated step: of the rank that works longest its time by cause, and waiting for the rest."""
    case, m = built.case, built.case.strategy.num_microbatches(built.case.workload)
    engine = case.engine
    slowed = [_slowdown(graph, duration_N, rank) for rank in range(len(built.turns))]
    busy = [
        m * number(turn.forward_K[rank] + turn.backward_K[rank]) + slowed[rank] for rank, turn in enumerate(built.turns)
    ]
    slowest = int(np.argmax(busy))
    prepared, turn = built.prepared[slowest], built.turns[slowest]
    time = {cause: m * rank_number(built.rows.add(columns), slowest) for cause, columns in prepared.causes.items()}
    time["exposed_pp"] = built.sent_s[slowest] / built.rounds
    if engine.crossing.stall_s:
        time["stall"] = 2 * m * rank_number(turn.stall_K, slowest)
    if engine.memory.retry_s_per_byte:
        time["reallocation"] = 2 * m * rank_number(turn.retry_K, slowest)
    busy_s = in_order(time)
    ends = built.ends[slowest]
    for cause, seconds in ends.items():
        time[cause] = time.get(cause, 0.0) + seconds
    spent_s = _span(built, graph, swept)
    if slowed[slowest]:
        time["slowdown"] = slowed[slowest]
    time["bubble"] = max(spent_s - in_order(time), 0.0)  # the maximum is for rounding only
    pipeline_s = max(spent_s - in_order(ends), busy_s)
    lost = prepared.priced.machine.constants.straggler * number(doublings(num_nodes(prepared.priced)))
    time["stragglers"] = lost * spent_s
    time["constant"] = engine.step_constant_s + number(prepared.step_rank_s)
    step_s = in_order(time)
    if engine.pace != 1:
        time, step_s = {cause: engine.pace * seconds for cause, seconds in time.items()}, engine.pace * step_s
    worst = int(
        np.argmax([in_order(own) / machine.memory_bytes for own, machine in zip(memory, built.machines, strict=True)])
    )
    columns = StepColumns(
        time={cause: _cell(seconds) for cause, seconds in time.items()},
        memory={category: _cell(size) for category, size in memory[worst].items()},
        step_time_s=_cell(step_s),
        peak_memory_bytes=_cell(in_order(memory[worst])),
        bubble_fraction=_cell(time["bubble"] / (engine.pace * pipeline_s)),
        worst_rank=_cell(worst),
        slowest_rank=_cell(slowest),
    )
    found = estimate_of(evaluation_of(built.batch, prepared, columns), 0)
    own_cluster = rank_cluster(case.cluster, case.strategy, worst)
    reasons = memory_reasons(memory[worst], in_order(memory[worst]), worst, own_cluster)
    # Utilisation refers to the peak of all devices, and `found` to that of the slowest rank's on each.
    peaks = [float(machine.rates.peak_flops) for machine in built.machines]
    share = float(prepared.priced.machine.rates.peak_flops) / (sum(peaks) / len(peaks))
    return replace(
        found,
        evaluator="simulated",
        feasible=not reasons,
        reasons=reasons,
        mfu=share * found.mfu,
        hfu=share * found.hfu,
    )


def _cell(value: float) -> Any:
    return np.full((1, 1, 1), value)


def _memory(built: Built) -> list[dict[str, float]]:
    return [
        {category: rank_number(bytes_K, rank) for category, bytes_K in turn.memory.ledger.items()}
        for rank, turn in enumerate(built.turns)
    ]


def _span(built: Built, graph: TaskGraph, swept: Swept) -> float:
    """Seconds of a step: from rest to the last task's end; where ranks need not wait for one another between steps, the
    longest span of one; without a flush, from one update to the one a step later on the rank that is last."""
    schedule = built.case.strategy.schedule
    if schedule != CUSTOM and SCHEDULES[schedule].staggers_steps:
        return max(_rank_span(graph, swept, rank) for rank in range(len(graph.ranks)))
    if built.rounds == 1:
        return float(swept.end_N[: graph.num_tasks].max())
    spans = []
    for rank, program in enumerate(built.programs):
        place = graph.bases_P[rank] + graph.ranks[rank].emitted_n
        marks = program.marks
        first, last = marks[len(marks) // built.rounds - 1], marks[-1]
        spans.append(swept.end_N[place[last]] - swept.end_N[place[first]])
    return float(max(spans))


def _rank_span(graph: TaskGraph, swept: Swept, rank: int) -> float:
    """Seconds from the first chained task of a rank to the end of its last, of the device that takes longest."""
    chained = graph.ranks[rank].chained_n
    spans = []
    for device in range(graph.num_devices):
        tasks = graph.tasks_of(rank, device)
        spans.append(swept.end_N[tasks][chained].max() - swept.start_N[tasks][chained].min())
    return float(max(spans))


def _slowdown(graph: TaskGraph, duration_N: FloatArray, rank: int) -> float:
    """Seconds that the slowest device of a rank works longer than without jitter and stragglers."""
    if duration_N is graph.duration_N:
        return 0.0
    own = graph.ranks[rank]
    more = [
        float((duration_N[part] - graph.duration_N[part])[own.chained_n].sum())
        for part in (graph.tasks_of(rank, device) for device in range(graph.num_devices))
    ]
    return max(more)
