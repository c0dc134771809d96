"""Where stages may begin and end, and what each stage that could stand there costs: prepared once for all methods.

A state is the set of units done so far; a stage leads from one state to a larger one. On a chain states are prefixes;
on a graph with branches they are its *downsets* (Piper): sets that hold, with a unit, all that it depends on. Stages
that hold equal units and cut equally many bytes cost the same and are priced once.

Legend: V states, the empty one first and the whole last; T stages as transitions between states, by the state that they
begin in; G distinct stages; H kinds of unit, K options, N sizes of device group, Q stages from here to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.schedule import peak_in_flight, updates_each_microbatch, weight_versions
from meshwright.search.stages import Array, PlannedStage, StagePlan, StageProblem

#: More downsets than this take too long; a graph that has more needs coarser units.
MAX_STATES = 4000


@dataclass(frozen=True, eq=False)
class Lattice:
    """See the module's docstring. `members_VU` says which units a state holds; transitions of state v are
    `first_V[v] : first_V[v + 1]`, each to `next_T` by the stage `distinct_T`, of which `counts_GH`, and bytes that it
    sends on and receives."""

    problem: StageProblem
    members_VU: Array
    first_V: Array
    next_T: Array
    distinct_T: Array
    counts_GH: Array
    out_bytes_G: Array
    in_bytes_G: Array
    out_messages_G: Array
    in_messages_G: Array

    @property
    def num_states(self) -> int:
        """States."""
        return len(self.members_VU)

    def units(self, transition: int) -> tuple[int, ...]:
        """The units of the stage of a transition."""
        state = int(np.searchsorted(self.first_V, transition, side="right")) - 1
        return tuple(np.flatnonzero(self.members_VU[self.next_T[transition]] & ~self.members_VU[state]).tolist())

    def of(self, problem: StageProblem) -> Lattice:
        """The same stages of the problem with other options."""
        return replace(self, problem=problem)


def chain(problem: StageProblem, cuts: Sequence[int] | None = None) -> Lattice:
    """Stages that are contiguous in the order of the units, and begin at `cuts` only where these are given."""
    positions = sorted({0, *(range(problem.num_units) if cuts is None else cuts), problem.num_units})
    members_VU = np.arange(problem.num_units) < np.array(positions)[:, None]
    return _lattice(problem, members_VU)


def downsets(problem: StageProblem, max_states: int = MAX_STATES) -> Lattice:
    """All stages that leave no unit behind a stage that needs it; raises `InputError` where there are too many."""
    needs: list[set[int]] = [set() for _ in range(problem.num_units)]
    for one, other in problem.edges_E.tolist():
        needs[other].add(one)
    found: dict[frozenset[int], None] = {frozenset(): None}
    queue = [frozenset[int]()]
    for held in queue:
        for unit in range(problem.num_units):
            if unit not in held and needs[unit] <= held and (larger := held | {unit}) not in found:
                found[larger] = None
                queue.append(larger)
        if len(found) > max_states:
            rule = (
                f"more than {max_states:,} sets of units could be done first; alpa cuts a chain and has no such limit"
            )
            raise InputError([Problem("method", "piper", rule, "alpa")])
    members_VU = np.zeros((len(queue), problem.num_units), dtype=bool)
    for row, held in enumerate(sorted(queue, key=lambda held: (len(held), sorted(held)))):
        members_VU[row, list(held)] = True
    return _lattice(problem, members_VU)


def _lattice(problem: StageProblem, members_VU: Array) -> Lattice:
    num_kinds = len(problem.forward_HK)
    kinds_UH = np.eye(num_kinds, dtype=np.int64)[problem.kind_U]
    held_VH = members_VU.astype(np.int64) @ kinds_UH
    one, other = problem.edges_E[:, 0], problem.edges_E[:, 1]
    next_: list[Array] = []
    keys: list[Array] = []
    for state, held_U in enumerate(members_VU):
        larger = np.flatnonzero((members_VU >= held_U).all(axis=1) & (members_VU != held_U).any(axis=1))
        inside = members_VU[larger] & ~held_U
        out = inside[:, one] & ~members_VU[larger][:, other]
        into = held_U[one] & inside[:, other]
        sent = [out @ problem.bytes_E, into @ problem.bytes_E, out.sum(axis=1), into.sum(axis=1)]
        next_.append(larger)
        keys.append(np.column_stack([held_VH[larger] - held_VH[state], *sent]))
    rows, index = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
    return Lattice(
        problem=problem,
        members_VU=members_VU,
        first_V=np.concatenate([[0], np.cumsum([len(row) for row in next_])]),
        next_T=np.concatenate(next_),
        distinct_T=index.reshape(-1),
        counts_GH=rows[:, :num_kinds],
        out_bytes_G=rows[:, num_kinds],
        in_bytes_G=rows[:, num_kinds + 1],
        out_messages_G=rows[:, num_kinds + 2],
        in_messages_G=rows[:, num_kinds + 3],
    )


# --- what stages cost ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StageTable:
    """Of each number of stages from here to the end (index 0: the last stage), distinct stage and size of group: the
    least seconds of a turn that fits into memory (infinite: none does), and the option that has them."""

    lattice: Lattice
    schedule: str
    sizes_N: Array
    time_QGN: Array
    option_QGN: Array

    def plan(self, stages: Sequence[tuple[int, int]]) -> StagePlan:
        """The plan of transitions with the index of their size, first stage to last."""
        planned = []
        for index, (transition, size) in enumerate(stages):
            left = len(stages) - 1 - index
            option = int(
                self.option_QGN[min(left, len(self.option_QGN) - 1), self.lattice.distinct_T[transition], size]
            )
            units = self.lattice.units(transition)
            planned.append(PlannedStage(units, (option,) * len(units)))
        return StagePlan(tuple(planned), self.schedule)


#: Seconds of a turn from those of compute (forward and backward), messages and an update, each G x K.
Turn = Callable[[Array, Array, Array], Array]


def turn_of(problem: StageProblem, schedule: str) -> Turn:
    """A turn as `stages.evaluate` has it."""
    if updates_each_microbatch(schedule):
        return lambda compute, message, update: np.maximum(compute + message, update)
    return lambda compute, message, update: compute + message + update / problem.num_microbatches


def stage_table(
    lattice: Lattice, schedule: str = "1F1B", most_stages: int | None = None, turn: Turn | None = None
) -> StageTable:
    """All distinct stages priced under all options, of which the best for each size is kept."""
    problem = lattice.problem
    time_GK, memory = stage_columns(lattice, turn or turn_of(problem, schedule))
    num_stages = most_stages or most_stages_of(lattice)
    held_Q, versions_Q = held_by_stages_left(schedule, num_stages, problem.num_microbatches)
    sizes_N = np.array(problem.sizes, dtype=np.int64)
    own = [np.flatnonzero(problem.devices_K == size) for size in sizes_N]
    shape = (num_stages, len(time_GK), len(sizes_N))
    time_QGN, option_QGN = np.full(shape, np.inf), np.full(shape, -1, dtype=np.int64)
    for q in range(num_stages):
        if q and held_Q[q] == held_Q[q - 1] and versions_Q[q] == versions_Q[q - 1]:
            time_QGN[q], option_QGN[q] = time_QGN[q - 1], option_QGN[q - 1]
            continue
        fits_GK = memory(held_Q[q], versions_Q[q]) <= problem.memory_limit
        allowed_GK = np.where(fits_GK, time_GK, np.inf)
        for n, options in enumerate(own):
            best = allowed_GK[:, options].argmin(axis=1)
            option_QGN[q, :, n] = options[best]
            time_QGN[q, :, n] = allowed_GK[np.arange(len(best)), options[best]]
    return StageTable(lattice, schedule, sizes_N, time_QGN, option_QGN)


def most_stages_of(lattice: Lattice) -> int:
    """Stages that a plan can have: units and devices bound them."""
    problem = lattice.problem
    return max(1, min(problem.num_units, lattice.num_states - 1, problem.num_devices // min(problem.sizes)))


def held_by_stages_left(schedule: str, num_stages: int, num_microbatches: int) -> tuple[Array, Array]:
    """Microbatches in flight on a stage, and versions of its weights, by the number of stages from it to the end."""
    ranks = np.arange(num_stages)[::-1]
    held = peak_in_flight(schedule, num_stages, 1, num_microbatches, ranks)
    return np.asarray(held), np.asarray(weight_versions(schedule, num_stages, 1, num_microbatches, ranks))


def stage_columns(lattice: Lattice, turn: Turn) -> tuple[Array, Callable[[Any, Any], Array]]:
    """Seconds of a turn of each distinct stage under each option, and its memory as a function of the microbatches in
    flight and the versions of the weights."""
    problem, counts_GH = lattice.problem, lattice.counts_GH

    def summed(values_HK: Array) -> Array:
        # Zero times infinity would be no number; what is forbidden is said below.
        return np.asarray(counts_GH @ np.where(np.isfinite(values_HK), values_HK, 0.0))

    held_GH = counts_GH > 0
    forbidden_GK = held_GH.astype(np.int64) @ ~np.isfinite(problem.forward_HK) > 0
    messages = lattice.out_messages_G + lattice.in_messages_G
    sent = lattice.out_bytes_G + lattice.in_bytes_G
    message_GK = messages[:, None] * problem.latency_K + sent[:, None] * problem.seconds_per_byte_K
    compute_GK = summed(problem.forward_HK) + summed(problem.backward_HK)
    # Within a stage all units have one option, so that nothing changes its layout on the way.
    time_GK = np.where(forbidden_GK, np.inf, turn(compute_GK, message_GK, summed(problem.update_HK)))
    state_GK, weights_GK, kept_GK = (
        summed(values) for values in (problem.state_HK, problem.weights_HK, problem.kept_HK)
    )
    working_GK = np.stack([np.where(held_GH, column, 0.0).max(axis=1) for column in problem.working_HK.T], axis=1)

    def memory(in_flight: Any, versions: Any) -> Array:
        return np.asarray(state_GK + (versions - 1) * weights_GK + in_flight * kept_GK + working_GK)

    return time_GK, memory
