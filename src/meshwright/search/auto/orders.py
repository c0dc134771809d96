"""Orders of actions found without proof: list scheduling by rules, and moves along the critical path.

Compiled loops; each takes the arrays of `Arrays` first. `measure` says how long an order takes, `build` makes one by a
rule, `improve` changes one a little, many times. An order is one array of letters, rank after rank (`starts_P`).

References
    List scheduling by longest tail: Graham, Bell System Technical Journal 45, 1966; the tail as priority, Hu 1961.
    Moves on the critical path alone: van Laarhoven, Aarts, Lenstra, Operations Research 40, 1992, theorem 2 (only they
    can shorten a schedule), with simulated annealing as there: Kirkpatrick, Gelatt, Vecchi, Science 220, 1983.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from meshwright.search.auto.pipeline import IntArray, Whole

FloatArray = npt.NDArray[np.float64]

#: The makespan of an order that cannot run: its ranks wait in a circle, or it keeps more than the limit.
NEVER = 2**62


class Arrays(NamedTuple):
    """A pipeline as the kernels take it."""

    duration_L: IntArray
    rank_L: IntArray
    kept_S: IntArray
    most_P: IntArray
    p2p: int
    num_microbatches: int
    starts_P: IntArray


def arrays(times: Whole) -> Arrays:
    """A pipeline as the kernels take it."""
    num_letters = np.bincount(times.rank_L, minlength=len(times.most_P))
    starts_P = np.concatenate([[0], np.cumsum(num_letters * times.num_microbatches)])
    return Arrays(
        times.duration_L, times.rank_L, times.kept_S, times.most_P, times.p2p, times.num_microbatches, starts_P
    )


class Rule(NamedTuple):
    """A way to choose what a rank runs next: of the actions that are ready, or whose input is on its way, the one with
    the largest tail + `bias_L` - `patience` x time until it can start, in units of the times."""

    bias_L: FloatArray
    patience: float


def rules(times: Whole) -> list[Rule]:
    """Rules to start from: longest tail, backward first (1F1B), forward first (GPipe), and W only where nothing else is
    ready or with the others; each patient and not."""
    far = float(times.duration_L.sum() * times.num_microbatches)
    found = []
    for by_kind in ((0, 0, 0), (0, 0, -far), (0, far, -far), (far, 0, -far), (0, far, far), (-far, 0, 0)):
        bias_L = np.tile(np.array(by_kind, dtype=np.float64), times.num_stages)
        found += [Rule(bias_L, patience) for patience in (far, 1.0, 4.0)]
    return found


def _arrival(data: Any, letter: int, k: int, end_Lm: Any) -> int:
    """When the input of `letter` of microbatch k is there; -1 where it is not on its way yet."""
    kind, last = letter % 3, end_Lm.shape[0] - 3
    if kind == 2:
        return int(end_Lm[letter - 1, k])
    if kind == 1:
        forward = end_Lm[letter - 1, k]
        if forward < 0 or letter - 1 == last:
            return int(forward)
        need = letter + 3
    elif letter == 0:
        return 0
    else:
        forward, need = 0, letter - 3
    arrived = end_Lm[need, k]
    if arrived < 0:
        return -1
    if data.rank_L[need] != data.rank_L[letter]:
        arrived += data.p2p
    return int(max(arrived, forward))


arrival: Any = numba.njit(cache=True, inline="always")(_arrival)


def _measure(data: Any, order: Any, end_Lm: Any) -> int:
    """The makespan of an order, or NEVER; fills the ends of its actions."""
    num_ranks = data.starts_P.shape[0] - 1
    end_Lm[:] = -1
    next_L = np.zeros(end_Lm.shape[0], dtype=np.int64)
    at_P = data.starts_P[:-1].copy()
    free_P, kept_P = np.zeros(num_ranks, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    left, moved = order.shape[0], True
    while moved:
        moved = False
        for rank in range(num_ranks):
            while at_P[rank] < data.starts_P[rank + 1]:
                letter = order[at_P[rank]]
                k = next_L[letter]
                arrived = arrival(data, letter, k, end_Lm)
                if arrived < 0:
                    break
                if letter % 3 == 0:
                    kept_P[rank] += data.kept_S[letter // 3]
                    if kept_P[rank] > data.most_P[rank]:
                        return NEVER
                elif letter % 3 == 2:
                    kept_P[rank] -= data.kept_S[letter // 3]
                free_P[rank] = max(free_P[rank], arrived) + data.duration_L[letter]
                end_Lm[letter, k] = free_P[rank]
                next_L[letter] += 1
                at_P[rank] += 1
                left -= 1
                moved = True
    return int(free_P.max()) if left == 0 else NEVER


measure: Any = numba.njit(cache=True)(_measure)


def _may_keep(data: Any, stage: int, next_L: Any, kept: int) -> bool:
    """Whether the rank of `stage` can run its next forward and still end all that it has begun.

    The banker's rule (Dijkstra 1965): the oldest microbatch must be able to end with what is free, then with what that
    sets free the next, and so on. All ranks end microbatches in the same order, so none waits for another for ever.
    """
    rank = data.rank_L[3 * stage]
    free = data.most_P[rank] - kept - data.kept_S[stage]
    if free < 0:
        return False
    oldest, newest = data.num_microbatches, next_L[3 * stage]
    for s in range(data.kept_S.shape[0]):
        if data.rank_L[3 * s] == rank:
            oldest, newest = min(oldest, next_L[3 * s + 2]), max(newest, next_L[3 * s] - 1)
    for k in range(oldest, newest + 1):
        asks = holds = 0
        for s in range(data.kept_S.shape[0]):
            if data.rank_L[3 * s] == rank:
                if k < next_L[3 * s] + (s == stage):
                    holds += data.kept_S[s] if k >= next_L[3 * s + 2] else 0
                else:
                    asks += data.kept_S[s]
        if asks > free:
            return False
        free += holds
    return True


may_keep: Any = numba.njit(cache=True)(_may_keep)


def _build(data: Any, tail_Lm: Any, bias_L: Any, patience: float, end_Lm: Any) -> Any:
    """The order that a rule makes. At each step the rank that can start something first chooses."""
    num_letters, num_ranks = end_Lm.shape[0], data.starts_P.shape[0] - 1
    end_Lm[:] = -1
    next_L = np.zeros(num_letters, dtype=np.int64)
    at_P = data.starts_P[:-1].copy()
    free_P, kept_P = np.zeros(num_ranks, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    order = np.empty(data.starts_P[-1], dtype=np.int64)
    arrived_L = np.empty(num_letters, dtype=np.int64)
    for _ in range(order.shape[0]):
        first, rank = NEVER, -1
        for letter in range(num_letters):
            arrived_L[letter] = -1
            if next_L[letter] == data.num_microbatches:
                continue
            arrived = arrival(data, letter, next_L[letter], end_Lm)
            holder = data.rank_L[letter]
            blocked = arrived >= 0 and letter % 3 == 0 and not may_keep(data, letter // 3, next_L, kept_P[holder])
            arrived_L[letter] = -2 if blocked else arrived
            if arrived >= 0 and not blocked and max(arrived, free_P[holder]) < first:
                first, rank = max(arrived, free_P[holder]), holder
        waits_for_memory = False
        for letter in range(num_letters):
            waits_for_memory |= data.rank_L[letter] == rank and arrived_L[letter] == -2
        chosen, best = -1, -np.inf
        for letter in range(num_letters):
            if data.rank_L[letter] != rank or arrived_L[letter] < 0:
                continue
            score = tail_Lm[letter, next_L[letter]] - patience * max(0, arrived_L[letter] - first)
            # A gradient of the weights that makes room for a forward is as urgent as that.
            score += bias_L[letter - 2] if waits_for_memory and letter % 3 == 2 else bias_L[letter]
            if score > best:
                chosen, best = letter, score
        kept_P[rank] += data.kept_S[chosen // 3] * (1 - chosen % 3 if chosen % 3 != 1 else 0)
        free_P[rank] = max(free_P[rank], arrived_L[chosen]) + data.duration_L[chosen]
        end_Lm[chosen, next_L[chosen]] = free_P[rank]
        next_L[chosen] += 1
        order[at_P[rank]] = chosen
        at_P[rank] += 1
    return order


build: Any = numba.njit(cache=True)(_build)


def _critical(data: Any, order: Any, end_Lm: Any, path: Any) -> int:
    """Fill `path` with the positions of a critical path, last first; returns how many."""
    num_letters, num_ranks = end_Lm.shape[0], data.starts_P.shape[0] - 1
    k_N = np.empty(order.shape[0], dtype=np.int64)
    place_Lm = np.empty(end_Lm.shape, dtype=np.int64)
    seen_L = np.zeros(num_letters, dtype=np.int64)
    position, latest = 0, -1
    for rank in range(num_ranks):
        for n in range(data.starts_P[rank], data.starts_P[rank + 1]):
            letter = order[n]
            k_N[n] = seen_L[letter]
            place_Lm[letter, k_N[n]] = n
            seen_L[letter] += 1
        if end_Lm[letter, k_N[n]] > latest:
            latest, position = end_Lm[letter, k_N[n]], n
    length = 0
    while True:
        path[length] = position
        length += 1
        letter, k = order[position], k_N[position]
        start = end_Lm[letter, k] - data.duration_L[letter]
        rank = data.rank_L[letter]
        if position > data.starts_P[rank] and end_Lm[order[position - 1], k_N[position - 1]] == start:
            position -= 1
        elif start == 0:
            return length
        elif letter % 3 == 1 and (
            letter + 3 >= num_letters
            or end_Lm[letter + 3, k] + (data.p2p if data.rank_L[letter + 3] != rank else 0) < start
        ):
            position = place_Lm[letter - 1, k]
        elif letter % 3 == 1:
            position = place_Lm[letter + 3, k]
        else:
            position = place_Lm[letter - 3 if letter % 3 == 0 else letter - 1, k]


critical: Any = numba.njit(cache=True)(_critical)


def _improve(data: Any, order: Any, random: Any, num_moves: int, goal: int, end_Lm: Any, temperature: float) -> Any:
    """The best order met in `num_moves` moves from `order`, or once one reaches `goal`; `order` ends at the last.

    A move takes an action of the critical path to another place nearby on its rank. It stays with probability
    exp(- what it adds to the makespan / temperature).
    """
    now = measure(data, order, end_Lm)
    best_order, best = order.copy(), now
    path = np.empty(order.shape[0], dtype=np.int64)
    length = critical(data, order, end_Lm, path)
    for _ in range(num_moves):
        if best <= goal:
            break
        position = path[random.integers(0, length)]
        letter = order[position]
        rank = data.rank_L[letter]
        reach = 1 + int(random.exponential(2.0))
        to = position + (reach if random.random() < 0.5 else -reach)
        to = min(max(to, data.starts_P[rank]), data.starts_P[rank + 1] - 1)
        step = 1 if to > position else -1
        for n in range(position, to, step):
            order[n] = order[n + step]
        order[to] = letter
        found = measure(data, order, end_Lm)
        if found < NEVER and found - now <= temperature * random.exponential(1.0):
            now = found
            length = critical(data, order, end_Lm, path)
            if now < best:
                best, best_order[:] = now, order
        else:
            for n in range(to, position, -step):
                order[n] = order[n - step]
            order[position] = letter
    return best_order


improve: Any = numba.njit(cache=True)(_improve)


def changed(times: Whole, rule: Rule, random: np.random.Generator) -> Rule:
    """A rule near another: some biases and the patience changed, biases by amounts from an action to a microbatch."""
    num_letters = len(rule.bias_L)
    size = float(times.duration_L.sum()) * 10.0 ** -random.uniform(0.0, 2.0)
    touched = random.random(num_letters) < random.choice([0.1, 0.3, 1.0])
    bias_L = rule.bias_L + touched * random.normal(0.0, size, num_letters)
    return Rule(bias_L, rule.patience * float(np.exp(random.normal(0.0, 0.5))))
