"""All best compromises between cost and memory: the exact Pareto front, by elimination of sets of points.

TensorOpt's frontier tracking (Cai et al. 2020, arXiv 2004.10856): where elimination keeps one cost, keep
each (cost, usage) that no other beats in both; adding two tables adds every point of one to every of the other, and the
minimum over a node's strategies is what is not beaten in their union. TensorOpt eliminates nodes and edges of graphs
that become a chain; here any order of `elimination` serves.

Usage is one number for each strategy, all held at once (parameters and optimizer states, say, or a peak's upper bound).
Sets of points can grow without end; `max_points` thins them, and then `error` says what that may have cost.

Legend: P points of a table, cell by cell; X cells of a table; J joint cells, before the minimum is taken, of which
those of one result cell differ in the eliminated node's strategy alone; F points of the front; N nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from meshwright.choice import Array, Instance, cost_of
from meshwright.errors import InputError, Problem
from meshwright.search.choose.elimination import Plan, Step, plan_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import ROUNDING, places_of_usages

#: Points that are made at once at most (unfiltered): 2^24 take about 1.5 GB.
MOST_POINTS = 2**24

BLOCK_POINTS = 2**20  # are made at once where a table's cells can be done in parts

#: Larger sets of points are sieved before they are sorted, by compromises that weigh usage against cost like this.
SIEVE_FROM, SIEVES = 20_000, (1.0, 0.2, 5.0)

MOST_ENTRIES = 2**22  # of tables: each entry is a set here


@dataclass(frozen=True, eq=False)
class Front:
    """Points by rising cost and falling usage, and a choice that attains each.

    For each choice there is a point that uses no more and costs no more, or at most `error` more (of thinned sets).
    """

    cost_F: Array
    usage_F: Array
    choices_FN: Array
    error: float

    def __len__(self) -> int:
        return len(self.cost_F)

    def __iter__(self) -> Iterator[tuple[float, float, Array]]:
        yield from zip(self.cost_F.tolist(), self.usage_F.tolist(), self.choices_FN, strict=True)


class TooManyPoints(Exception):
    """The sets of points, or the tables of them, grow too large; the message says where and what to do."""


@dataclass(frozen=True, eq=False)
class _Sets:
    """A set of points in each cell of a table, and where they came from: for each table of sets that was added the
    point of it, and the cell of the joint table (which holds the strategy of the node that was eliminated)."""

    first_X: Array
    cost_P: Array
    usage_P: Array
    joint_P: Array
    sources: dict[int, Array]


def pareto_front(instance: Instance, *, max_points: int | None = None, deadline: Deadline | None = None) -> Front:
    """Every compromise between cost and usage within the limit, at most about `max_points` in each set where given.

    Raises `InputError` where usages are not all held at one time, `TooManyPoints` where there are too many, and
    `TimeoutError` at the deadline.

    >>> from meshwright.choice import Usage, instance_of
    >>> pair = instance_of([[0, 3], [0, 5]], [(0, 1, [[0, 9], [0, 0]])], [Usage(n, 0, 1, [4, 1]) for n in (0, 1)])
    >>> [(cost, usage, choice.tolist()) for cost, usage, choice in pareto_front(pair)]
    [(0.0, 8.0, [0, 0]), (3.0, 5.0, [1, 0]), (8.0, 2.0, [1, 1])]
    """
    if max_points is not None and max_points < 2:
        raise InputError([Problem("max_points", str(max_points), "must be at least 2", "2")])
    usage_C = _usage(instance)
    if usage_C is None:
        rule = "must all share a time: the front is for usage that is held at once"
        raise InputError([Problem(f"intervals of {instance.name or 'the instance'}", "", rule)])
    plan = plan_of(instance, most_entries=MOST_ENTRIES)
    if plan is None:
        raise TooManyPoints(f"a table of elimination would have more than {MOST_ENTRIES:,} sets of points")
    return _Tracking(plan, usage_C, max_points, deadline or Deadline()).front()


def _usage(instance: Instance) -> Array | None:
    """What each strategy of all nodes uses, or None where usages are not all held at one time."""
    starts_U, stops_U = instance.intervals_U[:, 0], instance.intervals_U[:, 1]
    lasting_U = starts_U < stops_U
    if lasting_U.any() and starts_U[lasting_U].max() >= stops_U[lasting_U].min():
        return None
    lasting_V = np.repeat(lasting_U, np.diff(instance.usage_first_U))
    usage_V = np.where(lasting_V, instance.usage_V, 0.0)
    return np.bincount(places_of_usages(instance), usage_V, minlength=len(instance.cost_C))


class _Tracking:
    """One pass of elimination: `sets` are the tables of its plan, with one point in each cell before the first step;
    usage is counted beyond each node's least (`least`), so that the limit cuts early."""

    def __init__(self, plan: Plan, usage_C: Array, max_points: int | None, deadline: Deadline) -> None:
        instance = plan.instance
        allowed_C = np.where(np.isfinite(instance.cost_C), usage_C, math.inf)
        least_N = np.minimum.reduceat(allowed_C, instance.first_N[:-1])
        least_N = np.where(np.isfinite(least_N), least_N, 0.0)
        beyond_C = usage_C - np.repeat(least_N, instance.num_strategies_N)
        first = instance.first_N.tolist()
        self.plan, self.max_points, self.deadline = plan, max_points, deadline
        self.least, self.error = float(least_N.sum()), 0.0
        self.most = instance.limit * (1 + ROUNDING) - self.least
        self.sets = [_single(instance.cost_C[a:b], beyond_C[a:b]) for a, b in itertools.pairwise(first)]
        self.sets += [_single(matrix.ravel(), np.zeros(matrix.size)) for matrix in plan.matrices]

    def front(self) -> Front:
        """The front."""
        for step in self.plan.steps:
            self.sets.append(self._eliminated(step))
        last = self._eliminated(replace(self.plan.last, views=tuple((1, *v) for v in self.plan.last.views)))
        return Front(last.cost_P, last.usage_P + self.least, self._choices(last), self.error)

    def _eliminated(self, step: Step) -> _Sets:
        """The set of each cell of a step's result: its tables added one by one, the smallest first."""
        sets, shape = _single(np.zeros(1), np.zeros(1)), (1,) * (1 + len(step.shape))
        # Tables of one point each go first among equals: they make no new points.
        order = sorted(range(len(step.tables)), key=lambda i: (math.prod(step.views[i]), step.tables[i]))
        for i in order:
            table, view, is_last = step.tables[i], step.views[i], i == order[-1]
            sets, shape = self._added(sets, shape, table, view, num_cells=math.prod(step.shape) if is_last else None)
        return sets

    def _added(
        self, sets: _Sets, shape: tuple[int, ...], table: int, view: tuple[int, ...], *, num_cells: int | None
    ) -> tuple[_Sets, tuple[int, ...]]:
        """Add the sets of a table, seen as `view`, to those of another, and keep what is not beaten in its joint cell,
        or, where `num_cells` are given, in its cell of the result."""
        joint = tuple(max(lengths) for lengths in zip(shape, view, strict=True))
        ours_J, theirs_J = _cells(shape, joint), _cells(view, joint)
        joint_J = np.arange(len(ours_J))
        if num_cells is not None:  # the joint cells of one result cell side by side
            joint_J = joint_J.reshape(-1, num_cells).T.ravel()
            ours_J, theirs_J = ours_J[joint_J], theirs_J[joint_J]
        group_J = joint_J if num_cells is None else joint_J % num_cells
        added = self.sets[table]
        number_J = np.diff(sets.first_X)[ours_J] * np.diff(added.first_X)[theirs_J]
        # One point added to each of a set leaves it a set of unbeaten points.
        is_plain = num_cells is None and int(np.diff(added.first_X).max(initial=0)) <= 1
        parts, errors = [], [0.0]
        for start, stop in _blocks(number_J, group_J):
            if self.deadline.passed:
                raise TimeoutError("the front was not complete at the deadline")
            part = slice(start, stop)
            ours_P, theirs_P, of_P = _pairs(sets, added, ours_J[part], theirs_J[part], number_J[part])
            cost_P = sets.cost_P[ours_P] + added.cost_P[theirs_P]
            usage_P = sets.usage_P[ours_P] + added.usage_P[theirs_P]
            kept = np.flatnonzero(usage_P <= self.most)
            group_P = group_J[part][of_P]
            if not is_plain:
                kept = kept[_unbeaten(group_P[kept], cost_P[kept], usage_P[kept])]
            if self.max_points is not None and not is_plain:
                mask, error = _thinned(group_P[kept], cost_P[kept], self.max_points)
                kept = kept[mask]
                errors.append(error)
            joint_P = joint_J[part][of_P[kept]]
            parts.append((group_P[kept], cost_P[kept], usage_P[kept], joint_P, ours_P[kept], theirs_P[kept]))
        self.error += max(errors)  # a choice has one point in each table, so the errors of tables add up
        group_P, cost_P, usage_P, joint_P, ours_P, theirs_P = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        first_X = np.searchsorted(group_P, np.arange((len(group_J) if num_cells is None else num_cells) + 1))
        sources = {source: points[ours_P] for source, points in sets.sources.items()}
        return _Sets(first_X, cost_P, usage_P, joint_P, sources | {table: theirs_P}), joint

    def _choices(self, last: _Sets) -> Array:
        """The choice of each point of the last table."""
        choices_FN = np.zeros((len(last.cost_P), self.plan.instance.num_nodes), dtype=np.int64)
        point_F = dict(last.sources)  # of each table the point that was taken, for each point of the front
        for step in reversed(self.plan.steps):
            sets, of_F = self.sets[step.result], point_F[step.result]
            choices_FN[:, step.node] = sets.joint_P[of_F] // math.prod(step.shape)
            point_F |= {source: points[of_F] for source, points in sets.sources.items()}
        return choices_FN


def _single(costs: Array, usages: Array) -> _Sets:
    """Sets of one point each, of none where the cost is infinite."""
    finite = np.isfinite(costs)
    first_X = np.concatenate([[0], np.cumsum(finite)])
    return _Sets(first_X, costs[finite], usages[finite], np.flatnonzero(finite), {})


def _cells(shape: tuple[int, ...], joint: tuple[int, ...]) -> Array:
    """For each cell of a joint table the cell of a table of this shape, which is 1 along dims that it lacks."""
    return np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), joint).ravel()


def _pairs(sets: _Sets, added: _Sets, ours_J: Array, theirs_J: Array, number_J: Array) -> tuple[Array, Array, Array]:
    """Every pair of points of two sets, for each joint cell: the one, the other, and the cell's place."""
    of_P = np.repeat(np.arange(len(number_J)), number_J)
    place_P = np.arange(len(of_P)) - (np.cumsum(number_J) - number_J)[of_P]
    width_P = np.diff(added.first_X)[theirs_J][of_P]
    return sets.first_X[ours_J][of_P] + place_P // width_P, added.first_X[theirs_J][of_P] + place_P % width_P, of_P


def _blocks(number_J: Array, group_J: Array) -> Iterator[tuple[int, int]]:
    """Ranges of joint cells with about `BLOCK_POINTS` pairs of points in each, that cut no group."""
    starts = np.flatnonzero(np.concatenate([[True], np.diff(group_J) != 0]))
    before = np.concatenate([[0], np.cumsum(number_J)])
    largest = int(np.diff(before[[*starts, len(group_J)]]).max())
    if largest > MOST_POINTS:
        raise TooManyPoints(f"a set would be chosen from {largest:,} points: give max_points, or a lower limit")
    block = before[starts] // BLOCK_POINTS
    cuts = starts[np.flatnonzero(np.diff(block)) + 1].tolist()
    yield from itertools.pairwise([0, *cuts, len(group_J)])


def _unbeaten(cell_P: Array, cost_P: Array, usage_P: Array) -> Array:
    """Indices of the points that no other of the same cell beats in both, by cell and then by cost; of equal ones the
    first. Points come cell by cell."""
    index = np.arange(len(cell_P))
    if len(cell_P) > SIEVE_FROM:
        for weight in SIEVES:
            index = index[_sieved(cell_P[index], cost_P[index], usage_P[index], weight)]
    cost_P, usage_P = cost_P[index], usage_P[index]
    # Cells are numbered from 0 in 16 bits where possible, which NumPy sorts in no time.
    cell_P = np.cumsum(np.diff(cell_P[index], prepend=cell_P[:1]) != 0)
    order = np.argsort(cost_P, kind="stable")
    number = int(cell_P[-1]) + 1 if len(cell_P) else 0
    order = order[np.argsort(cell_P[order].astype(np.uint16 if number <= 2**16 else np.int64), kind="stable")]
    # Going through a cell by rising cost, a point stays where it uses less than all before. Usages become ranks (of
    # equal ones the first is the lowest), each cell's below those of the cell before: one running minimum serves all.
    rank_P = np.empty(len(order), dtype=np.int64)
    rank_P[np.argsort(usage_P[order], kind="stable")] = np.arange(len(order))
    rank_P -= cell_P[order] * len(order)
    lowest_P = np.minimum.accumulate(rank_P)
    kept: Array = order[rank_P == lowest_P]
    # Of equal costs the last one kept uses least.
    last = np.ones(len(kept), dtype=bool)
    last[:-1] = (np.diff(cost_P[kept]) != 0) | (np.diff(cell_P[kept]) != 0)
    return index[kept[last]]


def _sieved(cell_P: Array, cost_P: Array, usage_P: Array, weight: float) -> Array:
    """A mask without most of what is beaten: in each cell one good compromise is compared with all, which takes much
    less than sorting them."""
    starts = np.flatnonzero(np.diff(cell_P, prepend=cell_P[:1] - 1))
    score_P = cost_P + weight * (np.ptp(cost_P) / max(np.ptp(usage_P), 1e-300)) * usage_P
    count = np.diff(starts, append=len(cell_P))
    best_P = np.flatnonzero(score_P == np.repeat(np.minimum.reduceat(score_P, starts), count))
    best = best_P[np.searchsorted(best_P, starts)]  # the first of each cell
    cost, usage = np.repeat(cost_P[best], count), np.repeat(usage_P[best], count)
    left: Array = (cost_P < cost) | (usage_P < usage) | ((cost_P == cost) & (usage_P == usage))
    return left


def _thinned(cell_P: Array, cost_P: Array, max_points: int) -> tuple[Array, float]:
    """Which points to keep such that no cell has more than `max_points`, and by how much those kept may cost more than
    one left out (that uses no less). Points come by cell, cost and falling usage.

    A cell's range of costs is cut into equal parts, of each of which the last point stays.
    """
    starts = np.flatnonzero(np.concatenate([[True], np.diff(cell_P) != 0])) if len(cell_P) else np.zeros(0, np.int64)
    count = np.diff([*starts.tolist(), len(cell_P)])
    lowest, highest = cost_P[starts], cost_P[starts + count - 1]
    width = np.where(count > max_points, (highest - lowest) / max_points, 0.0)
    width_P, lowest_P = np.repeat(width, count), np.repeat(lowest, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        part_P = np.minimum(np.floor((cost_P - lowest_P) / width_P), max_points - 1)
    last_P = np.concatenate([(np.diff(part_P) != 0) | (np.diff(cell_P) != 0), np.ones(min(1, len(cell_P)), dtype=bool)])
    return last_P | (width_P == 0.0), float(width.max(initial=0.0))


# --- as a solver ------------------------------------------------------------------------------------------------------


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The optimum where all usages are held at one time: the cheapest point of the front within the limit."""
    try:
        front = pareto_front(instance, deadline=deadline)
    except (InputError, TooManyPoints, TimeoutError) as error:
        return replace(NOTHING, reasons=(str(error),))
    if not len(front):
        return infeasible(instance, f"no choice fits within the limit {instance.limit:.15g} (the front is empty)")
    cost = cost_of(instance, front.choices_FN[0])
    return Solved(front.choices_FN[0], cost, min(cost, float(front.cost_F[0])))


SOLVERS.add("frontier", solve)
