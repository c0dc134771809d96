"""The edges of an instance seen from each node, and the two sides of a space: operators, and what lies at rest.

Operators meet directly or at a tensor at rest; tensors at rest meet operators alone (training state aside, which these
methods leave with its parameter). So once all operators are split, each tensor at rest has its best placement by
itself, and a method that changes one operator changes few of these.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.search.operators import OperatorSpace


def wiring(instance: Instance) -> list[dict[int, Array]]:
    """Of each node its neighbours, each with the costs of the edge: a row for each own strategy."""
    found: list[dict[int, Array]] = [defaultdict(lambda: np.zeros(1)) for _ in range(instance.num_nodes)]
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        matrix = instance.matrix(edge)
        found[one][other] = found[one][other] + matrix
        found[other][one] = found[other][one] + matrix.T
    return [dict(sorted(near.items())) for near in found]


@dataclass(frozen=True, eq=False)
class Sides:
    """Operators and tensors at rest by number; `near[n]` are the neighbours of node n as in `wiring`."""

    operators: tuple[int, ...]
    resting: tuple[int, ...]
    near: list[dict[int, Array]]


def sides_of(space: OperatorSpace) -> Sides:
    """The two sides of a space without nodes for training state."""
    assert all(node.kind != "state" for node in space.nodes)
    kinds = [node.kind == "operator" for node in space.nodes]
    operators = tuple(number for number, is_operator in enumerate(kinds) if is_operator)
    resting = tuple(number for number, is_operator in enumerate(kinds) if not is_operator)
    return Sides(operators, resting, wiring(space.instance))
