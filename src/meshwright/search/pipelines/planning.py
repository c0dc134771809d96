"""From a question about a model to strategies: the problem for each number of microbatches, a method's plan, its
strategy and its estimate. Every two-level method registers through `two_level`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.errors import InputError, Problem, is_interrupt
from meshwright.graph import Graph, operator_flops
from meshwright.plan import Certificate
from meshwright.results import Estimate
from meshwright.schedule import Action, Table, actions
from meshwright.search.graph_method import GRAPH_METHODS, GraphAnswer, GraphQuestion, Placed
from meshwright.search.pipelines.answer import Asked, StageAnswer, StageMethod
from meshwright.search.pipelines.placed import is_named, placed_problem_of
from meshwright.search.pipelines.pricing import Choices, microbatch_counts, stage_problem_of
from meshwright.search.stages import (
    PlannedStage,
    StageCost,
    StagePlan,
    StageProblem,
    evaluate,
    is_pipeline,
    num_devices,
    options_of_units,
    pieces_and_table,
    stage_of_units,
)
from meshwright.sharding import StatePlacement
from meshwright.strategy import (
    CUSTOM,
    BlockRange,
    MeshAxis,
    Recompute,
    Stage,
    Strategy,
    expand,
)
from meshwright.units import format_bytes
from meshwright.workload import Workload

# --- plans as strategies ----------------------------------------------------------------------------------------------


def strategy_of(problem: StageProblem, plan: StagePlan, graph: Graph, workload: Workload) -> Strategy:
    """The strategy that a plan of a model's blocks stands for.

    Where all stages are alike it is an ordinary one. Else each stage has a mesh and splits of its own, the mesh of the
    whole is the pipeline alone, and `microbatch` counts the sequences of all ranks. Runs of one option inside a stage
    (layer-wise methods), and pieces of a stage that is not contiguous, are stages of their own on its rank; their order
    is a table."""
    pieces, rank_P, table = _pieces(problem, plan)
    sequences = workload.global_batch // problem.num_microbatches
    options = {stage.options[0] for stage in pieces}
    stages = [Stage(int(rank), _ranges(stage.units)) for stage, rank in zip(pieces, rank_P, strict=True)]
    schedule = CUSTOM if table else plan.schedule
    rows = tuple(",".join(map(str, row)) for row in table)
    p = len(plan.stages)
    pipeline = (MeshAxis("pp", p),) if p > 1 else ()
    if len(options) == 1:
        base = _expanded(problem, options.pop(), graph, sequences)
        mesh = (*pipeline, *base.mesh)
        return replace(base, mesh=mesh, stages=tuple(stages), schedule=schedule, table=rows)
    own = [_expanded(problem, stage.options[0], graph, sequences) for stage in pieces]
    states, recomputes = [each.state for each in own], [each.recompute for each in own]
    return Strategy(
        mesh=pipeline,
        splits={},
        stages=tuple(_on_own_mesh(stage, each) for stage, each in zip(stages, own, strict=True)),
        schedule=schedule,
        microbatch=sequences,
        state=states[0] if len(set(map(repr, states))) == 1 else StatePlacement(()),
        recompute=recomputes[0] if all(each == recomputes[0] for each in recomputes) else _none(graph),
        table=rows,
    )


def _none(graph: Graph) -> dict[str, Recompute]:
    return {block.name: Recompute.NONE for block in graph.blocks}


def _expanded(problem: StageProblem, option: int, graph: Graph, sequences: int) -> Strategy:
    chosen = problem.options[option]
    if chosen.shorthand is not None:
        return expand(chosen.shorthand, graph)
    splits = {name: {key: dict(split) for key, split in own.items()} for name, own in chosen.splits.items()}
    return Strategy(chosen.mesh, splits, (), "1F1B", sequences, StatePlacement(()), _none(graph))


def _on_own_mesh(stage: Stage, own: Strategy) -> Stage:
    return replace(
        stage,
        mesh=own.mesh or (MeshAxis("dp_replicate", 1),),
        splits=own.splits,
        state=own.state,
        recompute=own.recompute,
    )


def _ranges(units: Sequence[int]) -> tuple[BlockRange, ...]:
    """Runs of neighbours.

    >>> _ranges((0, 1, 4))
    (BlockRange(start=0, stop=2), BlockRange(start=4, stop=5))
    """
    found: list[BlockRange] = []
    for unit in units:
        if found and found[-1].stop == unit:
            found[-1] = BlockRange(found[-1].start, unit + 1)
        else:
            found.append(BlockRange(unit, unit + 1))
    return tuple(found)


def _pieces(problem: StageProblem, plan: StagePlan) -> tuple[list[PlannedStage], list[int], Table]:
    """Stages of one option each, with their ranks, and the order in which ranks run them where a rank has several."""
    if is_pipeline(problem, plan):
        stages, ranks = list(plan.stages), list(range(len(plan.stages)))
        table: Table = ()
        runs = [list(_runs(stage)) for stage in stages]
        if any(len(own) > 1 for own in runs):
            table = actions(plan.schedule, len(stages), 1, problem.num_microbatches)
    else:
        pieces, rank_P, table = pieces_and_table(problem, plan)
        ranks, runs = rank_P.tolist(), [list(_runs(stage)) for stage in pieces.stages]
    if not table:
        return [run for own in runs for run in own], ranks, ()
    _make_even(runs, ranks)
    first = np.cumsum([0, *map(len, runs)]).tolist()
    rows = tuple(
        tuple(part for action in row for part in _passed(action, range(*first[action.stage : action.stage + 2])))
        for row in table
    )
    return (
        [run for own in runs for run in own],
        [rank for rank, own in zip(ranks, runs, strict=True) for _ in own],
        rows,
    )


def _make_even(runs: list[list[PlannedStage]], ranks: Sequence[int]) -> None:
    """Split runs, the longest first, until every rank has as many, as far as there are units."""
    counts = Counter(rank for rank, own in zip(ranks, runs, strict=True) for _ in own)
    target = max(counts.values())
    for rank, count in counts.items():
        for _ in range(target - count):
            places = [(n, k) for n, own in enumerate(runs) if ranks[n] == rank for k in range(len(own))]
            n, k = max(places, key=lambda place: len(runs[place[0]][place[1]].units))
            run, half = runs[n][k], len(runs[n][k].units) // 2
            if half:
                halves = ((run.units[:half], run.options[:half]), (run.units[half:], run.options[half:]))
                runs[n][k : k + 1] = [PlannedStage(*each) for each in halves]


def _runs(stage: PlannedStage) -> Iterator[PlannedStage]:
    """Neighbours of one option."""
    start = 0
    for stop in range(1, len(stage.units) + 1):
        if stop == len(stage.units) or stage.options[stop] != stage.options[start]:
            yield PlannedStage(stage.units[start:stop], stage.options[start:stop])
            start = stop


def _passed(action: Action, pieces: range) -> Iterator[Action]:
    """What an action of a whole stage is for its pieces, in the order in which they run."""
    order = pieces if action.kind == "F" else reversed(pieces)
    yield from (replace(action, stage=piece) for piece in order)


# --- plans as estimates -----------------------------------------------------------------------------------------------


def estimate_of_plan(
    problem: StageProblem, plan: StagePlan, question: GraphQuestion, cost: StageCost | None = None
) -> Estimate:
    """What a plan of a model's blocks costs, as a record. `time` is of the slowest stage, and what others make it wait;
    `memory` of the stage that needs most."""
    cost = cost or evaluate(problem, plan)
    graph, workload, cluster = question.graph, question.workload, question.cluster
    time_ledger = _time_ledger(problem, plan, cost)
    worst = int(cost.memory_S.argmax())
    memory = _memory_ledger(problem, plan, cost, worst, question.engine.memory.reserved_bytes)
    machine_peak = _peak_flops(question)
    model = 3 * graph.forward_flops(workload.global_batch, workload.seq_len)
    again = _flops_again(problem, plan, graph, workload)
    step_s = cost.step_time_s
    return Estimate(
        feasible=cost.feasible,
        reasons=cost.reasons,
        step_time_s=step_s,
        time=time_ledger,
        memory=memory,
        peak_memory_bytes=math.fsum(memory.values()),
        mfu=model / (machine_peak * cluster.num_devices * step_s),
        hfu=(model + again) / (machine_peak * cluster.num_devices * step_s),
        bubble_fraction=time_ledger["bubble"] / step_s,
        communication={"pp": _sent_bytes(problem, plan)},
        tokens_per_s=workload.tokens / step_s,
        assumptions=(
            "a stage's update is spread over its microbatches",
            "communication lists messages between stages alone",
        ),
    )


def _time_ledger(problem: StageProblem, plan: StagePlan, cost: StageCost) -> dict[str, float]:
    slowest = int(cost.turn_S.argmax())
    stage, m, factor = plan.stages[slowest], problem.num_microbatches, problem.factor
    rows = (problem.kind_U[list(stage.units)], np.array(stage.options))
    turn_s = float(cost.turn_S[slowest])
    computed = {cause: float(values[rows].sum()) for cause, values in problem.causes.items()}
    if not computed:
        computed = {"compute": float((problem.forward_HK + problem.backward_HK)[rows].sum())}
    update_s = float(problem.update_HK[rows].sum()) / m
    others_s = turn_s - math.fsum(computed.values())
    update_s = min(max(others_s, 0.0), update_s)  # beside the turn where it follows each microbatch
    ledger = {cause: factor * m * seconds for cause, seconds in computed.items() if seconds}
    ledger["exposed_pp"] = factor * m * max(others_s - update_s, 0.0)
    ledger["update"] = factor * m * update_s
    ledger["constant"] = problem.constant_s
    ledger["bubble"] = max(cost.step_time_s - math.fsum(ledger.values()), 0.0)
    return ledger


def _memory_ledger(
    problem: StageProblem, plan: StagePlan, cost: StageCost, worst: int, reserved: float
) -> dict[str, float]:
    stage = plan.stages[worst]
    rows = (problem.kind_U[list(stage.units)], np.array(stage.options))
    weights, state = float(problem.weights_HK[rows].sum()), float(problem.state_HK[rows].sum())
    working = float(problem.working_HK[rows].max())
    return {
        "parameters": weights,
        "gradients_and_optimizer": state - weights,
        "activations": float(cost.memory_S[worst]) - state - working,
        "working_set": working,
        "reserved": reserved,
    }


def _peak_flops(question: GraphQuestion) -> float:
    from meshwright.cost.layouts import machine_of

    peak_flops: float = machine_of(question.cluster, question.engine, question.workload).rates.peak_flops
    return peak_flops


def _flops_again(problem: StageProblem, plan: StagePlan, graph: Graph, workload: Workload) -> float:
    """FLOPs of contractions that backwards compute again, of the whole step."""
    sizes = graph.sizes(workload.global_batch, workload.seq_len)
    whole: dict[str, float] = {}
    grouped: dict[str, float] = {}
    for block in graph.blocks:
        flops = [(item, operator_flops(item, block.dim_aliases(item), sizes)) for item in block.operators]
        whole[block.name] = sum(number for _, number in flops)
        grouped[block.name] = sum(number for item, number in flops if item.recompute_group)
    ends = {name for name in (graph.sequence[0], graph.sequence[-1]) if graph.counts[name] == 1}
    total = 0.0
    for name, k in zip(problem.units, options_of_units(problem, plan).tolist(), strict=True):
        shorthand = problem.options[k].shorthand
        if shorthand is not None and name not in ends:
            total += {Recompute.FULL: whole, Recompute.SELECTIVE: grouped}.get(shorthand.recompute, {}).get(name, 0.0)
    return total


def _sent_bytes(problem: StageProblem, plan: StagePlan) -> float:
    """Bytes that a device of the stage that sends most sends to others in a step; of a group each an equal share."""
    stage_U = stage_of_units(problem, plan)
    sent = np.zeros(len(plan.stages))
    for (one, other), size in zip(problem.edges_E.tolist(), problem.bytes_E.tolist(), strict=True):
        if stage_U[one] != stage_U[other]:
            for sender in (stage_U[one], stage_U[other]):
                sent[sender] += size / num_devices(problem, plan.stages[sender])
    return float(problem.num_microbatches * sent.max())


#: Numbers of microbatches that are tried, and fewer where every operator is placed for each.
MOST_COUNTS, MOST_PLACED_COUNTS = 8, 3

# --- questions to methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoLevel:
    """A two-level method as one for graphs. `recomputes`: the paper's own method makes activations again, whether or
    not the question asks for it; `takes_cuts`: a user's cuts mean something to it."""

    name: str
    method: StageMethod
    recomputes: bool = False
    takes_cuts: bool = False
    with_switches: bool = False

    def __call__(self, question: GraphQuestion) -> GraphAnswer:
        """The plan of each number of microbatches, best first."""
        if problems := list(self._problems(question)):
            raise InputError(problems)
        started, started_cpu = time.perf_counter(), time.process_time()
        phases = {"pricing": 0.0, "search": 0.0, "strategy": 0.0}
        kinds = tuple(Recompute) if question.with_recompute or self.recomputes else (Recompute.NONE,)
        asked = Asked(tuple(question.cuts), question.seed, question.deadline)
        most = MOST_COUNTS if is_named(question.graph) else MOST_PLACED_COUNTS
        counts = (question.microbatches,) if question.microbatches else microbatch_counts(question.workload, most)
        found: list[tuple[Placed, int]] = []
        answers: list[tuple[StageProblem, StageAnswer]] = []
        reasons: dict[str, None] = {}
        untried: tuple[int, ...] = ()
        for index, count in enumerate(counts[::-1]):  # the most microbatches first: they need the least memory
            if answers and question.deadline.passed:
                untried = tuple(counts[: len(counts) - index])
                break
            tick = time.process_time()
            try:
                problem = self._problem(question, count, kinds)
            except InputError as error:
                if question.microbatches:
                    raise
                reasons[str(error)] = None  # this number is ours, not the user's
                continue
            tock = time.process_time()
            try:
                answer = self.method(problem, replace(asked, known_s=_known(found)))
            except (KeyboardInterrupt, SystemError) as error:
                if not found or not is_interrupt(error):
                    raise
                untried = tuple(counts[: len(counts) - index])  # the best so far is the answer
                break
            phases["pricing"] += tock - tick
            phases["search"] += time.process_time() - tock
            answers.append((problem, answer))
            if answer.plan is None:
                reasons[f"{count} microbatches: {answer.statement}{_least_memory(problem)}"] = None
                continue
            tick = time.process_time()
            found.append((self._placed(question, problem, answer), count))
            phases["strategy"] += time.process_time() - tick
        found.sort(key=lambda each: each[0].estimate.step_time_s)
        if untried:
            reasons[f"the time limit came before {_listed(untried)} microbatches were tried: more time"] = None
        # Where operators are placed, groups of devices are left out at the deadline.
        complete = not untried and (is_named(question.graph) or not question.deadline.passed)
        return GraphAnswer(
            found=tuple(placed for placed, _ in found),
            certificate=self._certificate(question, answers, found, untried, is_complete=complete),
            lower_bound_s=_bound(answers) if complete else -math.inf,
            reasons=() if found else tuple(reasons),
            elapsed_s=time.perf_counter() - started,
            cpu_s=time.process_time() - started_cpu,
            phases_s=phases,
        )

    def _problems(self, question: GraphQuestion) -> Iterator[Problem]:
        if question.objective != "step_time":
            rule = f"{self.name} minimises time within memory"
            yield Problem("objective", question.objective, rule, "step_time")
        if question.mesh:
            text = "x".join(str(axis.size) for axis in question.mesh)
            yield Problem("mesh", text, f"{self.name} chooses the mesh of each stage", "leave it out")
        if question.annotations:
            rule = f"{self.name} chooses all splits; gspmd completes given ones"
            yield Problem("annotations", ", ".join(question.annotations), rule, "--method gspmd")
        if question.cuts and not self.takes_cuts:
            rule = f"{self.name} chooses where stages begin; gpipe takes cuts"
            yield Problem("cuts", ",".join(map(str, question.cuts)), rule, "--method gpipe")

    def _problem(self, question: GraphQuestion, count: int, kinds: tuple[Recompute, ...]) -> StageProblem:
        if not is_named(question.graph):
            return placed_problem_of(
                question.graph,
                question.cluster,
                question.engine,
                question.workload,
                count,
                deadline=question.deadline,
            )
        return stage_problem_of(
            question.graph,
            question.cluster,
            question.engine,
            question.workload,
            count,
            Choices(recomputes=kinds),
            with_switches=self.with_switches,
        )

    def _placed(self, question: GraphQuestion, problem: StageProblem, answer: StageAnswer) -> Placed:
        assert answer.plan is not None
        return Placed(
            strategy=strategy_of(problem, answer.plan, question.graph, question.workload),
            estimate=estimate_of_plan(problem, answer.plan, question),
            objective=answer.objective,
        )

    def _certificate(
        self,
        question: GraphQuestion,
        answers: Sequence[tuple[StageProblem, StageAnswer]],
        found: Sequence[tuple[Placed, int]],
        untried: Sequence[int],
        *,
        is_complete: bool,
    ) -> Certificate:
        numbers = _listed(sorted(problem.num_microbatches for problem, _ in answers))
        late = f" (no time for {_listed(untried)})" if untried else ""
        late = late or ("" if is_complete else " (some groups of devices left out at the time limit)")
        best = next((each for each in answers if found and each[0].num_microbatches == found[0][1]), None)
        says = best[1].statement if best else "no plan was found"
        return Certificate(
            method=self.name,
            space="stages",
            evaluator="analytic" if is_named(question.graph) else "placed",
            num_strategies=sum(answer.num_looked_at for _, answer in answers),
            num_feasible=len(found),
            exhaustive=bool(answers)
            and is_complete
            and all(_is_proven(answer, _known(found)) for _, answer in answers),
            statement=f"numbers of microbatches tried: {numbers or 'none'}{late}; {says}",
            objective=question.objective,
            seed=question.seed,
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _is_proven(answer: StageAnswer, known_s: float) -> bool:
    """Whether a plan is proven the best by its method's objective; or, without one, that none is better than what is
    known."""
    return answer.is_optimal if answer.plan else answer.lower_bound >= known_s


def _known(found: Sequence[tuple[Placed, int]]) -> float:
    return min((placed.estimate.step_time_s for placed, _ in found), default=math.inf)


def _bound(answers: Sequence[tuple[StageProblem, StageAnswer]]) -> float:
    """What no plan of any number of microbatches is faster than."""
    bounds = [answer.lower_bound if answer.bounds_step else -math.inf for _, answer in answers]
    return min(bounds, default=-math.inf)


def _least_memory(problem: StageProblem) -> str:
    """What the model needs, spread over all devices, where that is already more than they have."""
    per_device = (problem.state_HK * problem.devices_K)[problem.kind_U].sum(axis=0).min() / problem.num_devices
    if per_device <= problem.memory_limit:
        return ""
    return f" (state alone: at least {format_bytes(per_device)} a device of {format_bytes(problem.memory_limit)})"


def two_level(name: str, method: StageMethod, **habits: bool) -> None:
    """Register a two-level method under its paper's name."""
    GRAPH_METHODS.add(name, TwoLevel(name, method, **habits))
