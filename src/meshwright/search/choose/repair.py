"""From a choice that uses too much memory to a legal one, and from a legal one to one that no single move betters.

Both change one node at a time: the first takes the move that costs least for each unit by which usage over the limit
falls, until it is gone; the second then takes for each node in turn its cheapest strategy that fits. Where a forbidden
pair of strategies blocks every way out, there is no repair.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meshwright.choice import Array, is_legal
from meshwright.search.choose.moves import Moves
from meshwright.search.choose.solver import ENDLESS, Deadline

MOVES_A_CALL = 16  # between two looks at the clock


def repaired(moves: Moves, choice_N: Array, deadline: Deadline = ENDLESS) -> Array | None:
    """A legal choice near one, at least as cheap where that is legal; None where none was found by the deadline.

    >>> from meshwright.choice import Usage, instance_of
    >>> from meshwright.search.choose.moves import moves_of
    >>> from meshwright.search.choose.times import timeline
    >>> one = instance_of([[1, 2], [1, 9]], usages=[Usage(0, 0, 1, [5, 0]), Usage(1, 0, 1, [5, 0])], limit=6)
    >>> repaired(moves_of(timeline(one)), np.array([0, 0]))
    array([1, 0])
    """
    line = moves.line
    choice_N = np.array(choice_N, dtype=np.int64)
    used_T = line.used(choice_N)
    with np.errstate(invalid="ignore"):  # of two forbidden pairs the difference is not a number
        for loop in (_lower, _descend) if line.num_times else (_descend,):
            step = moves.loop(loop)
            while step(*moves.arrays, line.most, choice_N, used_T) and not deadline.passed:
                pass
    # Sums kept up to date drift by rounding: the last word has a fresh sum.
    return choice_N if is_legal(line.instance, choice_N) else None


def _lower(
    first_N: Any, cost_C: Any, near_first_N: Any, near_X: Any, base_X: Any, own_X: Any, far_X: Any, matrix_M: Any,
    held_first_N: Any, held_H: Any, first_U: Any, stop_U: Any, usage_first_U: Any, usage_V: Any,
    most: float, choice_N: Any, used_T: Any,
) -> bool:  # fmt: skip
    """Lower the usage at the worst time by a few moves, each of which lowers the sum of what is over the limit; whether
    there may be more to do."""
    num_nodes = choice_N.shape[0]
    for _ in range(MOVES_A_CALL):
        worst = np.argmax(used_T)
        if used_T[worst] <= most:
            return False
        best_node, best_s, best_score, best_drop = -1, -1, math.inf, 0.0
        for n in range(num_nodes):
            s = choice_N[n]
            here = False
            for h in range(held_first_N[n], held_first_N[n + 1]):
                here = here or (first_U[held_H[h]] <= worst and worst < stop_U[held_H[h]])
            if not here:
                continue
            for t in range(first_N[n + 1] - first_N[n]):
                delta = cost_C[first_N[n] + t] - cost_C[first_N[n] + s]
                for x in range(near_first_N[n], near_first_N[n + 1]):
                    base = base_X[x] + far_X[x] * choice_N[near_X[x]]
                    delta += matrix_M[base + own_X[x] * t] - matrix_M[base + own_X[x] * s]
                if t == s or not delta < math.inf:  # forbidden, or not a number: forbidden on both sides
                    continue
                # Made and unmade, since several usages of a node may be held at one time.
                drop = 0.0
                for sign in (1.0, -1.0):
                    for h in range(held_first_N[n], held_first_N[n + 1]):
                        u = held_H[h]
                        change = sign * (usage_V[usage_first_U[u] + t] - usage_V[usage_first_U[u] + s])
                        for time in range(first_U[u], stop_U[u]):
                            if sign > 0:
                                drop += max(0.0, used_T[time] - most) - max(0.0, used_T[time] + change - most)
                            used_T[time] += change
                if drop <= max(0.0, 1e-12 * most):
                    continue
                score = max(delta, 0.0) / drop
                if score < best_score or (score == best_score and drop > best_drop):
                    best_node, best_s, best_score, best_drop = n, t, score, drop
        if best_node < 0:
            return False
        for h in range(held_first_N[best_node], held_first_N[best_node + 1]):
            u = held_H[h]
            change = usage_V[usage_first_U[u] + best_s] - usage_V[usage_first_U[u] + choice_N[best_node]]
            for time in range(first_U[u], stop_U[u]):
                used_T[time] += change
        choice_N[best_node] = best_s
    return True


def _descend(
    first_N: Any, cost_C: Any, near_first_N: Any, near_X: Any, base_X: Any, own_X: Any, far_X: Any, matrix_M: Any,
    held_first_N: Any, held_H: Any, first_U: Any, stop_U: Any, usage_first_U: Any, usage_V: Any,
    most: float, choice_N: Any, used_T: Any,
) -> bool:  # fmt: skip
    """Give each node in turn its cheapest strategy that adds nothing above the limit; whether one changed."""
    changed = False
    for n in range(choice_N.shape[0]):
        s = choice_N[n]
        best_s, best_delta = s, 0.0
        for t in range(first_N[n + 1] - first_N[n]):
            delta = cost_C[first_N[n] + t] - cost_C[first_N[n] + s]
            size = abs(cost_C[first_N[n] + s])
            for x in range(near_first_N[n], near_first_N[n + 1]):
                base = base_X[x] + far_X[x] * choice_N[near_X[x]]
                delta += matrix_M[base + own_X[x] * t] - matrix_M[base + own_X[x] * s]
                size += abs(matrix_M[base + own_X[x] * s])
            # A gain within rounding could be taken back and forth for ever.
            if not (delta < best_delta and (size == math.inf or delta < -1e-13 * size)):
                continue
            # Made, looked at, and unmade, since several usages of a node may be held at one time.
            for h in range(held_first_N[n], held_first_N[n + 1]):
                u = held_H[h]
                for time in range(first_U[u], stop_U[u]):
                    used_T[time] += usage_V[usage_first_U[u] + t] - usage_V[usage_first_U[u] + s]
            fits = True
            for h in range(held_first_N[n], held_first_N[n + 1]):
                u = held_H[h]
                for time in range(first_U[u], stop_U[u]):
                    fits = fits and used_T[time] <= most
            for h in range(held_first_N[n], held_first_N[n + 1]):
                u = held_H[h]
                for time in range(first_U[u], stop_U[u]):
                    used_T[time] -= usage_V[usage_first_U[u] + t] - usage_V[usage_first_U[u] + s]
            if fits:
                best_s, best_delta = t, delta
        if best_s != s:
            for h in range(held_first_N[n], held_first_N[n + 1]):
                u = held_H[h]
                change = usage_V[usage_first_U[u] + best_s] - usage_V[usage_first_U[u] + s]
                for time in range(first_U[u], stop_U[u]):
                    used_T[time] += change
            choice_N[n] = best_s
            changed = True
    return changed
