"""A (reduced) instance as the compiled loops of `dual` and `local` read it: finite costs, tables seen from both ends.

Legend beside `choice`'s: X ends of edges (two for each edge, node by node), G messages (an entry for each strategy of
each end's node), T times at which memory can bind, B entries of all tables (twice those of the matrices).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.search.choose.times import Timeline, timeline


class Grid(NamedTuple):
    """Flat arrays. A tuple, since compiled loops take those.

    `cost_C` and tables are what an instance's costs are above the least of their node or edge; the least add up to
    `constant`. Whatever is above the cap, infinity too, is cut to it. End x of node n is an edge to node `near_X[x]`,
    whose end of it is `twin_X[x]`; its table, with a row for each strategy of the neighbour and a column for each of n,
    starts at `table_first_X[x]`, and messages to n at `message_first_X[x]`. At time t there is room for `room_T[t]`.
    """

    first_N: Any
    cost_C: Any
    near_first_N: Any
    near_X: Any
    twin_X: Any
    table_first_X: Any
    table_B: Any
    message_first_X: Any
    held_first_N: Any
    first_U: Any
    stop_U: Any
    usage_first_U: Any
    usage_V: Any
    room_T: Any


class Scaled(NamedTuple):
    """A grid, what is left out of its costs, and the cap above which costs are cut."""

    grid: Grid
    constant: float
    cap: float


def grid_of(instance: Instance, below: float = math.inf) -> Scaled:
    """The grid of an instance whose sought choices cost at most `below`; what makes a choice dearer is cut."""
    first_N, matrix_first_E = instance.first_N, instance.matrix_first_E
    node_least = np.minimum.reduceat(instance.cost_C, first_N[:-1])
    cost_C = instance.cost_C - np.repeat(node_least, instance.num_strategies_N)
    constant = float(node_least.sum())
    matrix_M = instance.matrix_M
    if instance.num_edges:
        edge_least = np.minimum.reduceat(matrix_M, matrix_first_E[:-1])
        matrix_M = matrix_M - np.repeat(edge_least, np.diff(matrix_first_E))
        constant += float(edge_least.sum())
    dearest = max(float(values[np.isfinite(values)].max(initial=0.0)) for values in (cost_C, matrix_M))
    # Without a known choice: far above each cost, and low enough for doubles to keep the small ones beside it.
    cap = 16.0 * dearest + 1.0 if math.isinf(below) else max(below - constant, 0.0) * (1 + 1e-9) + 1.0
    line = timeline(instance)
    held, room_T = _usages(line)
    tables = _tables(instance, np.minimum(matrix_M, cap))
    return Scaled(Grid(first_N, np.minimum(cost_C, cap), *tables, *held, room_T), constant, cap)


def _tables(instance: Instance, matrix_M: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    sizes, num = instance.num_strategies_N, instance.num_edges
    nodes = instance.edges_E.T.ravel()
    order = np.argsort(nodes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(2 * num)
    entries = np.tile(np.diff(instance.matrix_first_E), 2)
    table_first = np.concatenate([[0], np.cumsum(entries[order])])
    near_X = np.roll(nodes, num)[order]
    table_B = np.empty(2 * len(matrix_M))
    first, ends = instance.matrix_first_E, instance.edges_E
    rows_M = np.repeat(sizes[ends[:, 0]], np.diff(first))
    columns_M = np.repeat(sizes[ends[:, 1]], np.diff(first))
    index_M = np.arange(len(matrix_M)) - np.repeat(first[:-1], np.diff(first))
    row_M, column_M = index_M // columns_M, index_M % columns_M
    # The second end sees the matrix as it is, the first sees it transposed.
    table_B[np.repeat(table_first[place[num:]], np.diff(first)) + index_M] = matrix_M
    table_B[np.repeat(table_first[place[:num]], np.diff(first)) + column_M * rows_M + row_M] = matrix_M
    return (
        np.searchsorted(nodes[order], np.arange(instance.num_nodes + 1)),
        near_X,
        place[(order + num) % max(2 * num, 1)],
        table_first[:-1],
        table_B,
        np.concatenate([[0], np.cumsum(sizes[nodes[order]])]),
    )


def _usages(line: Timeline) -> tuple[tuple[Array, Array, Array, Array, Array], Array]:
    """Usages of nodes with a choice, node by node, and the room that those without leave at each time."""
    instance = line.instance
    single_U = instance.num_strategies_N[instance.usage_node_U] == 1
    fixed = instance.usage_V[instance.usage_first_U[:-1]] * single_U
    room_T = line.most - line.held(fixed)
    kept = np.flatnonzero(~single_U & (line.first_U < line.stop_U))
    kept = kept[np.argsort(instance.usage_node_U[kept], kind="stable")]
    lengths = np.diff(instance.usage_first_U)[kept]
    first = np.concatenate([[0], np.cumsum(lengths)])
    take = np.repeat(instance.usage_first_U[kept] - first[:-1], lengths) + np.arange(first[-1])
    held = np.searchsorted(instance.usage_node_U[kept], np.arange(instance.num_nodes + 1))
    return (held, line.first_U[kept], line.stop_U[kept], first, instance.usage_V[take]), room_T
