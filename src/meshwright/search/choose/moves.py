"""What changes when one node takes another strategy: the flat arrays that loops over single moves read.

Legend: N nodes, C strategies of all nodes, X ends of edges (two for each edge, node by node), M matrix entries, H
(node, usage) pairs, node by node, U usages, T times at which memory can bind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from meshwright.choice import Array
from meshwright.search.choose.times import Timeline

#: From so many matrix entries or moves on, loops run compiled; below, loading the compiler takes longer than the loops.
COMPILE_FROM = 30_000


@dataclass(frozen=True, eq=False)
class Moves:
    """Neighbours and usages of each node.

    Ends `near_first_N[n]` up to `near_first_N[n + 1]` are those of node n: with n at strategy s and `near_X` at t the
    edge costs `matrix_M[base_X + s * own_X + t * far_X]`. `held_H[held_first_N[n]:...]` are the usages of node n.
    """

    line: Timeline
    near_first_N: Array
    near_X: Array
    base_X: Array
    own_X: Array
    far_X: Array
    held_first_N: Array
    held_H: Array

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What the loops take, in their order of arguments."""
        line, instance = self.line, self.line.instance
        return (
            instance.first_N,
            instance.cost_C,
            self.near_first_N,
            self.near_X,
            self.base_X,
            self.own_X,
            self.far_X,
            instance.matrix_M,
            self.held_first_N,
            self.held_H,
            line.first_U,
            line.stop_U,
            instance.usage_first_U,
            instance.usage_V,
        )

    def loop(self, plain: Callable[..., Any], moves: int = 0) -> Callable[..., Any]:
        """A loop as it is where there is little to do, compiled for large instances and for many moves."""
        return compiled(plain) if max(len(self.line.instance.matrix_M), moves) > COMPILE_FROM else plain


@cache
def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as machine code."""
    import numba  # here: half a second that small work does not need

    fast: Callable[..., Any] = numba.njit(cache=True)(plain)
    return fast


def moves_of(line: Timeline) -> Moves:
    """Neighbours and usages of each node of a timeline's instance."""
    instance = line.instance
    one, other = instance.edges_E[:, 0], instance.edges_E[:, 1]
    columns, ones = instance.num_strategies_N[other], np.ones(instance.num_edges, dtype=np.int64)
    here, base = np.concatenate([one, other]), np.tile(instance.matrix_first_E[:-1], 2)
    order = np.argsort(here, kind="stable")
    by_node = np.argsort(instance.usage_node_U, kind="stable")
    nodes = np.arange(instance.num_nodes + 1)
    return Moves(
        line=line,
        near_first_N=np.searchsorted(here[order], nodes),
        near_X=np.concatenate([other, one])[order],
        base_X=base[order],
        own_X=np.concatenate([columns, ones])[order],
        far_X=np.concatenate([ones, columns])[order],
        held_first_N=np.searchsorted(instance.usage_node_U[by_node], nodes),
        held_H=by_node,
    )
