"""Prices of memory: the Lagrangian bound, found by cutting planes over choices that an oracle gives.

Legend: T times (of a `Timeline`), K choices seen. With a price p_t >= 0 for each time every legal choice costs at least

    L(p) = min over choices x of (cost(x) + sum_t p_t used_t(x)) - limit * sum_t p_t,

and the largest L is a bound that knows about memory (Geoffrion 1974). Each x found says L(p) <= cost(x) +
sum_t p_t (used_t(x) - limit) for all p; the largest value that all these cuts allow is a linear program (Kelley 1960),
whose prices are asked next, drawn towards the best so far (Wentges 1997), which spares the wild first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.choice import Array, cost_of, is_legal
from meshwright.search.choose.bounds import dearest, is_whole, rounded_up
from meshwright.search.choose.moves import Moves, moves_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.repair import repaired
from meshwright.search.choose.solver import NOTHING, Deadline, Report, Solved, better
from meshwright.search.choose.times import Timeline, peaks

#: For other node costs in the same layout: a bound of the least total cost, and a choice (of that cost, where exact).
Oracle = Callable[[Array], tuple[float, Array]]

MOST_ROUNDS = 300  # by then the bound has stopped rising on all that was tried
ENOUGH = 1e-9  # a bound within this share of what the cuts allow is as good as it gets
DRAWN = 0.4  # towards the best prices so far; [derived] 0.2 to 0.6 take about the same number of rounds
NEW_TIMES = 20  # that get a price in one round, the worst first
RAISES = 24  # of the final prices by a half each, until a choice fits


@dataclass
class _Cuts:
    """Choices seen, by cost and usage, and the times that have a price."""

    line: Timeline
    cost_K: list[float] = field(default_factory=list)
    used_KT: list[Array] = field(default_factory=list)
    priced: list[int] = field(default_factory=list)
    box: float = 16.0  # the largest price, in mean costs per full memory; raised where it binds

    def add(self, cost: float, used_T: Array) -> None:
        self.cost_K.append(cost)
        self.used_KT.append(used_T)
        self.priced += [time for time in peaks(used_T - self.line.most)[:NEW_TIMES] if time not in self.priced]

    def highest(self) -> tuple[float, Array]:
        """The largest bound that the cuts allow, and its prices."""
        from meshwright.search.choose.highs import QuietHighs  # here: without memory it is not needed

        unit = max(abs(cost) for cost in self.cost_K) or 1.0
        memory = max(max(used.max() for used in self.used_KT), self.line.most)
        columns = len(self.priced)
        solver = QuietHighs()
        solver.addVar(-math.inf, math.inf)
        solver.changeColCost(0, -1.0)
        for _ in range(columns):
            solver.addVar(0.0, self.box)
        index = np.arange(columns + 1, dtype=np.int32)
        for cost, used in zip(self.cost_K, self.used_KT, strict=True):
            over = (used[self.priced] - self.line.most) / memory
            solver.addRow(-math.inf, cost / unit, columns + 1, index, np.concatenate([[1.0], -over]))
        solver.run()
        values = np.array(solver.getSolution().col_value)
        if columns and values[1:].max() >= self.box * (1 - 1e-9):
            self.box *= 8.0
        price_T = np.zeros(self.line.num_times)
        price_T[self.priced] = np.maximum(values[1:], 0.0) * unit / memory
        return float(values[0]) * unit, price_T


def best_prices(
    line: Timeline,
    oracle: Oracle,
    deadline: Deadline,
    *,
    known: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The best bound by prices and the best legal choice met on the way, or made from those met; `known` is a legal
    choice to begin with. Infeasible where the bound exceeds what any choice can cost."""
    instance = line.instance
    whole, ceiling, moves = is_whole(instance), dearest(instance), moves_of(line)
    cuts = _Cuts(line)
    best = NOTHING if known is None else _solved(line, known)
    price_T = centre_T = np.zeros(line.num_times)
    drawn, bound = DRAWN, -math.inf
    for _ in range(MOST_ROUNDS):
        value, choice_N = oracle(instance.cost_C + line.priced(price_T))
        here = value - line.allowed(price_T)
        if here > ceiling:
            return infeasible(instance, f"no choice fits within the limit {instance.limit:.15g} (proven by its prices)")
        improved = here > bound
        if improved:
            bound, centre_T = here, price_T
        found = better(best, _fitting(moves, choice_N, deadline))
        found = replace(found, lower_bound=min(found.cost, rounded_up(bound, whole)), reasons=())
        if report is not None and (found.cost < best.cost or found.lower_bound > best.lower_bound):
            report(found)
        best = found
        cuts.add(cost_of(instance, choice_N), line.used(choice_N))
        allowed, price_T = cuts.highest()
        if best.gap <= ENOUGH or allowed - bound <= ENOUGH * abs(allowed) or deadline.passed:
            break
        # Where drawing the prices back did not help, the next are those of the cuts themselves.
        drawn = DRAWN if improved else 0.0
        price_T = drawn * centre_T + (1 - drawn) * price_T
    return best if best.choice_N is not None else _raised(line, moves, oracle, centre_T, best, deadline)


def _raised(line: Timeline, moves: Moves, oracle: Oracle, price_T: Array, best: Solved, deadline: Deadline) -> Solved:
    """A choice that fits, by raising the prices until there is one."""
    for power in range(1, RAISES):
        found = _fitting(moves, oracle(line.instance.cost_C + line.priced(price_T * 1.5**power))[1], deadline)
        if found.choice_N is not None:
            return better(replace(best, reasons=()), found)
        if deadline.passed:
            break
    return replace(best, reasons=("no choice was found that fits within the limit at any prices",))


def _fitting(moves: Moves, choice_N: Array, deadline: Deadline) -> Solved:
    """A choice, repaired where it does not fit."""
    legal = repaired(moves, choice_N, deadline)
    return NOTHING if legal is None else _solved(moves.line, legal)


def _solved(line: Timeline, choice_N: Array) -> Solved:
    assert is_legal(line.instance, choice_N)
    return Solved(choice_N, cost_of(line.instance, choice_N), -math.inf)
