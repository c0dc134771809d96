"""Simulated annealing: a walk of single moves that at first takes dear ones too, and later only cheap ones.

FlexFlow's search (Jia et al. 2018, arXiv 1807.05358, section 6) proposes another strategy for one node and accepts it
with probability min(1, exp(-beta * (cost afterwards - cost before))) (Metropolis et al. 1953). What we changed: beta
grows from the first move to the last instead of being constant (Kirkpatrick et al. 1983); the change in cost comes from
the node's own edges, so a move takes time in the node's degree and its usages' lengths, not a simulation. Forbidden
pairs and usage over the limit are allowed on the way, at a price (`wall` each, `toll` per full memory over) that rises
while the walk is not legal.

Legend: K moves proposed; beside those of `moves`.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.moves import Moves, moves_of
from meshwright.search.choose.obstacles import not_found
from meshwright.search.choose.repair import repaired
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved
from meshwright.search.choose.times import timeline

#: Moves proposed for each strategy of the instance (and at least so many), where the deadline does not end it before.
MOVES_A_STRATEGY, LEAST_MOVES = 300, 20_000

MOVES_A_CALL = 2048  # between two looks at the clock and at the prices of what is not legal

FALL = 1e-4  # of the temperature, from the first move to the last

#: Prices, in temperatures, and by how much they change from call to call.
FIRST_PRICE, RAISED, LOWERED = 3.0, 1.3, 0.97


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The best legal choice on the walk, bettered by single moves; without a bound."""
    number = max(LEAST_MOVES, MOVES_A_STRATEGY * len(instance.cost_C))
    walk = _Walk(instance, np.random.default_rng(seed), start, number)
    began_s, best = time.monotonic(), NOTHING
    share = 0.0
    for done in range(0, number, MOVES_A_CALL):
        walk.go(share)
        if walk.best_cost < best.cost:
            best = _told(walk.best_N, instance, report)
        if deadline.passed:
            break
        spent_s = time.monotonic() - began_s
        share = max((done + MOVES_A_CALL) / number, spent_s / (spent_s + deadline.left_s))
        if share >= 1.0:
            break
    for choice_N in (walk.choice_N, walk.best_N):
        legal = repaired(walk.moves, choice_N, deadline)
        if legal is not None and cost_of(instance, legal) < best.cost:
            best = _told(legal, instance, report)
    return best if best.choice_N is not None else not_found(instance, deadline, "no step of the walk was legal")


def _told(choice_N: Array, instance: Instance, report: Report | None) -> Solved:
    solved = Solved(choice_N.copy(), cost_of(instance, choice_N), -math.inf)
    if report is not None:
        report(solved)
    return solved


class _Walk:
    """Where a walk is (`choice_N`), the best legal choice that it met, and the prices of what is not legal."""

    def __init__(self, instance: Instance, rng: np.random.Generator, start: Array | None, number: int) -> None:
        self.instance, self.rng, self.number, self.line = instance, rng, number, timeline(instance)
        self.moves: Moves = moves_of(self.line)
        first = instance.first_N.tolist()
        cheapest_N = np.array([int(instance.cost_C[a:b].argmin()) for a, b in itertools.pairwise(first)], np.int64)
        self.choice_N = cheapest_N if start is None else np.array(start, dtype=np.int64)
        self.best_N, self.best_cost = self.choice_N.copy(), math.inf
        if is_legal(instance, self.choice_N):
            self.best_cost = cost_of(instance, self.choice_N)
        self.several = np.flatnonzero(instance.num_strategies_N > 1)
        self.hottest = _typical(instance)
        self.price = FIRST_PRICE

    def go(self, share: float) -> None:
        """The moves of one call, `share` of the walk being done."""
        if not len(self.several):
            return
        temperature = self.hottest * FALL**share
        price = self.price * self.hottest
        node_K = self.several[self.rng.integers(0, len(self.several), MOVES_A_CALL)]
        used_T = self.line.used(self.choice_N)  # afresh, since sums that are kept up to date drift
        finite, forbidden = _parts(self.instance, self.choice_N)
        state = np.array([finite, forbidden, float((used_T > self.line.most).sum()), self.best_cost])
        self.moves.loop(_walk, self.number)(
            *self.moves.arrays,
            self.line.most,
            temperature,
            price,
            price / self.line.most if self.line.num_times and self.line.most > 0 else price,
            node_K,
            self.rng.random(MOVES_A_CALL),
            self.rng.random(MOVES_A_CALL),
            self.choice_N,
            self.best_N,
            used_T,
            state,
        )
        if state[3] < self.best_cost and is_legal(self.instance, self.best_N):
            self.best_cost = cost_of(self.instance, self.best_N)
        self.price = max(FIRST_PRICE * FALL**share, self.price * (RAISED if state[1] or state[2] else LOWERED))


def _typical(instance: Instance) -> float:
    """The mean spread of finite costs in nodes and edges that have one: about what a bad move costs."""
    spreads = [np.zeros(0)]
    for values, first in ((instance.cost_C, instance.first_N), (instance.matrix_M, instance.matrix_first_E)):
        if len(first) < 2:
            continue
        finite = np.isfinite(values)
        highest = np.maximum.reduceat(np.where(finite, values, -math.inf), first[:-1])
        lowest = np.minimum.reduceat(np.where(finite, values, math.inf), first[:-1])
        spreads.append(np.where(highest > lowest, highest - lowest, 0.0))
    joined = np.concatenate(spreads)
    positive = joined[joined > 0]
    return float(np.median(positive)) if len(positive) else 1.0


def _parts(instance: Instance, choice_N: Array) -> tuple[float, int]:
    """The finite part of a choice's cost, and how many of its parts are forbidden."""
    one, other = instance.edges_E[:, 0], instance.edges_E[:, 1]
    columns = instance.num_strategies_N[other]
    parts = np.concatenate(
        [
            instance.cost_C[instance.first_N[:-1] + choice_N],
            instance.matrix_M[instance.matrix_first_E[:-1] + choice_N[one] * columns + choice_N[other]],
        ]
    )
    finite = np.isfinite(parts)
    return float(parts[finite].sum()), int((~finite).sum())


def _walk(
    first_N: Any, cost_C: Any, near_first_N: Any, near_X: Any, base_X: Any, own_X: Any, far_X: Any, matrix_M: Any,
    held_first_N: Any, held_H: Any, first_U: Any, stop_U: Any, usage_first_U: Any, usage_V: Any,
    most: float, temperature: float, wall: float, toll: float, node_K: Any, pick_K: Any, luck_K: Any,
    choice_N: Any, best_N: Any, used_T: Any, state: Any,
) -> None:  # fmt: skip
    """Propose moves; `state` is the finite cost, the forbidden parts, the times over the limit, the best legal cost."""
    for k in range(node_K.shape[0]):
        n = node_K[k]
        s = choice_N[n]
        size = first_N[n + 1] - first_N[n]
        t = int(pick_K[k] * (size - 1))  # any but its own
        if t >= s:
            t += 1
        before, after, walls = 0.0, 0.0, 0
        if cost_C[first_N[n] + s] < math.inf:
            before += cost_C[first_N[n] + s]
        else:
            walls -= 1
        if cost_C[first_N[n] + t] < math.inf:
            after += cost_C[first_N[n] + t]
        else:
            walls += 1
        for x in range(near_first_N[n], near_first_N[n + 1]):
            base = base_X[x] + far_X[x] * choice_N[near_X[x]]
            old, new = matrix_M[base + own_X[x] * s], matrix_M[base + own_X[x] * t]
            if old < math.inf:
                before += old
            else:
                walls -= 1
            if new < math.inf:
                after += new
            else:
                walls += 1
        over, times = 0.0, 0
        for h in range(held_first_N[n], held_first_N[n + 1]):
            u = held_H[h]
            change = usage_V[usage_first_U[u] + t] - usage_V[usage_first_U[u] + s]
            if change != 0.0:
                for time in range(first_U[u], stop_U[u]):
                    old = used_T[time]
                    used_T[time] = old + change
                    over += max(0.0, old + change - most) - max(0.0, old - most)
                    times += int(old + change > most) - int(old > most)
        delta = after - before + wall * walls + toll * over
        if delta <= 0.0 or luck_K[k] < math.exp(-delta / temperature):
            choice_N[n] = t
            state[0] += after - before
            state[1] += walls
            state[2] += times
            if state[1] == 0 and state[2] == 0 and state[0] < state[3] - 1e-12 * abs(state[0]):
                state[3] = state[0]
                best_N[:] = choice_N
        else:
            for h in range(held_first_N[n], held_first_N[n + 1]):
                u = held_H[h]
                change = usage_V[usage_first_U[u] + t] - usage_V[usage_first_U[u] + s]
                if change != 0.0:
                    for time in range(first_U[u], stop_U[u]):
                        used_T[time] -= change


SOLVERS.add("annealing", solve)
