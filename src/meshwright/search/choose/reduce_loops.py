"""The compiled loops of `reduce`: each takes and fills flat arrays, as `choice.Instance` names them.

Ends of edges are walked node by node: end x of node n, `near_first_N[n] <= x < near_first_N[n + 1]`, is edge
`near_edge_X[x]`, of which n is the first end where `near_side_X[x]` is 0.
"""

from __future__ import annotations

import math
from typing import Any

from meshwright.search.choose.compiled import compiled


@compiled
def consistent(
    first_N: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, near_first_N: Any, near_edge_X: Any, alive_C: Any,
    waiting_E: Any, queued_E: Any,
) -> Any:  # fmt: skip
    """Strike out of `alive_C` what has no partner on some edge, until all have; a node left with nothing, or -1."""
    num_edges = ends_E.shape[0]
    if num_edges == 0:
        return -1
    for e in range(num_edges):
        waiting_E[e] = e
        queued_E[e] = True
    head, count = 0, num_edges
    while count > 0:
        e = waiting_E[head]
        head = (head + 1) % num_edges
        count -= 1
        queued_E[e] = False
        for side in range(2):
            here, there = ends_E[e, side], ends_E[e, 1 - side]
            rows, columns = first_N[here + 1] - first_N[here], first_N[there + 1] - first_N[there]
            own, far = (columns, 1) if side == 0 else (1, rows)
            struck, left = False, 0
            for i in range(rows):
                if not alive_C[first_N[here] + i]:
                    continue
                found = False
                for j in range(columns):
                    if alive_C[first_N[there] + j] and matrix_M[matrix_first_E[e] + i * own + j * far] < math.inf:
                        found = True
                        break
                if found:
                    left += 1
                else:
                    alive_C[first_N[here] + i] = False
                    struck = True
            if left == 0:
                return here
            if struck:
                for x in range(near_first_N[here], near_first_N[here + 1]):
                    other = near_edge_X[x]
                    if not queued_E[other]:
                        queued_E[other] = True
                        waiting_E[(head + count) % num_edges] = other
                        count += 1
    return -1


@compiled
def determining(
    first_N: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, alive_C: Any, determines_E2: Any
) -> None:
    """Whether each strategy of an edge's end leaves exactly one strategy of the other end."""
    for e in range(ends_E.shape[0]):
        for side in range(2):
            here, there = ends_E[e, side], ends_E[e, 1 - side]
            rows, columns = first_N[here + 1] - first_N[here], first_N[there + 1] - first_N[there]
            own, far = (columns, 1) if side == 0 else (1, rows)
            one = True
            for i in range(rows):
                if not alive_C[first_N[here] + i]:
                    continue
                partners = 0
                for j in range(columns):
                    if alive_C[first_N[there] + j] and matrix_M[matrix_first_E[e] + i * own + j * far] < math.inf:
                        partners += 1
                        if partners > 1:
                            break
                if partners != 1:
                    one = False
                    break
            determines_E2[e, side] = one


@compiled
def followers(
    first_N: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, alive_C: Any, order_N: Any, parent_edge_N: Any,
    map_first_N: Any, map_V: Any,
) -> None:  # fmt: skip
    """For each strategy of a node's leader the strategy that the node then takes (-1: none), parents before children.

    A leader's own map lists its living strategies; a node with a single one has a map of that one.
    """
    for index in range(order_N.shape[0]):
        v = order_N[index]
        at = map_first_N[v]
        if parent_edge_N[v] < 0:
            for s in range(first_N[v + 1] - first_N[v]):
                if alive_C[first_N[v] + s]:
                    map_V[at] = s
                    at += 1
            continue
        e = parent_edge_N[v]
        side = 0 if ends_E[e, 0] == v else 1
        p = ends_E[e, 1 - side]
        columns = first_N[v + 1] - first_N[v]
        own, far = (first_N[p + 1] - first_N[p], 1) if side == 0 else (1, columns)
        for i in range(map_first_N[v + 1] - map_first_N[v]):
            partner = map_V[map_first_N[p] + i]
            map_V[at + i] = -1
            if partner < 0:
                continue
            for t in range(columns):
                if alive_C[first_N[v] + t] and matrix_M[matrix_first_E[e] + t * own + partner * far] < math.inf:
                    map_V[at + i] = t
                    break


@compiled
def merged(
    first_N: Any, cost_C: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, leader_N: Any, map_first_N: Any,
    map_V: Any, pair_E: Any, turned_E: Any, new_first_N: Any, new_cost_C: Any, new_matrix_first_E: Any,
    new_matrix_M: Any,
) -> None:  # fmt: skip
    """Add up the costs of all nodes and edges in those of their leaders."""
    for v in range(first_N.shape[0] - 1):
        at = new_first_N[leader_N[v]]
        for i in range(map_first_N[v + 1] - map_first_N[v]):
            s = map_V[map_first_N[v] + i]
            new_cost_C[at + i] += cost_C[first_N[v] + s] if s >= 0 else math.inf
    for e in range(ends_E.shape[0]):
        u, v = ends_E[e, 0], ends_E[e, 1]
        columns = first_N[v + 1] - first_N[v]
        num_u, num_v = map_first_N[u + 1] - map_first_N[u], map_first_N[v + 1] - map_first_N[v]
        if pair_E[e] < 0:
            at = new_first_N[leader_N[u]]
            for i in range(num_u):
                s, t = map_V[map_first_N[u] + i], map_V[map_first_N[v] + i]
                bad = s < 0 or t < 0
                new_cost_C[at + i] += math.inf if bad else matrix_M[matrix_first_E[e] + s * columns + t]
            continue
        at = new_matrix_first_E[pair_E[e]]
        own, far = (1, num_u) if turned_E[e] else (num_v, 1)
        for i in range(num_u):
            s = map_V[map_first_N[u] + i]
            for j in range(num_v):
                t = map_V[map_first_N[v] + j]
                bad = s < 0 or t < 0
                new_matrix_M[at + i * own + j * far] += (
                    math.inf if bad else matrix_M[matrix_first_E[e] + s * columns + t]
                )


@compiled
def separable(first_N: Any, cost_C: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, kept_E: Any) -> None:
    """Add edges m[i][j] = r[i] + s[j] to the costs of their ends, and mark all others as kept.

    The test is exact, for whole costs at least; of sums of floats some are kept that would not be needed.
    """
    for e in range(ends_E.shape[0]):
        u, v = ends_E[e, 0], ends_E[e, 1]
        rows, columns = first_N[u + 1] - first_N[u], first_N[v + 1] - first_N[v]
        at = matrix_first_E[e]
        corner = matrix_M[at]
        same = corner < math.inf
        for i in range(rows):
            if not same:
                break
            step = matrix_M[at + i * columns] - corner
            for j in range(columns):
                same = same and matrix_M[at + i * columns + j] == matrix_M[at + j] + step
        kept_E[e] = not same and rows > 1 and columns > 1
        if kept_E[e]:
            continue
        if columns == 1:
            for i in range(rows):
                cost_C[first_N[u] + i] += matrix_M[at + i]
        elif rows == 1:
            for j in range(columns):
                cost_C[first_N[v] + j] += matrix_M[at + j]
        else:
            for i in range(rows):
                cost_C[first_N[u] + i] += matrix_M[at + i * columns] - corner
            for j in range(columns):
                cost_C[first_N[v] + j] += matrix_M[at + j]


@compiled
def dominated(
    first_N: Any, cost_C: Any, ends_E: Any, matrix_first_E: Any, matrix_M: Any, near_first_N: Any, near_edge_X: Any,
    near_side_X: Any, held_first_N: Any, usage_first_U: Any, usage_V: Any, alive_C: Any, most_X: Any, most_work: float,
) -> Any:  # fmt: skip
    """Strike out strategies that another replaces at no more cost, whatever the neighbours take, and no more usage;
    and forbid pairs with one strategy of one neighbour where another replaces it beside that.

    Goldstein's criterion (1994): the sum over edges of the largest differences (`most_X` holds them, end by end).
    Nodes on which that takes longer than `most_work` are left as they are, and all that come after thirty times that.
    Usages stand node by node.
    """
    struck, left = 0, 30.0 * most_work
    for n in range(first_N.shape[0] - 1):
        size = first_N[n + 1] - first_N[n]
        ends = range(near_first_N[n], near_first_N[n + 1])
        width = 1
        for x in ends:
            there = ends_E[near_edge_X[x], 1 - near_side_X[x]]
            width += first_N[there + 1] - first_N[there]
        work = float(size) * size * width
        if size < 2 or work > min(most_work, left):
            continue
        left -= work
        for s in range(size):
            for t in range(size):
                if not alive_C[first_N[n] + s]:
                    break
                if t == s or not alive_C[first_N[n] + t]:
                    continue
                fits = True
                for u in range(held_first_N[n], held_first_N[n + 1]):
                    if usage_V[usage_first_U[u] + t] > usage_V[usage_first_U[u] + s]:
                        fits = False
                        break
                if not fits:
                    continue
                worse, blocked = cost_C[first_N[n] + t] - cost_C[first_N[n] + s], 0
                for x in ends:
                    e, side = near_edge_X[x], near_side_X[x]
                    there = ends_E[e, 1 - side]
                    columns = first_N[there + 1] - first_N[there]
                    own, far = (columns, 1) if side == 0 else (1, size)
                    most = -math.inf
                    for j in range(columns):
                        old = matrix_M[matrix_first_E[e] + s * own + j * far]
                        if old < math.inf and alive_C[first_N[there] + j]:
                            most = max(most, matrix_M[matrix_first_E[e] + t * own + j * far] - old)
                            if most == math.inf:
                                blocked += 1
                                break
                    most_X[x] = most
                    if most == -math.inf:  # s has no partner left: it goes by arc consistency
                        blocked = 2
                    if blocked > 1:
                        break
                    if most < math.inf:
                        worse += most
                if blocked > 1:
                    continue
                if blocked == 0 and worse <= 0.0:
                    alive_C[first_N[n] + s] = False
                    struck += 1
                    continue
                for x in ends:
                    if blocked == 1 and most_X[x] < math.inf:
                        continue
                    rest = worse - (0.0 if blocked == 1 else most_X[x])
                    e, side = near_edge_X[x], near_side_X[x]
                    there = ends_E[e, 1 - side]
                    columns = first_N[there + 1] - first_N[there]
                    own, far = (columns, 1) if side == 0 else (1, size)
                    for j in range(columns):
                        at = matrix_first_E[e] + s * own + j * far
                        new = matrix_M[matrix_first_E[e] + t * own + j * far]
                        if new < math.inf and matrix_M[at] < math.inf and new - matrix_M[at] + rest <= 0.0:
                            matrix_M[at] = math.inf
                            struck += 1
    return struck


@compiled
def merged_usages(
    map_first_N: Any, map_V: Any, node_U: Any, usage_first_U: Any, usage_V: Any, group_U: Any, new_first_U: Any,
    new_V: Any, least_U: Any,
) -> None:  # fmt: skip
    """Add up usages of one leader in one interval, and take the least of them out into `least_U`."""
    for u in range(node_U.shape[0]):
        v = node_U[u]
        at = new_first_U[group_U[u]]
        for i in range(map_first_N[v + 1] - map_first_N[v]):
            s = map_V[map_first_N[v] + i]
            if s >= 0:
                new_V[at + i] += usage_V[usage_first_U[u] + s]
    for g in range(new_first_U.shape[0] - 1):
        least = math.inf
        for i in range(new_first_U[g], new_first_U[g + 1]):
            least = min(least, new_V[i])
        for i in range(new_first_U[g], new_first_U[g + 1]):
            new_V[i] -= least
        least_U[g] = least


@compiled
def outdone_times(base_T: Any, most_U: Any, starts_first_T: Any, starts_U: Any, stops_first_T: Any, stops_U: Any,
                  start_U: Any, kept_T: Any) -> Any:  # fmt: skip
    """Mark times at which never more is in use than at the last kept time before, or at the next kept after.

    Usages `starts_U[starts_first_T[t]:...]` begin at time t, `stops_U[...]` are over at it."""
    last, dropped = -1, 0
    begun = ended = 0.0  # the most of usages that began since the last kept time, and of those ended that were alive
    for t in range(base_T.shape[0]):
        for x in range(stops_first_T[t], stops_first_T[t + 1]):
            u = stops_U[x]
            if start_U[u] <= last:
                ended += most_U[u]
            else:
                begun -= most_U[u]
        for x in range(starts_first_T[t], starts_first_T[t + 1]):
            begun += most_U[starts_U[x]]
        if last >= 0 and base_T[t] + begun <= base_T[last]:
            kept_T[t] = False
            dropped += 1
            continue
        if last >= 0 and base_T[last] + ended <= base_T[t]:
            kept_T[last] = False
            dropped += 1
        kept_T[t] = True
        last = t
        begun = ended = 0.0
    return dropped


@compiled
def too_much(
    first_U: Any, stop_U: Any, base_T: Any, limit: float, first_C_U: Any, usage_first_U: Any, usage_V: Any, alive_C: Any
) -> Any:
    """Strike out strategies that exceed the limit beside what is in use anyway."""
    struck = 0
    for u in range(first_U.shape[0]):
        highest = -math.inf
        for t in range(first_U[u], stop_U[u]):
            highest = max(highest, base_T[t])
        for i in range(usage_first_U[u + 1] - usage_first_U[u]):
            if alive_C[first_C_U[u] + i] and highest + usage_V[usage_first_U[u] + i] > limit:
                alive_C[first_C_U[u] + i] = False
                struck += 1
    return struck
