"""Stages over devices: the problem under every two-level method, and the one judge of its plans.

Units (blocks of a model, or operators) stand in an order in which they can run. A plan gives each to a stage; a stage
has a group of devices and, for each of its units, an *option*: how the unit lies on a group of that size. What options
cost is known beforehand (`pipelines.stage_problem_of` prices them), so that methods see numbers alone.

Time of a stage for one microbatch, F + B: the forwards and backwards of its units, what it sends to other stages
(outputs in its forward, gradients of its inputs in its backward; a message occupies its sender), and an m-th of its
update (gradients are reduced once a step, which is spread over its m microbatches). A step takes what the schedule
makes of these, `cost.pipeline`. Where an update follows each microbatch it runs beside it: max(F + B, update).

Memory of a stage: the state of its units, further versions of its weights where the schedule keeps them, activations
kept for each microbatch in flight, and the largest working set.

Legend of the suffixes: U units, H kinds of unit (equal units are one kind), K options, E edges, S stages, A and B the
options on the two sides of a hand-over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from meshwright.cost.pipeline import pipeline_time
from meshwright.errors import InputError, Problem
from meshwright.schedule import (
    Action,
    ActionKind,
    Table,
    actions,
    peak_in_flight,
    replay,
    updates_each_microbatch,
    weight_versions,
)
from meshwright.strategy import CUSTOM, MeshAxis, Shorthand
from meshwright.units import format_bytes

Array = np.ndarray[Any, Any]
Splits = Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True)
class StageOption:
    """How units lie on a group of `num_devices`: by a shorthand of one stage, or by splits of each block on a mesh of
    the group's own. `is_copied`: its devices hold whole copies, and nothing else is split (PipeDream's replicated
    stages). Options of one `layout` take as it lies what another leaves."""

    name: str
    num_devices: int
    shorthand: Shorthand | None = None
    mesh: tuple[MeshAxis, ...] = ()
    splits: Splits = field(default_factory=dict)
    is_copied: bool = False
    layout: int = 0


@dataclass(frozen=True, eq=False)
class StageProblem:
    """See the module's docstring. Seconds are of one microbatch, except `update_HK`, of one update; infinite forward
    forbids an option. `weights_HK` are the parameters alone, part of `state_HK`. `edges_E` are pairs of units, the
    earlier first, with the bytes handed over for each microbatch. A message of n bytes takes its sender, under option
    k, `latency_K[k] + n * seconds_per_byte_K[k]`. `switch_AB` are seconds per byte, forward and backward, where
    neighbours on one group have different layouts (of `StageOption.layout`). `memory_limit` is what a device has for
    all this. `factor` and `constant_s` make a step of a pipeline's seconds; `causes`, each H x K, sum to the seconds of
    forward and backward, where they are told apart."""

    units: tuple[str, ...]
    kind_U: Array
    edges_E: Array
    bytes_E: Array
    options: tuple[StageOption, ...]
    forward_HK: Array
    backward_HK: Array
    update_HK: Array
    weights_HK: Array
    state_HK: Array
    kept_HK: Array
    working_HK: Array
    latency_K: Array
    seconds_per_byte_K: Array
    num_devices: int
    num_microbatches: int
    memory_limit: float
    switch_AB: Array = field(default_factory=lambda: np.zeros((1, 1)))
    factor: float = 1.0
    constant_s: float = 0.0
    causes: Mapping[str, Array] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        """Units."""
        return len(self.units)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of devices that some option has, in order."""
        return tuple(sorted({option.num_devices for option in self.options}))

    @cached_property
    def devices_K(self) -> Array:
        """Devices of each option."""
        return np.array([option.num_devices for option in self.options], dtype=np.int64)

    @cached_property
    def layout_K(self) -> Array:
        """Layout of each option."""
        return np.array([option.layout for option in self.options], dtype=np.int64)

    def step_seconds(self, pipeline_s: float) -> float:
        """Seconds of a step whose pipeline takes so many."""
        return self.factor * pipeline_s + self.constant_s

    def only(self, options: Iterable[int]) -> StageProblem:
        """The same problem with some of its options."""
        kept = np.array(sorted(options), dtype=np.int64)
        columns = {name: getattr(self, name)[:, kept] for name in _COLUMNS}
        rows = {name: getattr(self, name)[kept] for name in ("latency_K", "seconds_per_byte_K")}
        causes = {cause: values[:, kept] for cause, values in self.causes.items()}
        return replace(self, options=tuple(self.options[k] for k in kept), causes=causes, **columns, **rows)


_COLUMNS = ("forward_HK", "backward_HK", "update_HK", "weights_HK", "state_HK", "kept_HK", "working_HK")


@dataclass(frozen=True)
class PlannedStage:
    """A group of devices with its units, in order, and the option of each."""

    units: tuple[int, ...]
    options: tuple[int, ...]


@dataclass(frozen=True)
class StagePlan:
    """Stages in the order in which a microbatch first reaches them, and the schedule that they run."""

    stages: tuple[PlannedStage, ...]
    schedule: str = "1F1B"


@dataclass(frozen=True)
class StageCost:
    """What a plan costs. `turn_S` are the seconds of a microbatch on each stage (`forward_S` of it in the forward),
    `period_s` the time in which one microbatch follows another: the slowest stage's. `reasons`: why it cannot run."""

    step_time_s: float
    period_s: float
    forward_S: Array
    turn_S: Array
    memory_S: Array
    in_flight_S: Array
    reasons: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether it can run."""
        return not self.reasons


def stage_of_units(problem: StageProblem, plan: StagePlan) -> Array:
    """The stage of each unit; -1 where none has it."""
    stage_U = np.full(problem.num_units, -1)
    for index, stage in enumerate(plan.stages):
        stage_U[list(stage.units)] = index
    return stage_U


def plan_problems(problem: StageProblem, plan: StagePlan) -> list[Problem]:
    """Everything that makes a plan none: units left out or given twice, options that are not there or of other groups,
    too many devices."""
    held = np.bincount([unit for stage in plan.stages for unit in stage.units], minlength=problem.num_units)
    found = [
        Problem("stages", problem.units[unit], f"is on {held[unit]} stages; every unit is on one")
        for unit in np.flatnonzero(held != 1)[:8]
    ]
    for index, stage in enumerate(plan.stages):
        sizes = {int(problem.devices_K[option]) for option in stage.options}
        if not stage.units or len(stage.options) != len(stage.units):
            found.append(Problem(f"stages[{index}]", str(len(stage.options)), "one option for each of its units"))
        elif len(sizes) > 1:
            found.append(Problem(f"stages[{index}]", str(sorted(sizes)), "options on one group of devices"))
    used = sum(num_devices(problem, stage) for stage in plan.stages if stage.options)
    if used > problem.num_devices:
        found.append(Problem("stages", f"{used} devices", f"there are {problem.num_devices}"))
    return found


def num_devices(problem: StageProblem, stage: PlannedStage) -> int:
    """Devices of a stage's group."""
    return int(problem.devices_K[stage.options[0]])


def is_pipeline(problem: StageProblem, plan: StagePlan) -> bool:
    """Whether every edge leads from a stage to itself or a later one: a microbatch passes each stage once."""
    stage_U = stage_of_units(problem, plan)
    one, other = stage_U[problem.edges_E[:, 0]], stage_U[problem.edges_E[:, 1]]
    return bool(np.all(one <= other))


def evaluate(problem: StageProblem, plan: StagePlan) -> StageCost:
    """Time and memory of a plan. Pipelines take the closed form of their schedule; where stages are not contiguous
    (FTPipe), an order of the pieces is made, `piece_table`, and replayed.

    Raises `InputError` where it is no plan of the problem."""
    if problems := plan_problems(problem, plan):
        raise InputError(problems)
    if not is_pipeline(problem, plan):
        return _evaluate_pieces(problem, plan)
    m, p = problem.num_microbatches, len(plan.stages)
    forward_S, turn_S = _times(problem, plan)
    ranks = np.arange(p)
    in_flight_S = peak_in_flight(plan.schedule, p, 1, m, ranks)
    versions_S = weight_versions(plan.schedule, p, 1, m, ranks)
    memory_S = np.array(
        [
            _memory(problem, stage, held, versions)
            for stage, held, versions in zip(plan.stages, in_flight_S.tolist(), versions_S.tolist(), strict=True)
        ]
    )
    pipeline_s = np.inf
    if np.isfinite(turn_S).all():
        columns = (forward_S[:, None], (turn_S - forward_S)[:, None], np.zeros((p, 1)), np.ones((p, 1)))
        pipeline_s = float(pipeline_time(plan.schedule, *columns, 1, m)[0])
    return _stage_cost(problem, plan, pipeline_s, forward_S, turn_S, memory_S, in_flight_S)


def _stage_cost(
    problem: StageProblem,
    plan: StagePlan,
    seconds: float,
    forward_S: Array,
    turn_S: Array,
    memory_S: Array,
    in_flight_S: Array,
) -> StageCost:
    """The cost of a plan whose pipeline takes so many seconds."""
    return StageCost(
        step_time_s=problem.step_seconds(seconds),
        period_s=problem.factor * float(turn_S.max()),
        forward_S=forward_S,
        turn_S=turn_S,
        memory_S=memory_S,
        in_flight_S=in_flight_S,
        reasons=_reasons(problem, plan, turn_S, memory_S, in_flight_S),
    )


def replayed_s(problem: StageProblem, plan: StagePlan) -> float:
    """Seconds of a pipeline's step by its actions one by one, without a closed form: the same for equal stages, and
    for uneven ones mostly within a few percent of it, either way. Of asynchronous schedules that of one step alone."""
    if not is_pipeline(problem, plan):
        return evaluate(problem, plan).step_time_s
    forward_S, turn_S = _times(problem, plan)
    table = actions(plan.schedule, len(plan.stages), 1, problem.num_microbatches)

    def seconds(action: Action) -> float:
        own = forward_S[action.stage]
        return float(own if action.kind is ActionKind.F else turn_S[action.stage] - own)

    return problem.step_seconds(replay(table, seconds, len(plan.stages)).makespan_s)


def _times(problem: StageProblem, plan: StagePlan) -> tuple[Array, Array]:
    """Seconds of each stage's forward, and of its whole turn."""
    m, stage_U = problem.num_microbatches, stage_of_units(problem, plan)
    option_U = options_of_units(problem, plan)
    kind_U = problem.kind_U
    p = len(plan.stages)

    def summed(values_U: Array) -> Array:
        return np.bincount(stage_U, values_U, minlength=p)

    forward_S = summed(problem.forward_HK[kind_U, option_U])
    backward_S = summed(problem.backward_HK[kind_U, option_U])
    update_S = summed(problem.update_HK[kind_U, option_U])
    for (one, other), size in zip(problem.edges_E.tolist(), problem.bytes_E.tolist(), strict=True):
        k, into = option_U[one], option_U[other]
        if stage_U[one] != stage_U[other]:
            forward_S[stage_U[one]] += problem.latency_K[k] + size * problem.seconds_per_byte_K[k]
            backward_S[stage_U[other]] += problem.latency_K[into] + size * problem.seconds_per_byte_K[into]
        else:
            switched_s = size * problem.switch_AB[problem.layout_K[k], problem.layout_K[into]]
            forward_S[stage_U[one]] += switched_s / 2
            backward_S[stage_U[one]] += switched_s / 2
    if updates_each_microbatch_of(plan.schedule):
        return forward_S, np.maximum(forward_S + backward_S, update_S)
    return forward_S, forward_S + backward_S + update_S / m


def updates_each_microbatch_of(schedule: str) -> bool:
    """Whether a plan's schedule updates after each microbatch."""
    return schedule != CUSTOM and updates_each_microbatch(schedule)


def options_of_units(problem: StageProblem, plan: StagePlan) -> Array:
    """The option of each unit."""
    option_U = np.zeros(problem.num_units, dtype=np.int64)
    for stage in plan.stages:
        option_U[list(stage.units)] = stage.options
    return option_U


def _memory(problem: StageProblem, stage: PlannedStage, in_flight: float, versions: float) -> float:
    rows = (problem.kind_U[list(stage.units)], np.array(stage.options))
    state, weights, kept = (
        float(values[rows].sum()) for values in (problem.state_HK, problem.weights_HK, problem.kept_HK)
    )
    return state + (versions - 1) * weights + in_flight * kept + float(problem.working_HK[rows].max())


def _reasons(
    problem: StageProblem, plan: StagePlan, turn_S: Array, memory_S: Array, in_flight_S: Array
) -> tuple[str, ...]:
    found = []
    for index, stage in enumerate(plan.stages):
        if not np.isfinite(turn_S[index]):
            names = sorted({problem.options[option].name for option in stage.options})
            found.append(f"stage {index}: {', '.join(names)} cannot hold its units")
        elif memory_S[index] > problem.memory_limit:
            found.append(
                f"stage {index} of {len(stage.units)} units with {int(in_flight_S[index])} microbatches in flight "
                f"needs {format_bytes(memory_S[index])} of {format_bytes(problem.memory_limit)}"
            )
    return tuple(found)


# --- plans whose stages are not contiguous ----------------------------------------------------------------------------


def pieces_of(problem: StageProblem, plan: StagePlan) -> list[tuple[int, tuple[int, ...]]]:
    """Runs of units of one stage, in order, each with its stage: what a microbatch passes one after the other."""
    stage_U = stage_of_units(problem, plan)
    starts = [0, *(np.flatnonzero(np.diff(stage_U)) + 1).tolist(), problem.num_units]
    return [(int(stage_U[start]), tuple(range(start, stop))) for start, stop in pairwise(starts)]


def _as_pieces(problem: StageProblem, plan: StagePlan) -> tuple[StagePlan, Array]:
    """The plan with every piece as a stage of its own, and the device group of each."""
    option_U = options_of_units(problem, plan)
    pieces = pieces_of(problem, plan)
    stages = tuple(PlannedStage(units, tuple(option_U[list(units)].tolist())) for _, units in pieces)
    return StagePlan(stages, CUSTOM), np.array([stage for stage, _ in pieces])


def piece_table(
    forward_P: Sequence[float], backward_P: Sequence[float], rank_P: Sequence[int], num_ranks: int, microbatches: int
) -> Table:
    """An order for pieces that return to their ranks: each rank, when it is free, takes of what is ready a backward
    before a forward, the oldest microbatch first and of one microbatch the piece farthest on; at most as many
    microbatches as ranks are on their way (what 1F1B has on its first rank)."""
    num_pieces = len(rank_P)
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    ready_at: dict[tuple[int, int, bool], float] = {(0, b, True): 0.0 for b in range(min(num_ranks, microbatches))}
    free_at = [0.0] * num_ranks
    next_in = min(num_ranks, microbatches)
    while ready_at:
        # Of all ranks the work that can start first; of what one rank could do then, by the rule above.
        def start(work: tuple[int, int, bool]) -> float:
            return max(ready_at[work], free_at[rank_P[work[0]]])

        chosen = min(ready_at, key=lambda work: (start(work), work[2], work[1], -work[0]))
        piece, microbatch, is_forward = chosen
        end_s = start(chosen) + (forward_P[piece] if is_forward else backward_P[piece])
        del ready_at[chosen]
        free_at[rank_P[piece]] = end_s
        rows[rank_P[piece]].append(Action(piece, ActionKind.F if is_forward else ActionKind.B, microbatch))
        if is_forward and piece + 1 < num_pieces:
            ready_at[piece + 1, microbatch, True] = end_s
        elif is_forward:
            ready_at[piece, microbatch, False] = end_s
        elif piece:
            ready_at[piece - 1, microbatch, False] = end_s
        elif next_in < microbatches:
            ready_at[0, next_in, True] = end_s
            next_in += 1
    return tuple(tuple(row) for row in rows)


def pieces_and_table(problem: StageProblem, plan: StagePlan) -> tuple[StagePlan, Array, Table]:
    """The pieces of a plan as stages, the group of devices of each, and an order for them."""
    pieces, rank_P = _as_pieces(problem, plan)
    forward_P, turn_P = _times(problem, pieces)
    backward_P = (turn_P - forward_P).tolist()
    ranks = rank_P.tolist()
    return (
        pieces,
        rank_P,
        piece_table(forward_P.tolist(), backward_P, ranks, len(plan.stages), problem.num_microbatches),
    )


def _evaluate_pieces(problem: StageProblem, plan: StagePlan) -> StageCost:
    pieces, rank_P, table = pieces_and_table(problem, plan)
    forward_P, turn_P = _times(problem, pieces)
    p = len(plan.stages)
    forward_S, turn_S = (np.bincount(rank_P, values, minlength=p) for values in (forward_P, turn_P))

    def seconds(action: Action) -> float:
        own = forward_P[action.stage]
        return float(own if action.kind is ActionKind.F else turn_P[action.stage] - own)

    finite = bool(np.isfinite(turn_P).all())
    makespan_s = replay(table, seconds, len(pieces.stages)).makespan_s if finite else np.inf
    held_P = _held(table, len(pieces.stages))
    memory_S = np.zeros(p)
    for rank, stage in enumerate(plan.stages):
        rows = (problem.kind_U[list(stage.units)], np.array(stage.options))
        memory_S[rank] = problem.state_HK[rows].sum() + problem.working_HK[rows].max()
    for piece, stage in enumerate(pieces.stages):
        rows = (problem.kind_U[list(stage.units)], np.array(stage.options))
        memory_S[rank_P[piece]] += held_P[piece] * problem.kept_HK[rows].sum()
    in_flight_S = np.array([held_P[rank_P == rank].max() for rank in range(p)])
    return _stage_cost(problem, plan, makespan_s, forward_S, turn_S, memory_S, in_flight_S)


def _held(table: Table, num_pieces: int) -> Array:
    """The most microbatches of which each piece keeps something."""
    held, most = np.zeros(num_pieces, dtype=np.int64), np.zeros(num_pieces, dtype=np.int64)
    for row in table:
        for action in row:
            held[action.stage] += 1 if action.kind is ActionKind.F else -1
            most[action.stage] = max(most[action.stage], held[action.stage])
    return most
