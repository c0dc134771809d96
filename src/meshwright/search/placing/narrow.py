"""Parts of a choice settled, the rest chosen best: how methods that split operators alone come to whole strategies.

Papers split operators; where tensors lie in between follows. Here a tensor at rest is a node of its own, so that those
methods choose the operators, and what lies at rest is then chosen exactly, within memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.choice import Array, Instance, Usage, cost_of, instance_of
from meshwright.search.choose.elimination import solve as eliminated
from meshwright.search.choose.obstacles import obstacles
from meshwright.search.choose.solver import NOTHING, Deadline, Solved


@dataclass(frozen=True, eq=False)
class Narrowed:
    """An instance with some of the strategies of another: `kept[n]` are those of its node n, by their numbers there."""

    instance: Instance
    kept: tuple[Array, ...]

    def restore(self, choice_N: Array) -> Array:
        """A choice of this instance as one of the other."""
        return np.array([own[s] for own, s in zip(self.kept, choice_N.tolist(), strict=True)], dtype=np.int64)


def narrowed(instance: Instance, allowed: Mapping[int, Array]) -> Narrowed:
    """The instance in which some nodes have no strategies but those allowed.

    >>> pair = instance_of([[1, 2], [0, 5]], [(0, 1, [[9, 0], [0, 9]])])
    >>> part = narrowed(pair, {0: np.array([0])})
    >>> part.instance.num_strategies_N.tolist(), part.instance.matrix(0).tolist()
    ([1, 2], [[9.0, 0.0]])
    """
    kept = tuple(allowed.get(node, np.arange(size)) for node, size in enumerate(instance.num_strategies_N.tolist()))
    own = instance_of(
        [instance.costs(node)[kept[node]] for node in range(instance.num_nodes)],
        [
            (one, other, instance.matrix(edge)[np.ix_(kept[one], kept[other])])
            for edge, (one, other) in enumerate(instance.edges_E.tolist())
        ],
        [
            Usage(node, start, stop, instance.usage(index)[kept[node]])
            for index, (node, (start, stop)) in enumerate(
                zip(instance.usage_node_U.tolist(), instance.intervals_U.tolist(), strict=True)
            )
        ],
        limit=instance.limit,
        name=instance.name,
    )
    return Narrowed(own, kept)


def completed(
    instance: Instance, allowed: Mapping[int, Array], deadline: Deadline, *, below: float = math.inf
) -> Solved:
    """The best choice with no strategies but those allowed, by elimination; nothing where none costs less than `below`.
    Its bound holds for such choices alone."""
    part = narrowed(instance, allowed)
    if reasons := obstacles(part.instance):
        return Solved(None, math.inf, math.inf, reasons)
    if math.isfinite(below):
        unlimited = eliminated(replace(part.instance, limit=math.inf), deadline)  # prices of memory take longer
        if unlimited.lower_bound >= below:
            return replace(NOTHING, lower_bound=unlimited.lower_bound, reasons=("all others are faster",))
    solved = eliminated(part.instance, deadline)
    if solved.choice_N is None:
        return solved
    choice_N = part.restore(solved.choice_N)
    return replace(solved, choice_N=choice_N, cost=cost_of(instance, choice_N))


def settled(
    instance: Instance, operators: Sequence[int], choice_N: Array, deadline: Deadline, *, below: float = math.inf
) -> Solved:
    """The operators as they are chosen, what lies at rest chosen best within memory; see `completed`."""
    return completed(instance, {node: choice_N[node : node + 1] for node in operators}, deadline, below=below)
