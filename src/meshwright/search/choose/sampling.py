"""Random choices: the baseline that every other method has to beat.

Many choices are built at once, node by node as in `beam`, each taking any strategy that its earlier nodes and the limit
allow with equal chance. Choices that run into a dead end are lost; the cheapest of the others is the answer.
"""

from __future__ import annotations

import math

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.beam import MOST_USED, Select, building_of, built
from meshwright.search.choose.obstacles import not_found
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved

NUM_SAMPLES = 2000  # where the deadline does not end it before
AT_ONCE = 250


def _any(rng: np.random.Generator) -> Select:
    """For each partial choice one of its finite candidates, by chance; those without any are lost."""

    def select(cost_KS: Array, seen_KS: Array | None) -> tuple[Array, Array]:
        finite_KS = np.isfinite(cost_KS)
        parent_K = np.flatnonzero(finite_KS.any(axis=1))
        luck_KS = np.where(finite_KS, rng.random(cost_KS.shape), -1.0)
        return parent_K, luck_KS[parent_K].argmax(axis=1)

    return select


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The cheapest of `NUM_SAMPLES` random choices, or of those made by the deadline; without a bound."""
    rng, building, best = np.random.default_rng(seed), building_of(instance), NOTHING
    if start is not None and is_legal(instance, start):
        best = Solved(start, cost_of(instance, start), -math.inf)
    at_once = max(1, min(AT_ONCE, MOST_USED // max(1, building.line.num_times)))
    for _ in range(-(-NUM_SAMPLES // at_once)):
        choices_KN = built(building, at_once, _any(rng), deadline)
        for choice_N in () if choices_KN is None else choices_KN:
            if (cost := cost_of(instance, choice_N)) < best.cost and is_legal(instance, choice_N):
                best = Solved(choice_N, cost, -math.inf)
                if report is not None:
                    report(best)
        if deadline.passed:
            break
    if best.choice_N is None:
        return not_found(instance, deadline, "every random choice ran into a dead end")
    return best


SOLVERS.add("random", solve)
