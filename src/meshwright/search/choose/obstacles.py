"""Why an instance of the choice problem has no legal choice: the node that is left without a strategy, the time at
which even the least usage is too much. What is found here is a proof; that nothing is found proves nothing."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np

from meshwright.choice import Array, Instance, summed_over_time
from meshwright.search.choose.solver import NOTHING, Deadline, Solved
from meshwright.search.choose.times import ROUNDING, extremes


def obstacles(instance: Instance) -> tuple[str, ...]:
    """Reasons why no choice is legal, none where no obvious one is found.

    >>> from meshwright.choice import instance_of
    >>> obstacles(instance_of([[1, 2], [0]], [(0, 1, [[math.inf], [math.inf]])]))
    ('node 0 has no strategy left: each of its 2 is forbidden by its cost or by edges, the last by edge 0 to node 1',)
    """
    return (*_too_much(instance), *_no_strategy(instance))


def infeasible(instance: Instance, otherwise: str) -> Solved:
    """The answer that no legal choice exists, which somebody has proven, with reasons; `otherwise` is the reason where
    no smaller one is found."""
    return Solved(None, math.inf, math.inf, obstacles(instance) or (otherwise,))


def not_found(instance: Instance, deadline: Deadline, reason: str) -> Solved:
    """The answer of who found no legal choice, and why; that there is none, where that is obvious and time is left to
    see it."""
    found = () if deadline.passed else obstacles(instance)
    return Solved(None, math.inf, math.inf, found) if found else replace(NOTHING, reasons=(reason,))


def _too_much(instance: Instance) -> list[str]:
    """The time at which even the smallest usages together exceed the limit by most."""
    times, least = summed_over_time(instance.intervals_U, _finite(extremes(instance)[0]))
    if not len(times) or least.max() <= instance.limit * (1 + ROUNDING):
        return []
    worst = int(least.argmax())
    held = np.count_nonzero((instance.intervals_U[:, 0] <= times[worst]) & (instance.intervals_U[:, 1] > times[worst]))
    return [
        f"the interval [{times[worst]}, {times[worst + 1]}) cannot hold the {held} usages in it: they need at least "
        f"{least[worst]:.15g}, the limit is {instance.limit:.15g}"
    ]


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def _no_strategy(instance: Instance) -> list[str]:
    """The first node all of whose strategies are gone when those without a partner on some edge are struck out, again
    and again (arc consistency)."""
    alive = [np.isfinite(instance.costs(node)) for node in range(instance.num_nodes)]
    for node, left in enumerate(alive):
        if not left.any():
            return [f"node {node} has no strategy left: its {len(left)} costs are infinite"]
    allowed = [np.isfinite(instance.matrix(edge)) for edge in range(instance.num_edges)]
    around: list[list[int]] = [[] for _ in range(instance.num_nodes)]
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        around[one].append(edge)
        around[other].append(edge)
    waiting, queued = deque(range(instance.num_edges)), np.ones(instance.num_edges, dtype=bool)
    while waiting:
        edge = waiting.popleft()
        queued[edge] = False
        one, other = instance.edges_E[edge].tolist()
        for node, partner, table in ((one, other, allowed[edge]), (other, one, allowed[edge].T)):
            left = alive[node] & (table & alive[partner]).any(axis=1)
            if not left.any():
                return [
                    f"node {node} has no strategy left: each of its {len(left)} is forbidden by its cost or by "
                    f"edges, the last by edge {edge} to node {partner}"
                ]
            if np.count_nonzero(left) < np.count_nonzero(alive[node]):
                alive[node] = left
                again = [e for e in around[node] if not queued[e]]
                queued[again] = True
                waiting.extend(again)
    return []
