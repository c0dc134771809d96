"""Greedy acyclic partitioning: fill one stage after the other with what is ready.

J. Herrmann et al., "Multilevel Algorithms for Acyclic Partitioning of Directed Acyclic Graphs", SIAM J. Sci. Comput.
2019 (greedy directed graph growing), without its levels. A stage takes, of the units whose predecessors are placed,
the one that receives most bytes from it (of equals the first), until its share of the time is reached: what is left
over the stages that are left. Balances time; memory is checked by the judge alone.

What we changed. All groups of devices are equal, under one option; every number of groups and every option that no
other beats is tried, and the judge takes the best.
"""

from __future__ import annotations

import numpy as np

from meshwright.search.pipelines.answer import PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.groups import best_of, groupings, plan_of_parts, unit_times
from meshwright.search.stages import Array, StageProblem


def greedy(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The best of the greedy partitions."""
    time_UK = unit_times(problem)
    plans = (
        plan_of_parts(grown_parts(problem, time_UK[:, each.option], each.num_groups), each.option)
        for each in groupings(problem)
        if not asked.deadline.passed
    )
    return best_of(problem, plans, "greedy: the best of its partitions, no bound")


def grown_parts(problem: StageProblem, weight_U: Array, num_parts: int) -> Array:
    """The part of each unit; none is empty."""
    total = problem.num_units
    waits = np.bincount(problem.edges_E[:, 1], minlength=total)
    after: list[list[tuple[int, float]]] = [[] for _ in range(total)]
    for (one, other), size in zip(problem.edges_E.tolist(), problem.bytes_E.tolist(), strict=True):
        after[one].append((other, size))
    part_U, gain_U = np.full(total, -1), np.zeros(total)
    ready = set(np.flatnonzero(waits == 0).tolist())
    part, load, left = 0, 0.0, float(weight_U.sum())
    for placed in range(total):
        unit = max(ready, key=lambda each: (gain_U[each], -each))
        share = (load + left) / (num_parts - part)
        parts_left, units_left = num_parts - 1 - part, total - placed
        is_full = load > 0 and load + weight_U[unit] / 2 > share
        # Each part that is left needs a unit.
        if parts_left and (is_full or units_left == parts_left) and placed:
            part, load = part + 1, 0.0
            gain_U[:] = 0.0
            unit = min(ready)
        ready.remove(unit)
        part_U[unit] = part
        load, left = load + weight_U[unit], left - weight_U[unit]
        for other, size in after[unit]:
            gain_U[other] += size
            waits[other] -= 1
            if not waits[other]:
                ready.add(other)
    return part_U
