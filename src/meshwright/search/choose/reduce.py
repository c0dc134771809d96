"""Smaller instances with the same optimum, memory included.

In turn, until nothing changes (each step keeps at least one optimum):

- strategies go that are forbidden, that have no partner on some edge (arc consistency), or whose usage does not fit;
- a node whose strategy follows from a neighbour's (each row of the edge has one finite entry) is merged into it, with
  its costs, edges and usages: most nodes of an operator graph are such followers;
- nodes with one strategy become constants; parallel edges are added up; edges m[i][j] = r[i] + s[j] become node costs;
- strategies go that another one replaces at no more cost and usage (Goldstein 1994, "Efficient rotamer elimination");
- what is used whatever is chosen becomes a base load, and of the times only those remain at which the limit can be
  broken and that are not outdone by a neighbouring time.

Node 0 of the reduced instance is the constant: one strategy, which costs and uses what is always spent.
Legend beside `choice`'s: T times that remain, X ends of edges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.search.choose import reduce_loops as loops
from meshwright.search.choose.times import ROUNDING

#: Rounds of all steps; on the contest's instances nothing changes after eight or so.
MOST_ROUNDS = 40

#: Comparing all strategies of one node may take this many steps (a tenth of a second).
MOST_WORK = 1e8


@dataclass(frozen=True, eq=False)
class Level:
    """One merging: node n of the larger instance follows node `leader_N[n]` of the smaller, and takes strategy
    `map_V[map_first_N[n] + s]` where that takes s."""

    leader_N: Array
    map_first_N: Array
    map_V: Array

    def restore(self, choice: Array) -> Array:
        """The choice of the larger instance."""
        restored: Array = self.map_V[self.map_first_N[:-1] + choice[self.leader_N]]
        return restored


@dataclass(frozen=True, eq=False)
class Reduced:
    """An instance and its way back; `infeasible` where the reductions left a node without a strategy."""

    instance: Instance
    levels: tuple[Level, ...]
    infeasible: bool = False

    def restore(self, choice: Array) -> Array:
        """The choice of the original instance that costs the same and uses no more than the limit."""
        for level in reversed(self.levels):
            choice = level.restore(choice)
        return choice


@dataclass(frozen=True, eq=False)
class _Load:
    """What is used whatever is chosen: `amount_B` during `intervals_B`."""

    intervals_B: Array
    amount_B: Array


@dataclass(frozen=True, eq=False)
class Ends:
    """The edges at each node, as the loops walk them."""

    near_first_N: Array
    near_edge_X: Array
    near_side_X: Array


def ends_of(instance: Instance) -> Ends:
    """The edges at each node."""
    nodes = instance.edges_E.T.ravel()
    order = np.argsort(nodes, kind="stable")
    edges, num = np.tile(np.arange(instance.num_edges), 2), instance.num_edges
    first = np.searchsorted(nodes[order], np.arange(instance.num_nodes + 1))
    return Ends(first, edges[order], (order >= num).astype(np.int64))


def reduced(instance: Instance, alive_C: Array | None = None) -> Reduced:
    """The reduced instance; of the strategies only those in `alive_C`, where given, are looked at.

    >>> from meshwright.choice import instance_of
    >>> chain = instance_of([[1, 2], [0, 5], [9, 3]], [(0, 1, [[0, 9], [9, 0]]), (1, 2, [[0, 0], [0, 0]])])
    >>> small = reduced(chain)
    >>> small.instance.num_nodes, small.instance.cost_C, small.restore(np.array([0]))
    (1, array([4.]), array([0, 0, 1]))
    """
    original = instance
    limit = instance.limit * (1 + ROUNDING)
    instance = _cleaned(instance)
    load = _Load(np.zeros((0, 2), dtype=np.int64), np.zeros(0))
    levels: list[Level] = []
    alive_C = np.isfinite(instance.cost_C) if alive_C is None else alive_C & np.isfinite(instance.cost_C)
    for round_ in range(MOST_ROUNDS):
        fits = _struck(instance, load, limit, alive_C, dominance=round_ > 0)
        if not fits:
            return Reduced(original, (), infeasible=True)
        smaller, level, load = _merged(instance, load, alive_C)
        smaller, load = _timed(smaller, load, limit)
        levels.append(level)
        done = round_ > 1 and _size(smaller) == _size(instance)
        instance = smaller
        alive_C = np.isfinite(instance.cost_C)
        if done:
            break
    if (load.amount_B > limit).any():
        return Reduced(original, (), infeasible=True)
    return Reduced(_with_load(instance, load), tuple(levels))


def _size(instance: Instance) -> tuple[int, ...]:
    finite = int(np.isfinite(instance.matrix_M).sum())
    return (instance.num_nodes, len(instance.cost_C), instance.num_edges, finite, len(instance.usage_V))


def _cleaned(instance: Instance) -> Instance:
    """Without usages of empty intervals, in the types that the loops are compiled for."""
    lasting = instance.intervals_U[:, 0] < instance.intervals_U[:, 1]
    lasting &= np.isfinite(instance.limit)
    lengths = np.diff(instance.usage_first_U)
    return replace(
        instance,
        first_N=np.ascontiguousarray(instance.first_N, dtype=np.int64),
        cost_C=np.ascontiguousarray(instance.cost_C, dtype=np.float64),
        edges_E=np.ascontiguousarray(instance.edges_E, dtype=np.int64),
        matrix_first_E=np.ascontiguousarray(instance.matrix_first_E, dtype=np.int64),
        matrix_M=np.ascontiguousarray(instance.matrix_M, dtype=np.float64),
        usage_node_U=np.ascontiguousarray(instance.usage_node_U[lasting], dtype=np.int64),
        intervals_U=np.ascontiguousarray(instance.intervals_U[lasting], dtype=np.int64),
        usage_first_U=_firsts(lengths[lasting]),
        usage_V=np.ascontiguousarray(instance.usage_V[np.repeat(lasting, lengths)], dtype=np.float64),
    )


def _firsts(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


# --- strategies that go ---------------------------------------------------------------------------------------------


def _struck(instance: Instance, load: _Load, limit: float, alive_C: Array, *, dominance: bool) -> bool:
    """Strike strategies out of `alive_C` (in place); whether every node keeps one."""
    if instance.num_nodes and not np.logical_or.reduceat(alive_C, instance.first_N[:-1]).all():
        return False
    if len(instance.usage_node_U) and len(load.intervals_B) and _is_timed(load):
        starts, stops = (np.ascontiguousarray(instance.intervals_U[:, side]) for side in (0, 1))
        owner = instance.first_N[:-1][instance.usage_node_U]
        loops.too_much(
            starts, stops, load.amount_B, limit, owner, instance.usage_first_U, instance.usage_V, alive_C
        )  # fmt: skip
        if not np.logical_or.reduceat(alive_C, instance.first_N[:-1]).all():
            return False
    ends = ends_of(instance)
    edges = (instance.edges_E, instance.matrix_first_E, instance.matrix_M)
    waiting, queued = np.zeros(instance.num_edges, dtype=np.int64), np.zeros(instance.num_edges, dtype=np.bool_)
    near = (ends.near_first_N, ends.near_edge_X)
    if loops.consistent(instance.first_N, *edges, *near, alive_C, waiting, queued) >= 0:
        return False
    if dominance:
        nodes = np.arange(instance.num_nodes + 1)
        held_first_N = np.searchsorted(instance.usage_node_U, nodes)  # usages stand node by node after a merging
        loops.dominated(
            instance.first_N, instance.cost_C, *edges, *near, ends.near_side_X, held_first_N, instance.usage_first_U,
            instance.usage_V, alive_C, np.zeros(2 * instance.num_edges), MOST_WORK,
        )  # fmt: skip
        # Without a strategy that it was the only partner of, others may stand alone now.
        return bool(loops.consistent(instance.first_N, *edges, *near, alive_C, waiting, queued) < 0)
    return True


# --- followers ------------------------------------------------------------------------------------------------------


def _merged(instance: Instance, load: _Load, alive_C: Array) -> tuple[Instance, Level, _Load]:
    """The instance with every follower merged into its leader, and node 0 for all that has no choice."""
    first_N, edges = instance.first_N, (instance.edges_E, instance.matrix_first_E, instance.matrix_M)
    size_N = np.add.reduceat(alive_C, first_N[:-1], dtype=np.int64) if instance.num_nodes else np.zeros(0, dtype=int)
    determines_E2 = np.zeros((instance.num_edges, 2), dtype=np.bool_)
    loops.determining(first_N, *edges, alive_C, determines_E2)
    order_N, parent_edge_N, root_N = _forest(instance.edges_E, size_N, determines_E2)
    length_N = size_N[root_N]
    map_first_N = _firsts(length_N)
    map_V = np.zeros(map_first_N[-1], dtype=np.int64)
    loops.followers(first_N, *edges, alive_C, order_N, parent_edge_N, map_first_N, map_V)
    # Node 0 leads all nodes of one strategy; the others are numbered in the order in which they stood.
    leads_N = (root_N == np.arange(len(root_N))) & (size_N > 1)
    number_N = np.cumsum(leads_N) * leads_N
    leader_N = np.where(length_N == 1, 0, number_N[root_N])
    new_first_N = _firsts(np.concatenate([[1], size_N[leads_N]]))
    smaller = _joined(instance, leader_N, map_first_N, map_V, new_first_N)
    smaller, more = _with_merged_usages(instance, smaller, leader_N, map_first_N, map_V)
    load = _Load(np.concatenate([load.intervals_B, more.intervals_B]), np.concatenate([load.amount_B, more.amount_B]))
    return smaller, Level(leader_N, map_first_N, map_V), load


def _forest(edges_E: Array, size_N: Array, determines_E2: Array) -> tuple[Array, Array, Array]:
    """Whom each node follows: nodes in an order that has leaders first, the edge to the one that each follows (-1:
    none), and the leader at the end of that chain.

    Nodes that determine each other (so have as many strategies) form a component; one that a node of more strategies
    determines too hangs on that, on the smallest such.
    """
    many_E2 = size_N[edges_E] > 1
    mutual_E = determines_E2.all(axis=1) & many_E2.all(axis=1)
    around: dict[int, list[tuple[int, int]]] = {}
    for edge, one, other in zip(
        np.flatnonzero(mutual_E).tolist(), *edges_E[mutual_E].T.tolist(), strict=True
    ):  # fmt: skip
        around.setdefault(one, []).append((other, edge))
        around.setdefault(other, []).append((one, edge))
    component = _components(len(size_N), around)
    entry: dict[int, tuple[int, int, int]] = {}  # of a component: strategies of the determiner, edge, node determined
    for side in (0, 1):
        one_way = np.flatnonzero(determines_E2[:, side] & ~mutual_E & many_E2.all(axis=1))
        sizes = size_N[edges_E[one_way, side]].tolist()
        for edge, size, node in zip(one_way.tolist(), sizes, edges_E[one_way, 1 - side].tolist(), strict=True):
            found = (size, edge, node)
            if found < entry.get(component[node], (size + 1, 0, 0)):
                entry[component[node]] = found
    order: list[int] = []
    parent_edge, root = [-1] * len(size_N), list(range(len(size_N)))
    edges = edges_E.tolist()
    members: dict[int, int] = dict.fromkeys(component, 0)
    for first in sorted(members, key=lambda node: (-int(size_N[node]), node)):
        start = first
        if first in entry:
            _, edge, start = entry[first]
            parent_edge[start] = edge
            parent = edges[edge][0] if edges[edge][1] == start else edges[edge][1]
            root[start] = root[parent]
        stack, seen = [start], {start}
        while stack:
            node = stack.pop()
            order.append(node)
            for other, edge in around.get(node, ()):
                if other not in seen:
                    seen.add(other)
                    parent_edge[other], root[other] = edge, root[start]
                    stack.append(other)
    return np.array(order, dtype=np.int64), np.array(parent_edge, dtype=np.int64), np.array(root, dtype=np.int64)


def _components(num_nodes: int, around: dict[int, list[tuple[int, int]]]) -> list[int]:
    """For each node the first node that it is connected with."""
    component = [-1] * num_nodes
    for first in range(num_nodes):
        if component[first] >= 0:
            continue
        component[first] = first
        stack = [first] if first in around else []
        while stack:
            for other, _ in around[stack.pop()]:
                if component[other] < 0:
                    component[other] = first
                    stack.append(other)
    return component


def _joined(instance: Instance, leader_N: Array, map_first_N: Array, map_V: Array, new_first_N: Array) -> Instance:
    """Costs and edges of the leaders."""
    joined_E2 = leader_N[instance.edges_E]
    inside_E = joined_E2[:, 0] == joined_E2[:, 1]
    turned_E = joined_E2[:, 0] > joined_E2[:, 1]
    num = len(new_first_N) - 1
    keys, index = np.unique(np.sort(joined_E2[~inside_E], axis=1) @ [num, 1], return_inverse=True)
    pair_E = np.full(instance.num_edges, -1, dtype=np.int64)
    pair_E[~inside_E] = index
    ends = np.stack([keys // num, keys % num], axis=1).astype(np.int64)
    sizes = np.diff(new_first_N)
    matrix_first = _firsts(sizes[ends].prod(axis=1))
    cost_C, matrix_M = np.zeros(new_first_N[-1]), np.zeros(matrix_first[-1])
    loops.merged(
        instance.first_N, instance.cost_C, instance.edges_E, instance.matrix_first_E, instance.matrix_M, leader_N,
        map_first_N, map_V, pair_E, turned_E, new_first_N, cost_C, matrix_first, matrix_M,
    )  # fmt: skip
    kept = np.zeros(len(ends), dtype=np.bool_)
    loops.separable(new_first_N, cost_C, ends, matrix_first, matrix_M, kept)
    return replace(
        instance,
        first_N=new_first_N,
        cost_C=cost_C,
        edges_E=np.ascontiguousarray(ends[kept]),
        matrix_first_E=_firsts(np.diff(matrix_first)[kept]),
        matrix_M=matrix_M[np.repeat(kept, np.diff(matrix_first))],
    )


def _with_merged_usages(
    instance: Instance, smaller: Instance, leader_N: Array, map_first_N: Array, map_V: Array
) -> tuple[Instance, _Load]:
    """Usages of the leaders, node by node, without those that do not depend on the choice: they are the load."""
    keys = np.column_stack([leader_N[instance.usage_node_U], instance.intervals_U])
    groups, group_U = np.unique(keys, axis=0, return_inverse=True)
    first = _firsts(smaller.num_strategies_N[groups[:, 0]])
    values, least = np.zeros(first[-1]), np.zeros(len(groups))
    loops.merged_usages(
        map_first_N, map_V, instance.usage_node_U, instance.usage_first_U, instance.usage_V,
        group_U.ravel().astype(np.int64), first, values, least,
    )  # fmt: skip
    kept = np.maximum.reduceat(values, first[:-1]) > 0 if len(groups) else np.zeros(0, dtype=np.bool_)
    lengths = np.diff(first)
    with_usages = replace(
        smaller,
        usage_node_U=np.ascontiguousarray(groups[kept, 0]),
        intervals_U=np.ascontiguousarray(groups[kept, 1:]),
        usage_first_U=_firsts(lengths[kept]),
        usage_V=values[np.repeat(kept, lengths)],
    )
    return with_usages, _Load(groups[least > 0, 1:], least[least > 0])


# --- times ----------------------------------------------------------------------------------------------------------


def _is_timed(load: _Load) -> bool:
    """Whether the load stands time by time: entry t holds during [t, t + 1)."""
    return bool((load.intervals_B[:, 0] == np.arange(len(load.intervals_B))).all())


def _timed(instance: Instance, load: _Load, limit: float) -> tuple[Instance, _Load]:
    """The same on a time axis of the times that can matter, with the load time by time."""
    if not np.isfinite(limit):
        return instance, load
    starts, stops = instance.intervals_U.T
    times = np.unique(np.concatenate([instance.intervals_U.ravel(), load.intervals_B.ravel()]))
    rises = np.bincount(np.searchsorted(times, load.intervals_B[:, 0]), load.amount_B, minlength=len(times))
    falls = np.bincount(np.searchsorted(times, load.intervals_B[:, 1]), load.amount_B, minlength=len(times))
    base_T = np.cumsum(rises - falls)
    start_U, stop_U = np.searchsorted(times, starts), np.searchsorted(times, stops)
    most_U = (
        np.maximum.reduceat(instance.usage_V, instance.usage_first_U[:-1]) if len(start_U) else np.zeros(0)
    )  # of each the least is 0
    kept_T = _kept_times(base_T, start_U, stop_U, most_U)
    high_T = base_T + np.cumsum(
        np.bincount(start_U, most_U, minlength=len(times)) - np.bincount(stop_U, most_U, minlength=len(times))
    )
    kept_T &= high_T > limit
    before = _firsts(kept_T)
    intervals = np.stack([before[start_U], before[stop_U]], axis=1).astype(np.int64)
    remains = intervals[:, 0] < intervals[:, 1]
    lengths = np.diff(instance.usage_first_U)
    num = int(before[-1])
    timed = replace(
        instance,
        usage_node_U=instance.usage_node_U[remains],
        intervals_U=np.ascontiguousarray(intervals[remains]),
        usage_first_U=_firsts(lengths[remains]),
        usage_V=instance.usage_V[np.repeat(remains, lengths)],
    )
    at = np.arange(num, dtype=np.int64)
    return timed, _Load(np.stack([at, at + 1], axis=1), base_T[kept_T])


def _kept_times(base_T: Array, start_U: Array, stop_U: Array, most_U: Array) -> Array:
    """Times that are not outdone by a neighbour, and by those that remain, until none is."""
    kept = np.arange(len(base_T))
    dropped = 1
    while dropped and len(kept):
        before = np.searchsorted(kept, start_U), np.searchsorted(kept, stop_U)
        alive = before[0] < before[1]
        start, stop, most = before[0][alive], before[1][alive], most_U[alive]
        by_start, by_stop = np.argsort(start, kind="stable"), np.argsort(stop, kind="stable")
        index = np.arange(len(kept) + 1)
        stays = np.ones(len(kept), dtype=np.bool_)
        dropped = loops.outdone_times(
            base_T[kept], most, np.searchsorted(start[by_start], index), by_start,
            np.searchsorted(stop[by_stop], index), by_stop, start, stays,
        )  # fmt: skip
        kept = kept[stays]
    mask = np.zeros(len(base_T), dtype=np.bool_)
    mask[kept] = True
    return mask


def _with_load(instance: Instance, load: _Load) -> Instance:
    """The load as usages of node 0."""
    num = len(load.amount_B)
    if not num:
        return instance
    return replace(
        instance,
        usage_node_U=np.concatenate([np.zeros(num, dtype=np.int64), instance.usage_node_U]),
        intervals_U=np.concatenate([load.intervals_B, instance.intervals_U]),
        usage_first_U=np.concatenate([np.arange(num), num + instance.usage_first_U]),
        usage_V=np.concatenate([load.amount_B, instance.usage_V]),
    )
