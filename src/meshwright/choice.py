"""The problem under every placement: choose one strategy for each node.

A node's strategy costs something, each edge costs what the strategies of its two ends say together (a redistribution,
say), and some strategies use memory during an interval of time, of which at no time more than a limit may be in use.
Operator graphs become instances of it (`search.operators`), and so do the files of the ASPLOS/EuroSys 2025 contest on
intra-operator parallelism (`io.contest`). In other fields it is a pairwise graphical model or a weighted constraint
satisfaction problem; with usages it is a multi-dimensional knapsack too.

Arrays are flat, since instances have up to 10^5 nodes. Legend of the suffixes: N nodes, C strategies of all nodes, E
edges, M entries of all matrices, U usages (a node may have several: one for each interval), V entries of all usages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Instance:
    """See the module's docstring.

    `cost_C[first_N[n] : first_N[n + 1]]` are the costs of node n's strategies; infinity forbids one. The matrix of edge
    e, rows for the strategies of `edges_E[e, 0]`, stands row-major in `matrix_M[matrix_first_E[e] : ...]`. Usage u of
    node `usage_node_U[u]` holds in the half-open interval `intervals_U[u]` what `usage_V[usage_first_U[u] : ...]` says
    of each strategy. Edges may be parallel; no edge joins a node to itself. Usages are not negative.
    """

    name: str
    first_N: Array
    cost_C: Array
    edges_E: Array
    matrix_first_E: Array
    matrix_M: Array
    usage_node_U: Array
    intervals_U: Array
    usage_first_U: Array
    usage_V: Array
    limit: float = math.inf

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return len(self.first_N) - 1

    @property
    def num_edges(self) -> int:
        """Edges."""
        return len(self.edges_E)

    @cached_property
    def num_strategies_N(self) -> Array:
        """Strategies of each node."""
        return np.diff(self.first_N)

    def costs(self, node: int) -> Array:
        """Costs of the strategies of a node."""
        return self.cost_C[self.first_N[node] : self.first_N[node + 1]]

    def matrix(self, edge: int) -> Array:
        """Costs of an edge: a row for each strategy of its first end, a column for each of its second."""
        one, other = self.num_strategies_N[self.edges_E[edge]]
        return self.matrix_M[self.matrix_first_E[edge] : self.matrix_first_E[edge + 1]].reshape(one, other)

    def usage(self, index: int) -> Array:
        """What each strategy of the node `usage_node_U[index]` uses during `intervals_U[index]`."""
        return self.usage_V[self.usage_first_U[index] : self.usage_first_U[index + 1]]


@dataclass(frozen=True)
class Usage:
    """What each strategy of a node uses at the times `start` up to, not including, `stop`."""

    node: int
    start: int
    stop: int
    amounts: Sequence[float] | Array


def instance_of(
    costs: Sequence[Sequence[float] | Array],
    edges: Iterable[tuple[int, int, Any]] = (),
    usages: Iterable[Usage] = (),
    limit: float = math.inf,
    name: str = "",
) -> Instance:
    """An instance from lists: costs of each node, edges (one end, other end, matrix), usages.

    >>> instance = instance_of([[1, 2], [0, 5]], [(0, 1, [[9, 0], [0, 9]])])
    >>> cost_of(instance, np.array([1, 0]))
    2.0
    """
    edges, usages = list(edges), list(usages)
    return Instance(
        name=name,
        first_N=_offsets(len(row) for row in costs),
        cost_C=_flat(costs),
        edges_E=np.array([(one, other) for one, other, _ in edges], dtype=np.int64).reshape(-1, 2),
        matrix_first_E=_offsets(np.size(matrix) for _, _, matrix in edges),
        matrix_M=_flat([np.ravel(matrix) for _, _, matrix in edges]),
        usage_node_U=np.array([usage.node for usage in usages], dtype=np.int64),
        intervals_U=np.array([(usage.start, usage.stop) for usage in usages], dtype=np.int64).reshape(-1, 2),
        usage_first_U=_offsets(len(usage.amounts) for usage in usages),
        usage_V=_flat([usage.amounts for usage in usages]),
        limit=limit,
    )


def _offsets(lengths: Iterable[int]) -> Array:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64), dtype=np.int64)])


def _flat(rows: Sequence[Any]) -> Array:
    return np.concatenate([np.asarray(row, dtype=float) for row in rows]) if len(rows) else np.zeros(0)


def cost_of(instance: Instance, choice_N: Array) -> float:
    """What a choice costs: its strategies' costs and those of the edges between them; infinite where one is forbidden.

    `choice_N` is the index of each node's strategy among that node's."""
    nodes = instance.cost_C[instance.first_N[:-1] + choice_N]
    one, other = instance.edges_E[:, 0], instance.edges_E[:, 1]
    columns = instance.num_strategies_N[other]
    edges = instance.matrix_M[instance.matrix_first_E[:-1] + choice_N[one] * columns + choice_N[other]]
    return float(nodes.sum() + edges.sum())


def usage_at(instance: Instance, choice_N: Array) -> tuple[Array, Array]:
    """Times at which usage changes, in order, and what is in use from each of them to the next."""
    amounts = instance.usage_V[instance.usage_first_U[:-1] + choice_N[instance.usage_node_U]]
    return summed_over_time(instance.intervals_U, amounts)


def summed_over_time(intervals_U: Array, amounts_U: Array) -> tuple[Array, Array]:
    """Times at which a sum of amounts, each held during a half-open interval, changes, and the sum from each on."""
    lasting = intervals_U[:, 0] < intervals_U[:, 1]  # an empty interval holds nothing at any time
    starts, stops, amounts = intervals_U[lasting, 0], intervals_U[lasting, 1], amounts_U[lasting]
    times, index = np.unique(np.concatenate([starts, stops]), return_inverse=True)
    steps = np.bincount(index, np.concatenate([amounts, -amounts]), minlength=len(times))
    return times, np.cumsum(steps)


def peak_of(instance: Instance, choice_N: Array) -> float:
    """The most that is in use at any time."""
    return float(usage_at(instance, choice_N)[1].max(initial=0.0))


def is_legal(instance: Instance, choice_N: Array) -> bool:
    """Whether a choice forbids nothing and stays within the limit (up to rounding of sums)."""
    return math.isfinite(cost_of(instance, choice_N)) and peak_of(instance, choice_N) <= instance.limit * (1 + 1e-12)
