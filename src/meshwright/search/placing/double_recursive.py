"""Double recursive partitioning: the mesh is divided step by step, and at each step every operator picks one dim.

H. Wang, C. Li, T. Tachon, H. Wang, S. Yang, S. Limet, S. Robert, "Efficient and Systematic Partitioning of Large and
Deep Neural Networks for Parallelization", Euro-Par 2021. Two recursions: the outer one divides the devices in two until
each part is one device; within it the inner one goes through the operators and gives each the dim whose halving costs
least beside those that have theirs. What was decided stays, so the search takes (divisions x operators x dims) steps.

It minimises time alone and gives no bound. What we implement, and where it may differ from the paper's:
- a division is an axis of the mesh, the outermost first; on a mesh whose axes all have two devices it is the paper's;
- operators come heaviest first (their time undivided);
- the cost of a pick is the operator's own seconds and those of the redistributions to operators that have picked, with
  tensors at rest between them, and parameters, where they cost least; the paper counts bytes by symbols;
- at the end what lies at rest is chosen exactly for these operators and within memory, of which the paper says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.search.operators import OperatorSpace
from meshwright.search.placing.answer import Found, Posed, choice_of
from meshwright.search.placing.narrow import settled
from meshwright.search.placing.wiring import Sides, sides_of

WHOLE = 0  # what it means in the codes of every node that an axis does not cut it


def divide(posed: Posed) -> Found:
    """Splits of operators by repeated division, and the best at rest for them."""
    space = posed.space()
    sides = sides_of(space)
    splits_N = divided(space, sides)
    solved = settled(space.instance, sides.operators, splits_N, posed.deadline)
    number = sum(len(space.nodes[node].codes_CA) for node in sides.operators)
    statement = f"{len(space.order)} divisions of {len(sides.operators)} operators by time alone; no bound"
    return choice_of(posed, space, solved.choice_N, statement, num_looked_at=number, reasons=solved.reasons)


def divided(space: OperatorSpace, sides: Sides) -> Array:
    """The split of every operator (of what lies at rest it says nothing)."""
    instance = space.instance
    codes = [node.codes_CA for node in space.nodes]
    picked_N = np.array([_whole_row(own) for own in codes], dtype=np.int64)
    weight = {node: float(instance.costs(node)[picked_N[node]]) for node in sides.operators}
    heaviest_first = sorted(sides.operators, key=lambda node: -weight[node])
    for axis in range(len(space.order)):
        # Of what lies at rest, the placements that further divisions have no part in.
        open_rows = {node: np.flatnonzero((codes[node][:, axis + 1 :] == WHOLE).all(axis=1)) for node in sides.resting}
        beside = {node: instance.costs(node)[rows].copy() for node, rows in open_rows.items()}
        done: dict[int, int] = {}
        for node in heaviest_first:
            own = codes[node]
            rows = np.flatnonzero(
                (own[:, :axis] == own[picked_N[node], :axis]).all(axis=1) & (own[:, axis + 1 :] == WHOLE).all(axis=1)
            )
            cost_S = _costs(instance, sides.near[node], node, rows, done, beside, open_rows)
            done[node] = int(rows[cost_S.argmin()])
            for other in sides.near[node].keys() & beside.keys():
                beside[other] += sides.near[node][other][done[node], open_rows[other]]
        for node, row in done.items():
            picked_N[node] = row
    return picked_N


def _whole_row(codes_CA: Array) -> int:
    return int(np.flatnonzero((codes_CA == WHOLE).all(axis=1))[0])


def _costs(
    instance: Instance,
    near: Mapping[int, Array],
    node: int,
    rows: Array,
    done: Mapping[int, int],
    beside: Mapping[int, Array],
    open_rows: Mapping[int, Array],
) -> Array:
    """What each of the rows of an operator costs beside those that have picked."""
    cost_S = instance.costs(node)[rows].copy()
    for other, matrix in near.items():
        if other in beside:
            cost_S += (matrix[np.ix_(rows, open_rows[other])] + beside[other]).min(axis=1)
        elif other in done:
            cost_S += matrix[rows, done[other]]
    return cost_S
