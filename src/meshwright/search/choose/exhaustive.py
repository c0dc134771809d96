"""Every choice tried: the proof by enumeration, for the smallest instances and to test the other solvers against.

Legend: B choices of a block, numbered like digits of a number: the last node's strategy changes fastest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from meshwright.choice import Array, Instance, cost_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import Timeline, timeline

#: Instances with more choices are not tried; so many take a few seconds for ten nodes.
MOST_CHOICES = 2**22

BLOCK = 2**15  # choices priced at once


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The optimum, of equal ones the first in lexicographic order; nothing where there are more than `MOST_CHOICES`."""
    number = math.prod(instance.num_strategies_N.tolist())
    if number > MOST_CHOICES:
        reason = f"10^{math.log10(number):.0f} choices are too many to try: at most {MOST_CHOICES:,} are"
        return replace(NOTHING, reasons=(reason,))
    line, best = timeline(instance), NOTHING
    for first in range(0, number, BLOCK):
        if deadline.passed:
            return replace(best, reasons=(f"{first:,} of {number:,} choices were tried by the deadline",))
        choices_BN = _choices(instance, first, min(number, first + BLOCK))
        cost_B = _costs(instance, choices_BN)
        cost_B[_too_much(line, choices_BN)] = math.inf
        cheapest = int(cost_B.argmin())
        if cost_B[cheapest] < best.cost:
            choice_N = choices_BN[cheapest]
            best = Solved(choice_N, cost_of(instance, choice_N), -math.inf)
            if report is not None:
                report(best)
    if best.choice_N is None:
        return infeasible(instance, f"all {number:,} choices were tried: none is legal")
    return replace(best, lower_bound=best.cost)


def _choices(instance: Instance, start: int, stop: int) -> Array:
    digits_NB, number_B = [], np.arange(start, stop)
    for size in reversed(instance.num_strategies_N.tolist()):
        digits_NB.append(number_B % size)
        number_B = number_B // size
    return np.stack(digits_NB[::-1], axis=1) if digits_NB else np.zeros((stop - start, 0), dtype=np.int64)


def _costs(instance: Instance, choices_BN: Array) -> Array:
    cost_B = np.zeros(len(choices_BN))
    for node in range(instance.num_nodes):
        cost_B += instance.costs(node)[choices_BN[:, node]]
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        cost_B += instance.matrix(edge)[choices_BN[:, one], choices_BN[:, other]]
    return cost_B


def _too_much(line: Timeline, choices_BN: Array) -> Array:
    """Which choices exceed the limit at some time."""
    instance, broken_B = line.instance, np.zeros(len(choices_BN), dtype=bool)
    for time in range(line.num_times):
        used_B = np.zeros(len(choices_BN))
        for usage in np.flatnonzero((line.first_U <= time) & (time < line.stop_U)).tolist():
            used_B += instance.usage(usage)[choices_BN[:, instance.usage_node_U[usage]]]
        broken_B |= used_B > line.most
    return broken_B


SOLVERS.add("exhaustive", solve)
