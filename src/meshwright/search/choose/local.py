"""Local search with large neighbourhoods: exact moves on random trees, from many starts.

Three uses of one move (`local_loops.search`): repair, where usage over the limit must fall; descent, where cost must;
and cooling, where cost may rise a little and noise decides among strategies nearly as good, less and less. The start
decides more than the length of the search, so several choices that `dual` proposes are polished, and the best cooled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose import local_loops as loops
from meshwright.search.choose.ascent import ascent
from meshwright.search.choose.ascent_loops import price_strategies
from meshwright.search.choose.grid import Grid, grid_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.reduce import reduced
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved, within

#: Multiples of the prices of memory that a move adds to costs, one at random.
WEIGHTS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 4.0])

#: Noise for the choice among strategies: one of so many quantiles of Gumbel's distribution (faster than logarithms).
GUMBEL = -np.log(-np.log((np.arange(4096) + 0.5) / 4096))

#: Nodes of a tree at most, in repair and elsewhere.
SMALL_TREE, LARGE_TREE = 30, 300

#: Repair goes on in rounds of moves; in each, times over the limit get dearer by a price that doubles, at first this
#: share of the whole cost for the whole room.
REPAIR_ROUNDS, REPAIR_MOVES, FIRST_REPAIR_PRICE = 20, 1000, 1e-3

#: Tree nodes that one call of the compiled loop visits, about (some hundredths of a second).
NODES_A_CALL = 40_000


@dataclass(frozen=True, eq=False)
class Search:
    """A search on a grid from one choice on; `priced_C` is what the usage of each strategy costs (see `dual`)."""

    grid: Grid
    state: loops.State
    priced_C: Array
    stop: Array

    @property
    def choice_N(self) -> Array | None:
        """The best choice so far that fits, or None."""
        return self.state.best_N.copy() if math.isfinite(self.cost) else None

    @property
    def cost(self) -> float:
        """What the best choice so far costs, without the grid's constant."""
        return float(self.state.numbers[loops.BEST])

    @property
    def fits(self) -> bool:
        """Whether the present choice fits."""
        return bool(self.state.numbers[loops.OVER] <= 0.0)

    def begin(self, choice_N: Array) -> None:
        """Go on from another choice."""
        self.state.choice_N[:] = choice_N
        loops.place(self.grid, self.state)
        if self.fits and self.state.numbers[loops.COST] < self.cost:
            self.state.numbers[loops.BEST] = self.state.numbers[loops.COST]
            self.state.best_N[:] = choice_N

    def moves(
        self, count: int, tree: int, warmth: float = 0.0, allowance: float = 0.0, *, repairing: bool = False
    ) -> None:
        """Some moves; see `local_loops.search`."""
        loops.search(
            self.grid, self.state, self.priced_C, WEIGHTS, GUMBEL, float(warmth), float(allowance), int(tree),
            int(count), repairing, self.stop,
        )  # fmt: skip

    def polish(self, deadline: Deadline, effort: float = 1.0) -> None:
        """Repair, then descend with small and with large trees; `effort` in moves on every node."""
        if not self._repair(deadline):
            return
        num_nodes = len(self.state.choice_N)
        for tree, visits in ((SMALL_TREE, 10), (LARGE_TREE, 20)):
            left = 1 + int(effort * visits * num_nodes / min(tree, num_nodes))
            while left > 0 and not deadline.passed and not self.stop[0]:
                count = min(left, calls_of(tree))
                self.moves(count, tree)
                left -= count

    def _repair(self, deadline: Deadline) -> bool:
        """Lower usage until it fits, at prices that rise where it does not; whether it did."""
        prices_C = self.priced_C.copy()
        room_T, numbers = self.grid.room_T, self.state.numbers
        price = FIRST_REPAIR_PRICE * float(numbers[loops.COST]) / max(float(room_T.max(initial=0.0)), 1e-300)
        for _ in range(REPAIR_ROUNDS):
            if self.fits or deadline.passed or self.stop[0]:
                break
            price_strategies(self.grid, price * (self.state.used_T > room_T), 1.0, prices_C)
            price *= 2.0
            replace(self, priced_C=prices_C).moves(REPAIR_MOVES, SMALL_TREE, repairing=True)
        return self.fits

    def cool(self, warmth: float, deadline: Deadline, tree: int = LARGE_TREE) -> None:
        """Noise and allowance from `warmth` down to none at the deadline."""
        total = deadline.left_s
        while not deadline.passed and not self.stop[0]:
            share = deadline.left_s / total
            self.moves(calls_of(tree), tree, warmth * share * share, warmth * share * share)


def calls_of(tree: int) -> int:
    """Moves of a call on trees of up to so many nodes."""
    return 1 + NODES_A_CALL // tree


def search_of(grid: Grid, priced_C: Array, seed: int, stop: Array | None = None) -> Search:
    """A search that has not begun."""
    num_nodes, num_strategies = len(grid.first_N) - 1, len(grid.cost_C)
    num_times, num_ends = len(grid.room_T), len(grid.near_X)
    space = loops.Space(
        inside_N=np.zeros(num_nodes, dtype=np.int64),
        tree_N=np.zeros(num_nodes, dtype=np.int64),
        parent_X=np.zeros(num_nodes, dtype=np.int64),
        frontier_X=np.zeros(num_ends + 1, dtype=np.int64),
        new_N=np.zeros(num_nodes, dtype=np.int64),
        value_C=np.zeros(num_strategies),
        change_T=np.zeros(num_times + 1),
        touched_N=np.zeros(num_nodes, dtype=np.int64),
    )
    state = loops.State(
        choice_N=np.zeros(num_nodes, dtype=np.int64),
        best_N=np.zeros(num_nodes, dtype=np.int64),
        beside_C=np.zeros(num_strategies),
        used_T=np.zeros(num_times),
        random=np.random.default_rng(seed).integers(1, 2**63, size=1, dtype=np.uint64),
        numbers=np.array([0.0, 0.0, math.inf, 0.0]),
        space=space,
    )
    return Search(grid, state, priced_C, np.zeros(1, dtype=np.int64) if stop is None else stop)


def polished(grid: Grid, choice_N: Array, priced_C: Array, seed: int, deadline: Deadline) -> Array | None:
    """A choice that fits, made from one that need not; None where repair failed."""
    search = search_of(grid, priced_C, seed)
    search.begin(choice_N)
    search.polish(deadline)
    return search.choice_N


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """Choices that `ascent` proposes in its first sweeps, polished, then the best cooled; no bound."""
    small = reduced(instance)
    if small.infeasible:
        return infeasible(instance, "no node-by-node combination is left after reduction")
    best = NOTHING
    if start is not None and is_legal(instance, start):
        best = Solved(start, cost_of(instance, start), -math.inf)
    scaled, stop = grid_of(small.instance), np.zeros(1, dtype=np.int64)
    up, starting = ascent(scaled), deadline.part(0.3)
    pool: list[tuple[float, Array]] = []
    while not (starting.passed or up.settled) and len(pool) < 20:
        up.advance(stop, best.cost)
        search = search_of(scaled.grid, up.priced(), seed, stop)
        search.begin(up.choice_N)
        search.polish(deadline)
        if search.choice_N is not None:
            pool.append((search.cost, search.choice_N))
            best = _told(best, instance, small.restore(search.choice_N), report)
    if not pool:
        return best
    cost, choice_N = min(pool, key=lambda entry: entry[0])
    search = search_of(scaled.grid, up.priced(), seed, stop)
    search.begin(choice_N)
    # A small instance has been cooled long before a generous deadline: about a second for a thousand strategies.
    enough = within(min(deadline.left_s, 1e-3 * len(scaled.grid.cost_C)))
    search.cool(warmth_of(cost, len(choice_N)), enough)
    return _told(best, instance, small.restore(search.choice_N), report) if search.choice_N is not None else best


def warmth_of(cost: float, num_nodes: int) -> float:
    """Where cooling begins, in costs: what a node costs on the average (above the grid's least), times a share."""
    return 0.02 * cost / max(1, num_nodes)


def _told(best: Solved, instance: Instance, choice_N: Array, report: Report | None) -> Solved:
    found = Solved(choice_N, cost_of(instance, choice_N), -math.inf)
    if found.cost >= best.cost or not is_legal(instance, choice_N):
        return best
    if report is not None:
        report(found)
    return found


SOLVERS.add("local", solve)
