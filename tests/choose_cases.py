"""Random instances of the choice problem for tests of solvers, and their optimum found in the plainest way."""

from __future__ import annotations

import itertools
import math

import numpy as np

from meshwright.choice import Instance, Usage, cost_of, instance_of, is_legal
from meshwright.search.choose.solver import Solved

#: An instance has at most so many choices, so that trying all of them in plain Python takes milliseconds.
MOST_CHOICES = 4000


def random_instance(
    rng: np.random.Generator,
    max_nodes: int = 8,
    *,
    with_memory: bool = False,
    with_infinities: bool = True,
) -> Instance:
    """An instance of 1 to `max_nodes` nodes with whole costs and usages, so that sums of them are exact.

    Some nodes have one strategy, some no edge, some several intervals or an empty one; some edges are parallel, some
    have a row (or all) infinite; with memory the limit often binds, and sometimes nothing fits.
    """
    num_nodes = int(rng.integers(1, max_nodes + 1))
    sizes = rng.integers(1, 6, size=num_nodes)
    while sizes.prod() > MOST_CHOICES:
        sizes[sizes.argmax()] -= 1
    largest = int(rng.choice([3, 20, 1000]))  # few values make ties
    costs = [_entries(rng, (size,), largest, 0.05 if with_infinities else 0.0) for size in sizes]
    pairs = list(itertools.combinations(range(num_nodes), 2))
    density = float(rng.choice([0.0, 0.3, 0.6, 1.0]))
    chosen = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs if rng.random() < density]
    chosen += [pair if rng.random() < 0.5 else pair[::-1] for pair in chosen if rng.random() < 0.15]
    share = float(rng.choice([0.0, 0.2, 0.5])) if with_infinities else 0.0
    edges = [(one, other, _entries(rng, (sizes[one], sizes[other]), largest, share)) for one, other in chosen]
    name = f"{num_nodes} nodes, {len(edges)} edges"
    if not with_memory:
        return instance_of(costs, edges, name=name)
    usages = [_usage(rng, node, int(sizes[node])) for node in range(num_nodes) for _ in range(int(rng.integers(0, 3)))]
    return instance_of(costs, edges, usages, limit=_limit(rng, usages), name=name)


def _entries(rng: np.random.Generator, shape: tuple[int, ...], largest: int, share: float) -> np.ndarray:
    values = rng.integers(0, largest + 1, size=shape).astype(float)
    values[rng.random(shape) < share] = math.inf
    return values


def _usage(rng: np.random.Generator, node: int, size: int) -> Usage:
    start = int(rng.integers(0, 10))
    return Usage(node, start, start + int(rng.integers(0, 6)), rng.integers(0, 12, size=size).astype(float))


def _limit(rng: np.random.Generator, usages: list[Usage]) -> float:
    """Between the least and the most that can be in use, a little below or above at times."""
    lowest, highest = (
        max((sum(f(u.amounts) for u in usages if u.start <= t < u.stop) for t in range(16)), default=0.0)
        for f in (min, max)
    )
    return float(max(0, round(lowest + rng.uniform(-0.1, 1.1) * (highest - lowest))))


def brute_force(instance: Instance) -> Solved:
    """The optimum by trying every choice, on plain lists; of several cheapest the first in lexicographic order."""
    costs = [instance.costs(node).tolist() for node in range(instance.num_nodes)]
    edges = [(*map(int, ends), instance.matrix(e).tolist()) for e, ends in enumerate(instance.edges_E)]
    usages = [
        (int(node), *map(int, interval), instance.usage(u).tolist())
        for u, (node, interval) in enumerate(zip(instance.usage_node_U, instance.intervals_U, strict=True))
    ]
    # Usage rises only where an interval starts.
    alive = [[(node, row) for node, a, b, row in usages if a <= t < b] for t in sorted({u[1] for u in usages})]
    best, best_choice = math.inf, None
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[s] for row, s in zip(costs, choice, strict=True))
        cost += sum(matrix[choice[one]][choice[other]] for one, other, matrix in edges)
        if cost < best and all(sum(row[choice[node]] for node, row in now) <= instance.limit for now in alive):
            best, best_choice = cost, choice
    if best_choice is None:
        return Solved(None, math.inf, math.inf, ("no choice is legal",))
    return Solved(np.array(best_choice, dtype=np.int64), best, best)


def check_solved(instance: Instance, solved: Solved, optimum: float) -> None:
    """What every solver's answer must fulfil: a legal choice with the cost it says, a bound not above the optimum."""
    tolerance = 1e-9 * max(1.0, abs(optimum)) if math.isfinite(optimum) else 0.0
    if solved.choice_N is None:
        assert solved.cost == math.inf
    else:
        assert is_legal(instance, solved.choice_N), "illegal"
        assert solved.cost == cost_of(instance, solved.choice_N)
        assert solved.cost >= optimum - tolerance
    assert solved.lower_bound <= optimum + tolerance, (solved.lower_bound, optimum)
    if solved.is_infeasible:
        assert solved.reasons
