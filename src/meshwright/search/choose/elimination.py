"""Exact solution by eliminating nodes one after the other: dynamic programming over a tree decomposition.

Eliminating a node adds up all tables that contain it and takes the minimum over its strategies, which leaves a table
over its neighbours; when none is left, the optimum is known, and going back in reverse order gives each node the
strategy that attained its minimum. Operator graphs have a small treewidth (2 for a transformer block), so the tables
stay small. OptCNN (Jia et al. 2018, arXiv 1802.04924) eliminates nodes of degree 2 and parallel edges;
PaSE (Elango 2021, "PaSE: Parallelization Strategies for Efficient DNN Training") orders the vertices such
that the sets that they depend on stay small; both are bucket elimination (Dechter 1999), which takes any degree.

Memory limits tie all nodes together, and no order keeps the tables small then. Usage gets a price at each time instead
(Lagrange multipliers): each price vector gives, by one more elimination, a lower bound and a choice, and the best
prices are found by cutting planes. The bound is proven but may stay below the optimum: the gap says so.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.prices import best_prices
from meshwright.search.choose.solver import ENDLESS, NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import timeline

#: Tables with more entries than this (1 GiB) are not made.
MOST_ENTRIES = 2**27

#: Sums of tables are made in blocks of about so many entries, which the second-level cache holds.
BLOCK_ENTRIES = 2**17

#: Up to so many nodes both rules for the order are tried; beyond, counting fill-in takes longer than it saves.
TRY_FILL_UP_TO = 2000


@dataclass(frozen=True)
class Step:
    """One elimination: of `node`, whose `tables` (smallest first) are seen in `views` such that they can be added; the
    node is dim 0 of each. The minimum over it is a table over `scope`, numbered `result`."""

    node: int
    tables: tuple[int, ...]
    views: tuple[tuple[int, ...], ...]
    scope: tuple[int, ...]
    shape: tuple[int, ...]
    result: int


@dataclass(frozen=True, eq=False)
class Plan:
    """An order of elimination with all shapes, made once and applied to many node costs (`eliminate`).

    Tables 0 up to the number of nodes are the nodes' costs, then come `matrices`, one for each edge with the node that
    goes first as rows, then the results of `steps`. `kept` nodes are never eliminated: `last` adds up what remains into
    a table over them.
    """

    instance: Instance
    steps: tuple[Step, ...]
    kept: tuple[int, ...]
    last: Step
    matrices: tuple[Array, ...]
    most_entries: int


@dataclass(frozen=True, eq=False)
class Eliminated:
    """The least cost for each joint strategy of the kept nodes (0-dimensional where none is kept), and all tables."""

    plan: Plan
    tables: tuple[Array, ...]
    least: Array

    def choice(self, kept_strategies: Sequence[int] = ()) -> Array:
        """A cheapest choice in which the kept nodes, in their order, take these strategies."""
        plan = self.plan
        choice_N = np.zeros(plan.instance.num_nodes, dtype=np.int64)
        choice_N[list(plan.kept)] = kept_strategies
        chosen = choice_N.tolist()
        for step in reversed(plan.steps):
            chosen[step.node] = int(_column(self.tables, step, [chosen[node] for node in step.scope]).argmin())
        return np.array(chosen, dtype=np.int64)


def _column(tables: Sequence[Array], step: Step, strategies: Sequence[int]) -> Array:
    """What each strategy of the step's node costs where the nodes of its scope take these."""
    total: Array | float = 0.0
    for table, view in zip(step.tables, step.views, strict=True):
        # A view has length 1 along the nodes of the scope that its table does not contain.
        index = tuple(0 if length == 1 else s for length, s in zip(view[1:], strategies, strict=True))
        where: Any = (slice(None), *index)
        total = total + tables[table].reshape(view)[where]
    assert isinstance(total, np.ndarray)
    return total


def plan_of(
    instance: Instance,
    kept: Sequence[int] = (),
    *,
    most_entries: int = MOST_ENTRIES,
    deadline: Deadline = ENDLESS,
) -> Plan | None:
    """The order in which to eliminate all nodes but those kept, or None where a table (before its minimum is taken)
    would have more than `most_entries` entries, or no order was found by the deadline.

    Of two greedy rules the one with fewer entries in all is taken: the smallest table next; the fewest new pairs next.
    """
    rules = (False, True) if instance.num_nodes <= TRY_FILL_UP_TO else (False,)
    orders = [found for by_fill in rules if (found := _order(instance, kept, most_entries, deadline, by_fill=by_fill))]
    return _plan(instance, tuple(kept), *min(orders)[1:]) if orders else None


def _order(
    instance: Instance, kept: Sequence[int], most_entries: int, deadline: Deadline, *, by_fill: bool
) -> tuple[int, int, list[int]] | None:
    """Entries of all tables, those of the largest, the order; None where a table would be too large."""
    sizes: list[int] = instance.num_strategies_N.tolist()
    around: list[set[int]] = [set() for _ in sizes]
    for one, other in instance.edges_E.tolist():
        around[one].add(other)
        around[other].add(one)
    # The logarithm of a node's table, kept up to date in whole numbers: a hub has too many neighbours to sum up again.
    log_N = [round(math.log2(size) * 2**20) for size in sizes]
    table_N = [log_N[node] + sum(log_N[other] for other in near) for node, near in enumerate(around)]

    def score(node: int) -> tuple[int, int]:
        near = around[node]
        missing = sum(len(near) - 1 - len(near & around[other]) for other in near) if by_fill else 0
        return missing, table_N[node]

    left = set(range(len(sizes))) - set(kept)
    scores = {node: score(node) for node in left}
    heap = [(value, node) for node, value in scores.items()]
    heapq.heapify(heap)
    order: list[int] = []
    total = most = math.prod(sizes[node] for node in kept)
    while heap:
        value, node = heapq.heappop(heap)
        if node not in left or value != scores[node]:
            continue  # an older score
        near = around[node]
        entries = math.prod((sizes[node], *(sizes[other] for other in near)))
        total, most = total + entries, max(most, entries)
        if most > most_entries or deadline.passed:
            return None
        order.append(node)
        left.remove(node)
        for other in near:
            new = near - around[other]
            new.discard(other)
            table_N[other] += sum(log_N[third] for third in new) - log_N[node]
            around[other] |= new
            around[other].discard(node)
        changed = near.union(*(around[other] for other in near)) if by_fill else near
        for other in changed & left:
            scores[other] = score(other)
            heapq.heappush(heap, (scores[other], other))
    return (total, most, order) if most <= most_entries else None


def _plan(instance: Instance, kept: tuple[int, ...], most_entries: int, order: list[int]) -> Plan:
    place = {node: index for index, node in enumerate((*order, *kept))}
    sizes = instance.num_strategies_N.tolist()
    # The dims of every table stand in the order of elimination, so dim 0 goes first and nothing is ever transposed.
    scopes: list[tuple[int, ...]] = [(node,) for node in range(instance.num_nodes)]
    matrices = []
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        forward = place[one] < place[other]
        scopes.append((one, other) if forward else (other, one))
        matrices.append(instance.matrix(edge) if forward else np.ascontiguousarray(instance.matrix(edge).T))
    buckets: dict[int, list[int]] = {node: [] for node in place}
    whole: list[int] = []  # tables over kept nodes alone

    def put(table: int) -> None:
        first = scopes[table][0] if scopes[table] else None
        (whole if first is None or place[first] >= len(order) else buckets[first]).append(table)

    def step(tables: list[int], lead: tuple[int, ...], scope: tuple[int, ...]) -> Step:
        tables = sorted(tables, key=lambda table: math.prod(sizes[node] for node in scopes[table]))
        views = tuple(tuple(sizes[n] if n in scopes[table] else 1 for n in (*lead, *scope)) for table in tables)
        shape = tuple(sizes[node] for node in scope)
        return Step(lead[0] if lead else -1, tuple(tables), views, scope, shape, len(scopes))

    for table in range(len(scopes)):
        put(table)
    steps = []
    for node in order:
        union = {other for table in buckets[node] for other in scopes[table]} - {node}
        steps.append(step(buckets[node], (node,), tuple(sorted(union, key=place.__getitem__))))
        scopes.append(steps[-1].scope)
        put(len(scopes) - 1)
    return Plan(instance, tuple(steps), kept, step(whole, (), kept), tuple(matrices), most_entries)


def eliminate(plan: Plan, cost_C: Array | None = None) -> Eliminated:
    """The optimum for the instance's own node costs, or for others (prices of memory, say) in the same layout.

    >>> from meshwright.choice import instance_of
    >>> plan = plan_of(instance_of([[1, 2], [0, 5]], [(0, 1, [[9, 0], [0, 9]])]))
    >>> found = eliminate(plan)
    >>> float(found.least), found.choice()
    (2.0, array([1, 0]))
    """
    instance = plan.instance
    costs = instance.cost_C if cost_C is None else cost_C
    first = instance.first_N.tolist()
    tables: list[Array] = [costs[first[node] : first[node + 1]] for node in range(instance.num_nodes)]
    tables += plan.matrices
    for step in plan.steps:
        tables.append(_minimum([tables[t].reshape(v) for t, v in zip(step.tables, step.views, strict=True)], step))
    last = plan.last
    least = np.zeros(last.shape)
    for table, view in zip(last.tables, last.views, strict=True):
        least = least + tables[table].reshape(view)
    return Eliminated(plan, tuple(tables), least)


def _minimum(tables: list[Array], step: Step) -> Array:
    """The sum of tables (smallest first, so that sums grow late), minimised over dim 0."""
    num_strategies = max(len(table) for table in tables)
    rows = max(1, BLOCK_ENTRIES // max(1, math.prod(step.shape)))
    least: Array | None = None
    for start in range(0, num_strategies, rows):
        total: Array | float = 0.0
        for table in tables:
            total = total + table[start : start + rows]
        assert isinstance(total, np.ndarray)
        block = total.min(axis=0)
        least = block if least is None else np.minimum(least, block)
    assert least is not None
    return least


def min_marginals(instance: Instance, nodes: Sequence[int], *, most_entries: int = MOST_ENTRIES) -> Eliminated | None:
    """The least total cost for each joint strategy of a few nodes (`.least`, a dim for each), and `.choice(strategies)`
    for the choice that costs it; None where tables would become too large. Memory is left out.

    >>> from meshwright.choice import instance_of
    >>> chain = instance_of([[0, 0], [1, 4], [0, 0]], [(0, 1, [[0, 5], [5, 0]]), (1, 2, [[0, 5], [5, 0]])])
    >>> ends = min_marginals(chain, [0, 2])
    >>> ends.least.tolist(), ends.choice((1, 1))
    ([[1.0, 6.0], [6.0, 4.0]], array([1, 1, 1]))
    """
    plan = plan_of(instance, nodes, most_entries=most_entries)
    return None if plan is None else eliminate(plan)


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The optimum where memory does not bind or its prices close the gap; else a bound and a choice, where one fits.

    A single elimination does not look at the clock: it takes under a second for each 2^28 entries of all its tables.
    """
    plan = plan_of(instance, deadline=deadline)
    if plan is None and deadline.passed:
        return replace(NOTHING, reasons=("no order of elimination was found by the deadline",))
    if plan is None:
        reason = f"a table of elimination would have more than 2^{math.log2(MOST_ENTRIES):.0f} entries"
        return replace(NOTHING, reasons=(reason,))
    found = eliminate(plan)
    if not math.isfinite(found.least):
        return infeasible(instance, "every choice has an infinite cost (proven by elimination)")
    line, choice_N = timeline(instance), found.choice()
    if not (line.used(choice_N) > line.most).any():
        cost = cost_of(instance, choice_N)
        return Solved(choice_N, cost, min(cost, float(found.least)))

    def oracle(cost_C: Array) -> tuple[float, Array]:
        priced = eliminate(plan, cost_C)
        return float(priced.least), priced.choice()

    known = start if start is not None and is_legal(instance, start) else None
    return best_prices(line, oracle, deadline, known=known, report=report)


SOLVERS.add("elimination", solve)
