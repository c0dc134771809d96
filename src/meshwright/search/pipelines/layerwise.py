"""Layer-wise: contiguous stages, and inside each an option for every layer of its own, under memory (Galvatron).

X. Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism", VLDB 2023,
arXiv:2211.13878, section 4. For each number of stages a dynamic program over layers and memory chooses each layer's
parallelism, with the cost of going from one to another; Galvatron-BMW (2307.02031) adds recomputation and stages of
unequal numbers of layers. Minimises the time of a step.

What we changed. Exact, with a proof: memory is not cut into megabytes, stages may lie on unequal groups, and the sum of
turns plus m - 1 times the longest is minimised over all of that. First every stage that could stand anywhere gets a
lower bound, Lagrange's: the least of seconds + lambda (bytes - limit) over layer-wise choices is at most the least of
the seconds that fit. `dynamic.least_pipeline_time` makes the best plan of these bounds; the stages of that plan are
then solved exactly and their bounds replaced, until a plan has only exact stages: no other plan can be better.

A stage is solved by labels (seconds, bytes) from its first layer to its last (J. E. Beasley, N. Christofides, "An
algorithm for the resource constrained shortest path problem", Networks 1989): a label that another beats in both is
dropped, and so is one whose seconds with Lagrange's bound on what is left come to no less than the best plan known.
Equal layers make most labels equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.search.choose.solver import Deadline
from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.dynamic import least_pipeline_time
from meshwright.search.pipelines.lattice import (
    StageTable,
    chain,
    held_by_stages_left,
    most_stages_of,
)
from meshwright.search.stages import Array, PlannedStage, StagePlan, StageProblem

#: Values of lambda for the bounds of all stages, as powers of two around the ratio of seconds to bytes; and 0.
POWERS = np.arange(-10.0, 11.0)

#: Seconds or bytes that differ by less than this share are the same.
TOLERANCE = 1e-12


def layerwise(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan with the least step time over all layer-wise choices; raises `InputError` where units are no chain."""
    _check_chain(problem)
    search = _Search(problem)
    best, chosen, sweeps = math.inf, None, 0
    while True:
        found = least_pipeline_time(search.table, problem.num_devices, problem.num_microbatches, asked.deadline)
        sweeps += found.num_sweeps
        if not math.isfinite(found.objective):
            break
        if problem.step_seconds(found.lower_bound) >= asked.known_s:
            bound_s = problem.step_seconds(found.lower_bound)
            return StageAnswer(None, math.inf, bound_s, "none is better than what is known", sweeps, bounds_step=True)
        before = search.num_solved
        solved = search.solve(found.stages, asked.deadline)
        plan = [stage for stage in solved if stage is not None]
        if len(plan) == len(solved):
            turns = [stage.seconds for stage in plan]
            value = sum(turns) + (problem.num_microbatches - 1) * max(turns)
            if value < best:
                best, chosen = value, search.plan(found.stages, plan)
        # Where no bound of this plan rises any more there is nothing left to learn.
        if best <= found.lower_bound * (1 + 1e-11) or search.num_solved == before or asked.deadline.passed:
            break
    if chosen is None:
        infeasible = not math.isfinite(found.objective)
        says = NO_PLAN if infeasible else "no plan in time"
        bound_s = problem.step_seconds(found.lower_bound)
        return StageAnswer(None, math.inf, bound_s, says, sweeps, bounds_step=True)
    bound = min(found.lower_bound, best)
    says = "no layer-wise assignment on contiguous stages has a shorter step"
    if bound < best * (1 - 1e-11):
        says = "stopped early, with a bound"
    else:
        bound = best
    step_s, bound_s = problem.step_seconds(best), problem.step_seconds(bound)
    return StageAnswer(chosen, step_s, bound_s, f"{says} ({search.num_solved} stages solved)", sweeps, bounds_step=True)


def _check_chain(problem: StageProblem) -> None:
    wrong = [(one, other) for one, other in problem.edges_E.tolist() if other != one + 1]
    if wrong:
        pairs = ", ".join(f"{problem.units[one]} to {problem.units[other]}" for one, other in wrong[:3])
        raise InputError([Problem("method", "layerwise", f"needs a chain of units; these are none: {pairs}", "alpa")])


@dataclass(frozen=True, eq=False)
class _Solved:
    """A stage: seconds of a turn, a bound of these (the same where it is at its best), and the option of each unit."""

    seconds: float
    bound: float
    options: tuple[int, ...]


class _Search:
    """Bounds of all stages, made exact as they are asked for.

    Legend: C classes of options (equal layout and messages), L values of lambda, X nodes of the tree of stages: those
    that begin alike share what they have in common.
    """

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        m = problem.num_microbatches
        self.time_HK = problem.forward_HK + problem.backward_HK + problem.update_HK / m
        self.bytes_U = np.zeros(problem.num_units + 1)  # handed to each unit by the one before
        self.bytes_U[problem.edges_E[:, 1]] = problem.bytes_E
        self.is_edge_U = np.zeros(problem.num_units + 1, dtype=bool)
        self.is_edge_U[problem.edges_E[:, 1]] = True
        lattice = chain(problem)
        most = most_stages_of(lattice)
        self.held_Q, _ = held_by_stages_left("1F1B", most, m)
        self.sizes_N = np.array(problem.sizes, dtype=np.int64)
        self.own = [np.flatnonzero(problem.devices_K == size) for size in self.sizes_N]
        self.menus = [_Menu(problem, self.time_HK, own) for own in self.own]
        node_T, ends = self._tree(lattice)
        self.ends = ends
        times = np.full((most, len(ends), len(self.sizes_N)), np.inf)
        distinct = np.unique(self.held_Q)
        for n, menu in enumerate(self.menus):
            if menu.num_options:
                times[:, :, n] = self._bounds(menu, distinct)[np.searchsorted(distinct, self.held_Q)]
        lattice = replace(lattice, distinct_T=node_T)
        self.table = StageTable(lattice, "1F1B", self.sizes_N, times, np.zeros(times.shape, dtype=np.int64))
        self.known: dict[tuple[int, int, int], _Solved | None] = {}

    @property
    def num_solved(self) -> int:
        """Stages solved exactly."""
        return len(self.known)

    def _tree(self, lattice: Any) -> tuple[Array, list[tuple[int, int]]]:
        """The distinct stage of each transition, and of each distinct stage its first and last unit.

        A stage is a path of kinds and hand-overs: nodes of a tree, and each with the bytes that it sends on."""
        nodes: dict[tuple[Any, ...], int] = {}
        stages: dict[tuple[int, float, bool], int] = {}
        self.node_parents: list[int] = []
        self.node_units: list[int] = []
        self.node_of_stage: list[int] = []
        ends: list[tuple[int, int]] = []
        found = []
        total = self.problem.num_units
        for start in range(total):
            node = -1
            for unit in range(start, total):
                key = (node, int(self.problem.kind_U[unit]), float(self.bytes_U[unit]), bool(self.is_edge_U[unit]))
                if key not in nodes:
                    nodes[key] = len(nodes)
                    self.node_parents.append(node)
                    self.node_units.append(unit)
                node = nodes[key]
                stage = (node, float(self.bytes_U[unit + 1]), bool(self.is_edge_U[unit + 1]))
                if stage not in stages:
                    stages[stage] = len(stages)
                    ends.append((start, unit + 1))
                    self.node_of_stage.append(node)
                found.append(stages[stage])
        return np.array(found), ends

    def _bounds(self, menu: _Menu, held_Q: Array) -> Array:
        """Lagrange's bound of every distinct stage, by microbatches in flight: Q x G."""
        problem, limit = self.problem, self.problem.memory_limit
        spread_s, spread_b = np.ptp(menu.time_HK[np.isfinite(menu.time_HK)]), np.ptp(menu.state_HK)
        scale = (spread_s or 1e-6) / (spread_b + np.ptp(menu.kept_HK) or 1.0)
        lambda_L = np.concatenate([[0.0], scale * 2.0**POWERS])
        bytes_QHK = menu.state_HK + held_Q[:, None, None] * menu.kept_HK
        priced = menu.time_HK + lambda_L[:, None, None] * bytes_QHK[:, None]  # Q x L x H x K
        best_QLHC = np.stack([priced[..., own].min(axis=-1) for own in menu.classes], axis=-1)
        values = np.empty((len(self.node_parents), *best_QLHC.shape[:2], len(menu.classes)))
        for node, (parent, unit) in enumerate(zip(self.node_parents, self.node_units, strict=True)):
            own = best_QLHC[:, :, problem.kind_U[unit]]
            if parent < 0:
                received = self.bytes_U[unit] * menu.byte_C + menu.latency_C if self.is_edge_U[unit] else 0.0
                values[node] = own + received
            else:
                switch_CC = self.bytes_U[unit] * menu.switch_CC
                values[node] = own + (values[parent][..., :, None] + switch_CC).min(axis=-2)
        work_H = menu.working_HK.min(axis=1)
        found = np.empty((len(held_Q), len(self.ends)))
        for stage, (node, (start, stop)) in enumerate(zip(self.node_of_stage, self.ends, strict=True)):
            sent = self.bytes_U[stop] * menu.byte_C + menu.latency_C if self.is_edge_U[stop] else 0.0
            room = limit - work_H[problem.kind_U[start:stop]].max()
            least_QL = (values[node] + sent).min(axis=-1) - lambda_L * room
            found[:, stage] = np.inf if room < 0 else least_QL.max(axis=-1)
        return found

    def solve(self, stages: Sequence[tuple[int, int]], deadline: Deadline) -> list[_Solved | None]:
        """The stages of a plan at their best, None where none fits; the table learns what was found."""
        solved = []
        for index, (transition, size) in enumerate(stages):
            left = len(stages) - 1 - index
            stage, held = int(self.table.lattice.distinct_T[transition]), int(self.held_Q[left])
            key = (stage, held, size)
            if key not in self.known:
                found = self.known[key] = self._solved(self.ends[stage], held, size, deadline)
                same = self.held_Q == held
                known_s = self.table.time_QGN[same, stage, size]
                self.table.time_QGN[same, stage, size] = np.maximum(known_s, found.bound) if found else np.inf
            solved.append(self.known[key])
        return solved

    def _solved(self, ends: tuple[int, int], held: int, size: int, deadline: Deadline) -> _Solved | None:
        menu, problem = self.menus[size], self.problem
        start, stop = ends
        kinds = problem.kind_U[start:stop]
        time_IK = menu.time_HK[kinds].copy()
        for unit, row in ((start, 0), (stop, -1)):
            if self.is_edge_U[unit]:
                time_IK[row] += menu.latency_K + self.bytes_U[unit] * menu.byte_K
        chosen = _cheapest_path(
            time_IK,
            (menu.state_HK + held * menu.kept_HK)[kinds],
            menu.working_HK[kinds],
            menu.class_K,
            self.bytes_U[start + 1 : stop, None, None] * menu.switch_CC,
            problem.memory_limit,
            deadline,
        )
        if chosen is None:
            return None
        (seconds, options_I), bound = chosen
        return _Solved(seconds, bound, tuple(int(k) for k in menu.options[options_I]))

    def plan(self, stages: Sequence[tuple[int, int]], solved: Sequence[_Solved]) -> StagePlan:
        """The plan of solved stages."""
        units = [self.table.lattice.units(transition) for transition, _ in stages]
        return StagePlan(
            tuple(PlannedStage(own, each.options) for own, each in zip(units, solved, strict=True)), "1F1B"
        )


class _Menu:
    """The options of one size of group, and their classes: those of a class differ in nothing but their own price."""

    def __init__(self, problem: StageProblem, time_HK: Array, own: Array) -> None:
        rows = np.column_stack([problem.layout_K[own], problem.latency_K[own], problem.seconds_per_byte_K[own]])
        _, class_K = np.unique(rows, axis=0, return_inverse=True)
        class_K = class_K.reshape(-1)
        kept = _undominated(problem, time_HK, own, class_K)
        self.options, self.class_K = own[kept], class_K[kept]
        self.num_options = len(kept)
        self.time_HK, self.state_HK = time_HK[:, self.options], problem.state_HK[:, self.options]
        self.kept_HK, self.working_HK = problem.kept_HK[:, self.options], problem.working_HK[:, self.options]
        self.latency_K, self.byte_K = problem.latency_K[self.options], problem.seconds_per_byte_K[self.options]
        self.classes = [np.flatnonzero(self.class_K == c) for c in range(int(class_K.max(initial=-1)) + 1)]
        first = [int(self.options[members[0]]) for members in self.classes]
        self.latency_C, self.byte_C = problem.latency_K[first], problem.seconds_per_byte_K[first]
        layout = problem.layout_K[first]
        self.switch_CC = problem.switch_AB[np.ix_(layout, layout)]


def _undominated(problem: StageProblem, time_HK: Array, own: Array, class_K: Array) -> Array:
    """Options that no other of their class is at least as good as in everything, for every kind of unit."""
    columns = np.concatenate(
        [time_HK[:, own], problem.state_HK[:, own], problem.kept_HK[:, own], problem.working_HK[:, own]]
    )
    kept: list[int] = []
    for k in range(len(own)):
        column = columns[:, k]
        beaten = any(
            class_K[other] == class_K[k]
            and np.all(columns[:, other] <= column)
            and (np.any(columns[:, other] < column) or other < k)
            for other in range(len(own))
            if other != k
        )
        if not beaten and np.isfinite(time_HK[:, own[k]]).any():
            kept.append(k)
    return np.array(kept, dtype=np.int64)


# --- one stage exactly ------------------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _to_go(priced_IK, class_K, switch_JCC, num_classes):  # type: ignore[no-untyped-def]
    """The least price of the units behind each one, by the class that it has; and the cheapest path."""
    num_units, num_options = priced_IK.shape
    to_go = np.zeros((num_units, num_classes))
    following = np.zeros((num_units, num_classes), dtype=np.int64)
    for i in range(num_units - 2, -1, -1):
        for c in range(num_classes):
            least = np.inf
            for k in range(num_options):
                value = switch_JCC[i, c, class_K[k]] + priced_IK[i + 1, k] + to_go[i + 1, class_K[k]]
                if value < least:
                    least = value
                    following[i, c] = k
            to_go[i, c] = least
    path = np.zeros(num_units, dtype=np.int64)
    least = np.inf
    for k in range(num_options):
        value = priced_IK[0, k] + to_go[0, class_K[k]]
        if value < least:
            least = value
            path[0] = k
    for i in range(num_units - 1):
        path[i + 1] = following[i, class_K[path[i]]]
    return to_go, path, least


@dataclass(frozen=True, eq=False)
class _Stage:
    """A stage to be solved: I units, K options in C classes; room for the bytes of all units together."""

    time_IK: Array
    bytes_IK: Array
    class_K: Array
    switch_JCC: Array
    room: float

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.switch_JCC[0]) if len(self.switch_JCC) else int(self.class_K.max()) + 1

    def seconds(self, path: Array) -> float:
        """Seconds of a choice for each unit."""
        rows, classes = np.arange(len(path)), self.class_K[path]
        return float(self.time_IK[rows, path].sum() + self.switch_JCC[rows[:-1], classes[:-1], classes[1:]].sum())

    def bytes(self, path: Array) -> float:
        """Bytes of a choice for each unit."""
        return float(self.bytes_IK[np.arange(len(path)), path].sum())

    def at(self, multiplier: float) -> tuple[Array, Array, float]:
        """The least of seconds + multiplier x bytes: to go behind each unit, the path, and the least."""
        to_go, path, least = _to_go(
            self.time_IK + multiplier * self.bytes_IK, self.class_K, self.switch_JCC, self.num_classes
        )
        return to_go, path, float(least)


#: Seconds and the options of a stage.
_Path = tuple[float, Array]


def _cheapest_path(
    time_IK: Array,
    bytes_IK: Array,
    working_IK: Array,
    class_K: Array,
    switch_JCC: Array,
    limit: float,
    deadline: Deadline,
) -> tuple[_Path, float] | None:
    """The least seconds of a stage whose bytes, and largest working set, fit, the option of each unit; and a bound, the
    same but where time ran out.

    The working set is a largest, not a sum: for each size that it may have, what has a larger one is left out."""
    switch_JCC = np.ascontiguousarray(switch_JCC)
    free = _Stage(time_IK, bytes_IK, class_K, switch_JCC, limit)
    _, path, least = free.at(0.0)
    if not math.isfinite(least):
        return None
    if free.bytes(path) + working_IK[np.arange(len(path)), path].max() <= limit:
        return (free.seconds(path), path), free.seconds(path)
    levels = np.unique(working_IK[np.isfinite(time_IK)])
    levels = levels[(levels >= working_IK.min(axis=1).max()) & (levels <= limit)]
    relaxed = []
    for level in levels.tolist():
        kept_IK = np.where(working_IK <= level, time_IK, np.inf)
        stage = _Stage(kept_IK, bytes_IK, class_K, switch_JCC, limit - level)
        if (dual := _dual(stage)) is not None:
            relaxed.append((dual, stage))
    relaxed.sort(key=lambda each: each[0].bound)
    best: _Path | None = None
    for dual, stage in relaxed:
        if best is None or dual.bound < best[0]:
            paths = [dual.best, *(_improved(stage, path) for path in _crossed(stage, dual.best[1], dual.dear))]
            best = min([*paths, *([best] if best else [])], key=lambda each: each[0])
    unfinished = math.inf
    for dual, stage in relaxed:
        if best is None or dual.bound < best[0] * (1 - TOLERANCE):
            best, is_done = _labelled(stage, dual, best, deadline)
            unfinished = unfinished if is_done else min(unfinished, dual.bound)
    return None if best is None else (best, min(best[0], unfinished))


@dataclass(frozen=True, eq=False)
class _Dual:
    """Lagrange's bound of a stage, multipliers near the best with what is to go under them, the fewest bytes to go, the
    best path met that fits, and the last that does not."""

    bound: float
    multipliers: tuple[tuple[float, Array], ...]
    least_bytes: Array
    best: _Path
    dear: Array


def _dual(stage: _Stage) -> _Dual | None:
    """Bisection of the multiplier: its best is where the bytes of the cheapest path pass the room. None where nothing
    fits."""
    finite = np.isfinite(stage.time_IK)
    smallest = replace(
        stage,
        time_IK=np.where(finite, stage.bytes_IK, np.inf),
        switch_JCC=np.where(np.isfinite(stage.switch_JCC), 0.0, np.inf),
    )
    least_bytes, path, least = smallest.at(0.0)
    if least > stage.room:
        return None
    best = stage.seconds(path), path
    seen: list[tuple[float, float, Array]] = []
    dear = path  # the last path that did not fit

    def fits(multiplier: float) -> bool:
        nonlocal best, dear
        to_go, path, value = stage.at(multiplier)
        seen.append((value - multiplier * stage.room, multiplier, to_go))
        if stage.bytes(path) > stage.room:
            dear = path
            return False
        if stage.seconds(path) < best[0]:
            best = stage.seconds(path), path
        return True

    low, high = 0.0, best[0] / max(stage.room, 1.0)
    if not fits(0.0):
        while not fits(high) and high < 1e30:
            low, high = high, 4 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
            if high - low < 1e-6 * high:
                break
    seen.sort(key=lambda each: -each[0])
    kept = tuple((multiplier, to_go) for _, multiplier, to_go in seen[:NUM_MULTIPLIERS])
    return _Dual(seen[0][0], kept, least_bytes, best, dear)


#: Labels of one unit that take a second or so.
MOST_LABELS = 4_000_000

#: Multipliers that labels are bounded with.
NUM_MULTIPLIERS = 4


def _crossed(stage: _Stage, one: Array, other: Array) -> Iterator[Array]:
    """The best path that begins as one does and goes on as the other, and the other way round, of those that fit."""
    for begins, goes_on in ((one, other), (other, one)):
        paths = (np.concatenate([begins[:cut], goes_on[cut:]]) for cut in range(len(one) + 1))
        fitting = [path for path in paths if stage.bytes(path) <= stage.room]
        if fitting:
            yield min(fitting, key=stage.seconds)


def _improved(stage: _Stage, path: Array) -> _Path:
    """A path that fits, with single units changed while that saves seconds and fits."""
    path = path.copy()
    last, rows = len(path) - 1, np.arange(len(path))
    class_K = stage.class_K
    while True:
        classes = class_K[path]
        cost_IK = stage.time_IK.copy()
        if last:
            cost_IK[1:] += stage.switch_JCC[rows[:-1], classes[:-1]][:, class_K]
            cost_IK[:-1] += stage.switch_JCC[rows[:-1], :, classes[1:]][:, class_K]
        saved_IK = cost_IK[rows, path][:, None] - cost_IK
        more_IK = stage.bytes_IK - stage.bytes_IK[rows, path][:, None]
        saved_IK[more_IK > stage.room - stage.bytes(path)] = 0.0
        unit, option = np.unravel_index(int(saved_IK.argmax()), saved_IK.shape)
        if not saved_IK[unit, option] > TOLERANCE * cost_IK[unit, path[unit]]:
            return stage.seconds(path), path
        path[unit] = option


def _labelled(stage: _Stage, dual: _Dual, best: _Path | None, deadline: Deadline) -> tuple[_Path | None, bool]:
    """Labels from the first unit to the last; `best` is what is known to fit. And whether that was done to the end: not
    where time runs out, or labels become too many."""
    known_s = best[0] if best else math.inf
    class_K, every = stage.class_K, np.arange(len(stage.class_K))
    seconds, used, option = stage.time_IK[0], stage.bytes_IK[0], every
    parent = np.zeros(len(every), dtype=np.int64)
    trail: list[tuple[Array, Array]] = []
    for i in range(len(stage.time_IK)):
        if len(seconds) * len(every) > MOST_LABELS or (i and deadline.passed):
            return best, False
        if i:
            entered = stage.switch_JCC[i - 1][class_K[trail[-1][1]]][:, class_K]
            parent, option = np.repeat(np.arange(len(seconds)), len(every)), np.tile(every, len(seconds))
            seconds = (seconds[:, None] + entered + stage.time_IK[i]).ravel()
            used = (used[:, None] + stage.bytes_IK[i]).ravel()
        own = class_K[option]
        alive = np.isfinite(seconds) & (used + dual.least_bytes[i, own] <= stage.room * (1 + TOLERANCE))
        for multiplier, to_go in dual.multipliers:
            alive &= seconds + to_go[i, own] - multiplier * (stage.room - used) < known_s * (1 - TOLERANCE)
        kept = np.flatnonzero(alive)
        kept = kept[_front(seconds[kept], used[kept], own[kept])]
        if not len(kept):
            return best, True
        seconds, used = seconds[kept], used[kept]
        trail.append((parent[kept], option[kept]))
    index = int(np.where(used <= stage.room, seconds, np.inf).argmin())
    if used[index] > stage.room or seconds[index] >= known_s:
        return best, True
    value, path = float(seconds[index]), []
    for parents, options in reversed(trail):
        path.append(int(options[index]))
        index = int(parents[index])
    return (value, np.array(path[::-1])), True


def _front(seconds: Array, used: Array, own: Array) -> Array:
    """Labels that no other of the same class is at least as good as, up to rounding."""
    order = np.lexsort([used, seconds, own])
    found: list[Array] = []
    for group in np.split(order, np.flatnonzero(np.diff(own[order]) != 0) + 1):
        least = np.minimum.accumulate(used[group])
        better = np.ones(len(group), dtype=bool)
        better[1:] = used[group][1:] < least[:-1] * (1 - TOLERANCE)
        found.append(group[better])
    return np.concatenate(found)
