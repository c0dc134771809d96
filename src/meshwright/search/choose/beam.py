"""Beam search: choices built node by node, of which only the cheapest few are kept (Lowerre 1976).

Nodes come in an order in which each has as many neighbours before it as possible. A partial choice counts what its
strategies cost, the edges between them, and for each edge to a node still to come the least that it can cost; it also
counts the least that those nodes use, and one that cannot stay within the limit is dropped. Where no limit binds, two
partial choices that agree on all nodes with neighbours still to come differ in cost alone, and the dearer is dropped: a
beam that is wide enough is dynamic programming over the order.

Legend: N nodes, S strategies of the node in turn, K partial choices, T times at which memory can bind.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.moves import moves_of
from meshwright.search.choose.obstacles import not_found
from meshwright.search.choose.repair import repaired
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import Timeline, timeline

#: Partial choices kept, from one pass to the next; a pass takes about so many times as long as the one before.
WIDTHS = (16, 128, 1024)

MOST_USED = 2**25  # entries of what each partial choice has in use at each time


@dataclass(frozen=True, eq=False)
class Building:
    """What building choices node by node needs of an instance: `order`, for each node its costs with the least of the
    edges to later nodes, the edges to earlier nodes (that node, costs beyond that least: a row for each of its
    strategies), the earlier nodes of which it is the last neighbour, and its usages beyond the least (first and last
    time, amounts)."""

    line: Timeline
    order: tuple[int, ...]
    costs: list[Array]
    before: list[list[tuple[int, Array]]]
    closes: list[list[int]]
    usages: list[list[tuple[int, int, Array]]]
    least_T: Array


def building_of(instance: Instance) -> Building:
    """Prepare once for many passes."""
    order = _order(instance)
    place_N = np.empty(instance.num_nodes, dtype=np.int64)
    place_N[list(order)] = np.arange(instance.num_nodes)
    costs = [instance.costs(node).copy() for node in range(instance.num_nodes)]
    before: list[list[tuple[int, Array]]] = [[] for _ in costs]
    last_N = place_N.copy()
    for edge, (one, other) in enumerate(instance.edges_E.tolist()):
        matrix = instance.matrix(edge)
        if place_N[one] > place_N[other]:
            one, other, matrix = other, one, matrix.T
        reachable = np.where(np.isfinite(instance.costs(other)), matrix, np.inf)
        least = reachable.min(axis=1)
        costs[one] += least
        before[other].append((one, matrix - np.where(np.isfinite(least), least, 0.0)[:, None]))
        last_N[one] = max(last_N[one], place_N[other])
    closes: list[list[int]] = [[] for _ in costs]
    for node, last in enumerate(last_N.tolist()):
        closes[order[last]].append(node)
    line = timeline(instance)
    usages: list[list[tuple[int, int, Array]]] = [[] for _ in costs]
    least_U = np.zeros(len(instance.usage_node_U))
    for usage, node in enumerate(instance.usage_node_U.tolist()):
        allowed = np.where(np.isfinite(instance.costs(node)), instance.usage(usage), np.inf)
        least_U[usage] = allowed.min() if np.isfinite(allowed).any() else 0.0
        first, stop = int(line.first_U[usage]), int(line.stop_U[usage])
        if first < stop:
            usages[node].append((first, stop, instance.usage(usage) - least_U[usage]))
    return Building(line, order, costs, before, closes, usages, line.held(least_U))


def _order(instance: Instance) -> tuple[int, ...]:
    """Next the node with most neighbours already there, of equal ones the first."""
    around: list[set[int]] = [set() for _ in range(instance.num_nodes)]
    for one, other in instance.edges_E.tolist():
        around[one].add(other)
        around[other].add(one)
    ready = [0] * instance.num_nodes
    heap = [(0, node) for node in range(instance.num_nodes)]
    order, done = [], [False] * instance.num_nodes
    while heap:
        negative, node = heapq.heappop(heap)
        if done[node] or -negative != ready[node]:
            continue  # an older entry
        done[node] = True
        order.append(node)
        for other in around[node]:
            if not done[other]:
                ready[other] += 1
                heapq.heappush(heap, (-ready[other], other))
    return tuple(order)


#: Of candidates' costs (K, S), infinite where there is none, and numbers that are equal where later nodes see the same
#: (K, S; None where memory makes all differ): the partial choices and strategies to go on with.
Select = Callable[[Array, Array | None], tuple[Array, Array]]


def built(building: Building, width: int, select: Select, deadline: Deadline) -> Array | None:
    """Choices (K, N) that `select` leaves at the end, cheapest first where it orders them; None where it leaves none or
    the deadline passes. It begins with `width` empty ones."""
    instance, line = building.line.instance, building.line
    weight_N = np.random.default_rng(0).integers(1, 2**62, instance.num_nodes, dtype=np.uint64)
    chosen: dict[int, Array] = {}  # of nodes with neighbours to come: the strategy in each partial choice
    steps: list[tuple[Array, Array]] = []
    cost_K = np.zeros(width)
    used_KT = np.tile(building.least_T, (width, 1))
    for node in building.order:
        if deadline.passed:
            return None
        cost_KS = cost_K[:, None] + building.costs[node]
        for earlier, beyond in building.before[node]:
            cost_KS = cost_KS + beyond[chosen[earlier]]
        for first, stop, amounts in building.usages[node]:
            # Where several usages of a node overlap each is looked at alone: the last word is the caller's.
            room_K = line.most - used_KT[:, first:stop].max(axis=1)
            cost_KS = np.where(amounts > room_K[:, None], np.inf, cost_KS)
        for closed in building.closes[node]:
            if closed != node:
                del chosen[closed]
        is_open = node not in building.closes[node]
        seen_KS = None if line.num_times else _seen(weight_N, chosen, node, cost_KS.shape, is_open=is_open)
        parent_K, strategy_K = select(cost_KS, seen_KS)
        if not len(parent_K):
            return None
        cost_K, used_KT = cost_KS[parent_K, strategy_K], used_KT[parent_K]
        for first, stop, amounts in building.usages[node]:
            used_KT[:, first:stop] += amounts[strategy_K][:, None]
        chosen = {n: s[parent_K] for n, s in chosen.items()}
        if is_open:
            chosen[node] = strategy_K
        steps.append((parent_K, strategy_K))
    choices_KN = np.empty((len(cost_K), instance.num_nodes), dtype=np.int64)
    of_K = np.arange(len(cost_K))
    for node, (parent_K, strategy_K) in zip(reversed(building.order), reversed(steps), strict=True):
        choices_KN[:, node] = strategy_K[of_K]
        of_K = parent_K[of_K]
    return choices_KN


def _seen(weight_N: Array, chosen: dict[int, Array], node: int, shape: tuple[int, int], *, is_open: bool) -> Array:
    """A hash of the strategies of all open nodes, this one among them where it stays open."""
    seen_KS = np.zeros(shape, dtype=np.uint64)
    for other, strategy_K in chosen.items():
        seen_KS += (weight_N[other] * (strategy_K.astype(np.uint64) + np.uint64(1)))[:, None]
    return seen_KS + weight_N[node] * np.arange(1, shape[1] + 1, dtype=np.uint64) if is_open else seen_KS


def _cheapest(width: int) -> Select:
    """The cheapest `width` candidates, of those that look alike to later nodes the cheapest alone."""

    def select(cost_KS: Array, seen_KS: Array | None) -> tuple[Array, Array]:
        cost = cost_KS.ravel()
        kept = np.flatnonzero(np.isfinite(cost))
        kept = kept[np.argsort(cost[kept], kind="stable")]
        if seen_KS is not None:
            kept = kept[np.sort(np.unique(seen_KS.ravel()[kept], return_index=True)[1])]
        parent_K, strategy_K = np.divmod(kept[:width], cost_KS.shape[1])
        return parent_K, strategy_K

    return select


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The best choice of beams of growing width, each bettered by single moves; without a bound."""
    building, best = building_of(instance), NOTHING
    moves = moves_of(building.line)
    if start is not None and is_legal(instance, start):
        best = Solved(start, cost_of(instance, start), -math.inf)
    for width in WIDTHS:
        if width * building.line.num_times > MOST_USED:
            break
        began_s = time.monotonic()
        choices_KN = built(building, 1, _cheapest(width), deadline)
        if choices_KN is not None:
            legal = repaired(moves, choices_KN[0], deadline)
            if legal is not None and (cost := cost_of(instance, legal)) < best.cost:
                best = Solved(legal, cost, -math.inf)
                if report is not None:
                    report(best)
        if deadline.left_s < 8 * (time.monotonic() - began_s):
            break
    if best.choice_N is None:
        return not_found(instance, deadline, f"no beam of up to {WIDTHS[-1]:,} choices ended at a legal one")
    return best


SOLVERS.add("beam", solve)
