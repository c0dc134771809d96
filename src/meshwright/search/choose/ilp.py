"""The choice problem as an integer program for HiGHS: exact, also with memory, where the program is small enough.

Legend: N nodes, C strategies of all nodes, F edges (parallel ones added up), Y pairs of strategies on edges, R rows.

    minimise    sum c_C x_C + sum d_Y y_Y
    subject to  sum of x over a node's strategies = 1                          for each node
                sum of y over the pairs of an edge that hold strategy s = x_s  for each strategy of its two ends
                sum of usage x <= limit                                        for each time
                x in {0, 1}, y >= 0

With x whole the y are so by themselves; without it this is the local polytope (Werner 2007, "A linear programming
approach to max-sum problem"; Alpa's program is its instance, Zheng et al. 2022, arXiv 2201.12023, section
4.2, with y binary). Forbidden strategies and pairs have no column. Rows for times are added where solutions break them
if all together would be many.

Bounds. A linear program's bound is recomputed from its prices in the costs themselves: any prices prove one, so it owes
nothing to the solver's tolerances. An integer program's bound is HiGHS's own, lowered by its dual tolerance (10^-7) for
each node and edge (a solution has one strategy or pair of each in it) and by 10^-11 of itself, then rounded up where
all costs are whole. Costs are scaled such that the dearest is 10^6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from meshwright.choice import Array, Instance, cost_of
from meshwright.search.choose.bounds import is_whole, rounded_up
from meshwright.search.choose.moves import moves_of
from meshwright.search.choose.obstacles import infeasible, obstacles
from meshwright.search.choose.repair import repaired
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import Timeline, peaks, timeline

if TYPE_CHECKING:
    from meshwright.search.choose.highs import QuietHighs

#: With more pairs of strategies the linear program alone takes many minutes.
MOST_PAIRS = 600_000

LARGEST_COST = 1e6  # after scaling
LARGEST_USAGE = 1e4  # the limit after scaling, so that the solver's tolerance of 1e-7 is 1e-11 of it
DUAL_TOLERANCE = 1e-7  # of HiGHS, on each reduced cost
ROUNDING = 1e-11  # of sums of costs inside HiGHS
ALL_TIMES_UP_TO = 300_000  # entries in the rows of all times; beyond, rows are added where they are broken
NEW_TIMES = 30  # rows added at once
MOST_ROUNDS = 100  # of adding rows


@dataclass(frozen=True, eq=False)
class Program:
    """Columns 0 up to C are strategies, then come pairs; costs are divided by `unit` after `offset` is taken off.

    Rows 0 up to N are nodes, then come for each edge a row for each strategy of its one end and of its other:
    `strategy_R` is that strategy, `one_row_Y` and `other_row_Y` the rows that a pair is in.
    """

    line: Timeline
    cost_C: Array
    one_Y: Array
    other_Y: Array
    cost_Y: Array
    first_Y_F: Array
    strategy_R: Array
    one_row_Y: Array
    other_row_Y: Array
    unit: float
    offset: float

    @property
    def instance(self) -> Instance:
        """What it solves."""
        return self.line.instance

    def columns(self, choice_N: Array) -> Array:
        """The columns' values that are a choice."""
        chosen_C = np.zeros(len(self.cost_C))
        chosen_C[self.instance.first_N[:-1] + choice_N] = 1.0
        return np.concatenate([chosen_C, chosen_C[self.one_Y] * chosen_C[self.other_Y]])

    def choice(self, columns: Array) -> Array:
        """The choice that columns are, up to the solver's tolerance; of fractions the largest of each node."""
        first = self.instance.first_N.tolist()
        return np.array([int(columns[a:b].argmax()) for a, b in itertools.pairwise(first)], dtype=np.int64)


def program_of(instance: Instance) -> Program:
    """The columns and costs of an instance's program."""
    cost_C = instance.cost_C.copy()
    edges = list(_edges(instance, cost_C))
    first = instance.first_N
    lowest_N = np.minimum.reduceat(cost_C, first[:-1])
    cost_C -= np.repeat(lowest_N, instance.num_strategies_N)
    cost_Y = _joined([edge.cost_Y for edge in edges])
    unit = _unit(cost_C, cost_Y)
    ends = np.array([edge.ends for edge in edges], dtype=np.int64).reshape(-1, 2)
    strategies = [np.arange(first[node], first[node + 1]) for node in ends.ravel().tolist()]
    row_first = instance.num_nodes + _offsets([len(part) for part in strategies])
    first_Y_F = _offsets([len(edge.cost_Y) for edge in edges])
    edge_Y = np.repeat(np.arange(len(edges)), np.diff(first_Y_F))
    one_Y, other_Y = (_joined([edge.strategies[end] for edge in edges], np.int64) for end in (0, 1))
    return Program(
        line=timeline(instance),
        cost_C=cost_C / unit,
        one_Y=one_Y,
        other_Y=other_Y,
        cost_Y=cost_Y / unit,
        first_Y_F=first_Y_F,
        strategy_R=_joined(strategies, np.int64),
        one_row_Y=row_first[2 * edge_Y] + one_Y - first[ends[edge_Y, 0]],
        other_row_Y=row_first[2 * edge_Y + 1] + other_Y - first[ends[edge_Y, 1]],
        unit=unit,
        offset=float(lowest_N.sum() + sum(edge.offset for edge in edges)),
    )


def _unit(*costs: Array) -> float:
    """What to divide costs by."""
    largest = max(float(values[np.isfinite(values)].max(initial=0.0)) for values in costs)
    return largest / LARGEST_COST if largest > 0 else 1.0


def _offsets(lengths: list[int]) -> Array:
    """Where parts of these lengths begin, and the end."""
    return np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])


def _joined(parts: list[Array], dtype: type = np.float64) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class _Edge:
    """Finite pairs of strategies (counted among all nodes') of an edge's ends, and their costs beyond `offset`."""

    ends: tuple[int, int]
    strategies: tuple[Array, Array]
    cost_Y: Array
    offset: float


def _edges(instance: Instance, cost_C: Array) -> Iterator[_Edge]:
    """Edges with their pairs; parallel ones are added up, and what only adds something to each end (m = r + s) is moved
    into `cost_C`."""
    together: dict[tuple[int, int], Array] = {}
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        matrix = instance.matrix(edge) if one < other else instance.matrix(edge).T
        ends = (min(one, other), max(one, other))
        together[ends] = together[ends] + matrix if ends in together else matrix
    first, allowed_C = instance.first_N, np.isfinite(instance.cost_C)
    for ends, matrix in together.items():
        ours, theirs = (first[node] + np.flatnonzero(allowed_C[first[node] : first[node + 1]]) for node in ends)
        left = matrix[np.ix_(ours - first[ends[0]], theirs - first[ends[1]])]
        if np.isfinite(left).all() and np.array_equal(
            left - left[:1], np.broadcast_to(left[:, :1] - left[0, 0], left.shape)
        ):
            cost_C[ours] += left[:, 0]
            cost_C[theirs] += left[0] - left[0, 0]
            continue
        i, j = np.nonzero(np.isfinite(left))
        offset = float(left[i, j].min())
        yield _Edge(ends, (ours[i], theirs[j]), left[i, j] - offset, offset)


# --- the model of HiGHS -----------------------------------------------------------------------------------------------


def _model(program: Program) -> QuietHighs:
    """The program, linear so far and without rows for times."""
    import highspy

    from meshwright.search.choose.highs import QuietHighs

    instance = program.instance
    num_C, num_Y, num_N = len(program.cost_C), len(program.cost_Y), instance.num_nodes
    num_rows, pair_Y = num_N + len(program.strategy_R), num_C + np.arange(num_Y)
    node_C = np.repeat(np.arange(num_N), instance.num_strategies_N)
    rows = np.concatenate([node_C, np.arange(num_N, num_rows), program.one_row_Y, program.other_row_Y])
    columns = np.concatenate([np.arange(num_C), program.strategy_R, pair_Y, pair_Y])
    values = np.concatenate([np.ones(num_C), np.full(num_rows - num_N, -1.0), np.ones(2 * num_Y)])
    order = np.argsort(rows, kind="stable")
    cost = np.concatenate([program.cost_C, program.cost_Y])
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = num_C + num_Y, num_rows
    lp.col_cost_ = np.where(np.isfinite(cost), cost, 0.0)
    lp.col_lower_, lp.col_upper_ = np.zeros(len(cost)), np.isfinite(cost).astype(float)
    lp.row_lower_ = lp.row_upper_ = (np.arange(num_rows) < num_N).astype(float)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.searchsorted(rows[order], np.arange(num_rows + 1)).astype(np.int32)
    lp.a_matrix_.index_ = columns[order].astype(np.int32)
    lp.a_matrix_.value_ = values[order]
    solver = QuietHighs()
    solver.passModel(lp)
    return solver


class _Rows:
    """The rows for times in a model, added as they are needed."""

    def __init__(self, program: Program, solver: QuietHighs) -> None:
        self.line, self.solver, self.times = program.line, solver, list[int]()
        line, instance = program.line, program.instance
        lengths_V = np.repeat(line.stop_U - line.first_U, np.diff(instance.usage_first_U))
        if int(lengths_V.sum()) <= ALL_TIMES_UP_TO:
            self.add(range(line.num_times))

    def add(self, times: Iterable[int]) -> bool:
        """Add the rows of these times; whether any was missing."""
        new = [time for time in times if time not in self.times]
        scale = LARGEST_USAGE / self.line.instance.limit if self.line.instance.limit > 0 else 1.0
        for time in new:
            usage_C = self.line.at(time)
            held = np.flatnonzero(usage_C)
            self.solver.addRow(
                -math.inf, self.line.instance.limit * scale, len(held), held.astype(np.int32), usage_C[held] * scale
            )
        self.times += new
        return bool(new)

    def add_broken(self, used_T: Array) -> bool:
        """Add rows of the times at which usage is most over the limit; whether any was missing."""
        return self.add(peaks(used_T - self.line.most)[:NEW_TIMES])

    def prices(self, duals: Array, unit: float) -> Array:
        """The prices of all times, for rows' duals."""
        limit = self.line.instance.limit
        price_T = np.zeros(self.line.num_times)
        price_T[self.times] = np.maximum(-duals, 0.0) * unit * (LARGEST_USAGE / limit if limit > 0 else 1.0)
        return price_T


@dataclass(frozen=True, eq=False)
class Proof:
    """What prices prove (see `_proof`): a bound, and by how much strategies and pairs lie above the least of theirs; no
    choice with that strategy or pair in it costs less than the bound and that much."""

    bound: float
    above_C: Array
    above_Y: Array


def _proof(program: Program, duals: Array, price_T: Array) -> Proof:
    """What these duals of the rows of nodes and edges, and prices of times, prove.

    With a_R on the rows of edges and prices p_t: the sum over nodes of min over s of (c_s + sum of a over the rows of s
    + p usage_s), plus the sum over edges of min over pairs of (d - a_one - a_other), less limit * sum p.
    """
    num_N, first_N, first_F = program.instance.num_nodes, program.instance.first_N, program.first_Y_F
    given_C = np.bincount(program.strategy_R, duals[num_N:], minlength=len(program.cost_C))
    value_C = (program.cost_C + given_C) * program.unit + program.line.priced(price_T)
    value_Y = (program.cost_Y - duals[program.one_row_Y] - duals[program.other_row_Y]) * program.unit
    least_N = np.minimum.reduceat(value_C, first_N[:-1])
    least_F = np.minimum.reduceat(value_Y, first_F[:-1]) if len(value_Y) else np.zeros(0)
    return Proof(
        program.offset + float(least_N.sum() + least_F.sum()) - program.line.allowed(price_T),
        value_C - np.repeat(least_N, np.diff(first_N)),
        value_Y - np.repeat(least_F, np.diff(first_F)),
    )


def _narrowed(program: Program, proof: Proof, room: float) -> Program | None:
    """The program without what lies more than `room` above the bound, scaled anew; None where nothing is left."""
    cost_C = np.where(proof.above_C > room, math.inf, program.cost_C)
    kept_Y = (proof.above_Y <= room) & np.isfinite(cost_C[program.one_Y]) & np.isfinite(cost_C[program.other_Y])
    edge_Y = np.repeat(np.arange(len(program.first_Y_F) - 1), np.diff(program.first_Y_F))[kept_Y]
    first_Y_F = np.searchsorted(edge_Y, np.arange(len(program.first_Y_F)))
    if (np.diff(first_Y_F) == 0).any() or not np.isfinite(
        np.minimum.reduceat(cost_C, program.instance.first_N[:-1])
    ).all():
        return None
    rescale = _unit(cost_C, program.cost_Y[kept_Y])
    return replace(
        program,
        cost_C=cost_C / rescale,
        one_Y=program.one_Y[kept_Y],
        other_Y=program.other_Y[kept_Y],
        cost_Y=program.cost_Y[kept_Y] / rescale,
        first_Y_F=first_Y_F,
        one_row_Y=program.one_row_Y[kept_Y],
        other_row_Y=program.other_row_Y[kept_Y],
        unit=program.unit * rescale,
    )


def _relaxed(program: Program, solver: QuietHighs, rows: _Rows, deadline: Deadline) -> tuple[Proof | None, Array]:
    """Solve the linear program, adding rows until its solution breaks none: the best proof on the way and the last
    columns (none where the first did not end in time, or nothing is feasible)."""
    best, columns = None, np.zeros(0)
    for _ in range(MOST_ROUNDS):
        solver.solve_until(deadline)
        solution = solver.getSolution()
        if solution.dual_valid:
            num_rows = program.instance.num_nodes + len(program.strategy_R)
            duals = np.array(solution.row_dual)
            proof = _proof(program, duals[:num_rows], rows.prices(duals[num_rows:], program.unit))
            best = proof if best is None or proof.bound > best.bound else best
        if not solution.value_valid or deadline.passed:
            break
        columns = np.array(solution.col_value)
        if not rows.add_broken(_used(program, columns)):
            break
    return best, columns


def _used(program: Program, columns: Array) -> Array:
    """What (fractions of) strategies have in use at each time."""
    line, instance = program.line, program.instance
    amounts_V = columns[line.place_V] * instance.usage_V
    amounts_U = np.add.reduceat(amounts_V, instance.usage_first_U[:-1]) if len(amounts_V) else np.zeros(0)
    return line.held(amounts_U)


# --- solving ----------------------------------------------------------------------------------------------------------


def lp_bound(instance: Instance, deadline: Deadline) -> float:
    """The bound of the local polytope with memory: the linear program's, proven whatever the solver's tolerances.

    Minus infinity where the program is too large or the time too short, infinity where the instance is infeasible.

    >>> from meshwright.choice import instance_of
    >>> lp_bound(instance_of([[1, 2], [0, 5]], [(0, 1, [[9, 0], [0, 9]])]), Deadline())
    2.0
    """
    if obstacles(instance):
        return math.inf
    if _num_pairs(instance) > MOST_PAIRS:
        return -math.inf
    program = program_of(instance)
    solver = _model(program)
    proof, _ = _relaxed(program, solver, _Rows(program, solver), deadline)
    return -math.inf if proof is None else rounded_up(proof.bound, is_whole(instance))


def _num_pairs(instance: Instance) -> int:
    return int(np.isfinite(instance.matrix_M).sum())


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The optimum, proven, or at the deadline the best choice and bound so far.

    `start` helps the solver to leave out what is dearer. Nothing is tried where the program would be too large.
    """
    if not instance.num_nodes:  # as reductions may leave it; HiGHS has no answer to an empty program
        return Solved(np.zeros(0, dtype=np.int64), 0.0, 0.0)
    if reasons := obstacles(instance):
        return Solved(None, math.inf, math.inf, reasons)
    if (pairs := _num_pairs(instance)) > MOST_PAIRS:
        reason = f"{pairs:,} pairs of strategies are too many for an integer program: at most {MOST_PAIRS:,} are tried"
        return replace(NOTHING, reasons=(reason,))
    return _Search(instance, deadline, seed, start, report).solved()


class _Search:
    """One solution of an instance: the linear program, then integer programs until one breaks no row that is left out.

    `best` is the best choice and bound so far, of which `report` is told.
    """

    def __init__(
        self, instance: Instance, deadline: Deadline, seed: int, start: Array | None, report: Report | None
    ) -> None:
        self.instance, self.deadline, self.seed, self.report = instance, deadline, seed, report
        self.whole = is_whole(instance)
        self.program = program_of(instance)
        self.moves = moves_of(self.program.line)
        self.best = NOTHING
        if start is not None:
            self._try(start)

    def solved(self) -> Solved:
        """Solve."""
        self.solver = _model(self.program)
        self.rows = _Rows(self.program, self.solver)
        proof, columns = _relaxed(self.program, self.solver, self.rows, self.deadline)
        if proof is not None:
            self._raise(proof.bound)
        if len(columns):
            self._try(self.program.choice(columns))
        if proof is not None:
            self._narrow(proof)
        self._make_whole()
        for _ in range(MOST_ROUNDS):
            if self.best.cost <= self.best.lower_bound or self.deadline.passed or not self._round():
                break
        return self.best

    def _narrow(self, proof: Proof) -> None:
        """Leave out what no choice better than the best so far can hold."""
        if self.best.choice_N is None:
            return
        room = self.best.cost - proof.bound
        narrowed = _narrowed(self.program, proof, room + 1e-9 * max(abs(self.best.cost), room))
        if narrowed is None:
            self._raise(self.best.cost)
            return
        times = self.rows.times
        self.program, self.solver = narrowed, _model(narrowed)
        self.rows = _Rows(narrowed, self.solver)
        self.rows.add(times)

    def _make_whole(self) -> None:
        import highspy

        num_C = len(self.program.cost_C)
        kinds = np.full(num_C, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        self.solver.changeColsIntegrality(num_C, np.arange(num_C, dtype=np.int32), kinds)
        self.solver.setOptionValue("random_seed", self.seed)
        self.solver.setOptionValue("mip_rel_gap", 0.0)
        # Whole costs less than one apart are the same; half, since the bound is lowered before it is rounded up.
        self.solver.setOptionValue("mip_abs_gap", max(1e-6, 0.5 / self.program.unit) if self.whole else 1e-6)

    def _round(self) -> bool:
        """Solve the integer program with the rows that it has; whether others are to be added."""
        if self.best.choice_N is not None:
            self._set_start(self.best.choice_N)
        self.solver.solve_until(self.deadline, lambda columns: self._try(self.program.choice(columns)))
        if self.solver.getModelStatus().name in ("kInfeasible", "kUnboundedOrInfeasible"):
            self._tell(infeasible(self.instance, "no choice fits (proven by the integer program)"))
            return False
        self._raise(self._safe(self.solver.getInfo().mip_dual_bound))
        solution = self.solver.getSolution()
        if not solution.value_valid:
            return False
        choice_N = self.program.choice(np.array(solution.col_value))
        self._try(choice_N)  # of one found in presolve the callback was not told
        return self._cut(choice_N)

    def _set_start(self, choice_N: Array) -> None:
        import highspy

        solution = highspy.HighsSolution()
        solution.col_value = self.program.columns(choice_N)
        self.solver.setSolution(solution)

    def _safe(self, dual_bound: float) -> float:
        """The solver's bound in the instance's costs, less what its tolerances may make of it."""
        parts = self.instance.num_nodes + len(self.program.first_Y_F) - 1
        return self.program.offset + self.program.unit * (
            dual_bound - DUAL_TOLERANCE * parts - ROUNDING * abs(dual_bound)
        )

    def _raise(self, bound: float) -> None:
        bound = min(self.best.cost, rounded_up(bound, self.whole))
        if bound > self.best.lower_bound:
            self._tell(replace(self.best, lower_bound=bound))

    def _try(self, choice_N: Array) -> None:
        """Keep a choice, or what its repair makes of it, where it is better."""
        legal = repaired(self.moves, choice_N, self.deadline)
        if legal is not None and (cost := cost_of(self.instance, legal)) < self.best.cost:
            self._tell(Solved(legal, cost, min(self.best.lower_bound, cost)))

    def _tell(self, solved: Solved) -> None:
        self.best = solved
        if self.report is not None:
            self.report(solved)

    def _cut(self, choice_N: Array) -> bool:
        """Forbid a choice that breaks the limit, if it does: by the rows that it breaks; where they are there (it does
        so by less than the solver's tolerance), by not allowing all that is held at such a time at once."""
        over_T = self.program.line.used(choice_N) - self.program.line.most
        if self.rows.add(peaks(over_T)[:NEW_TIMES]):
            return True
        for time in peaks(over_T):
            chosen = self.instance.first_N[:-1] + choice_N
            held = chosen[self.program.line.at(time)[chosen] > 0]
            self.solver.addRow(-math.inf, len(held) - 1.0, len(held), held.astype(np.int32), np.ones(len(held)))
        return bool((over_T > 0).any())


SOLVERS.add("ilp", solve)
