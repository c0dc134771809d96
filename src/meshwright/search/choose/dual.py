"""The bound of `ascent` as a solver, with the best choice that a quick repair makes of those that it proposes."""

from __future__ import annotations

import math

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.ascent import ascent
from meshwright.search.choose.bounds import is_whole, rounded_up
from meshwright.search.choose.grid import grid_of
from meshwright.search.choose.local import polished
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.reduce import reduced
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved, better


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The bound, until it settles, and the best choice that a quick repair made of those that messages propose."""
    small = reduced(instance)
    if small.infeasible:
        return infeasible(instance, "no node-by-node combination is left after reduction")
    best = NOTHING
    if start is not None and is_legal(instance, start):
        best = Solved(start, cost_of(instance, start), -math.inf)
    up, whole, stop, seen = ascent(grid_of(small.instance)), is_whole(instance), np.zeros(1, dtype=np.int64), -1.0
    while not (up.settled or deadline.passed or best.gap <= 0.0):
        up.advance(stop, best.cost)
        found = NOTHING
        proposal = float(up.choice_N @ np.arange(1, len(up.choice_N) + 1))
        if proposal != seen:
            choice = polished(up.grid, up.choice_N, up.priced(), seed, deadline)
            restored = None if choice is None else small.restore(choice)
            if restored is not None and is_legal(instance, restored):
                found = Solved(restored, cost_of(instance, restored), -math.inf)
            seen = proposal
        news = better(best, found)
        bound = min(news.cost, max(best.lower_bound, rounded_up(up.bound, whole)))
        news = Solved(news.choice_N, news.cost, bound)
        if report is not None and (news.cost < best.cost or news.lower_bound > best.lower_bound):
            report(news)
        best = news
    return best


SOLVERS.add("dual", solve)
