"""The compiled loops of `local`: moves that choose anew, exactly, for all nodes of a random tree at once.

A tree grows from a random node; a neighbour joins if exactly one of its neighbours is inside, so that the edges inside
are the tree's and dynamic programming finds its best strategies with all other nodes fixed. Legend: see `grid`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from meshwright.search.choose.compiled import compiled

#: Places in the numbers of a state.
COST, OVER, BEST, MOVES = 0, 1, 2, 3


class State(NamedTuple):
    """Where a search is. `beside_C` is each strategy's cost with that of its edges to the neighbours' strategies; the
    others are a choice, the best choice so far that fits, what is in use, random bits, the numbers above, and space."""

    choice_N: Any
    best_N: Any
    beside_C: Any
    used_T: Any
    random: Any
    numbers: Any
    space: Any


class Space(NamedTuple):
    """Memory that moves work in: nothing in it outlives one."""

    inside_N: Any  # how many neighbours are in the tree; the tree's own nodes have `IN_TREE` more
    tree_N: Any
    parent_X: Any  # of each node of the tree, by place: its end of the edge to its parent, or -1
    frontier_X: Any
    new_N: Any
    value_C: Any
    change_T: Any
    touched_N: Any


IN_TREE = 1 << 20


@compiled
def draw(random: Any) -> Any:
    """The next of Marsaglia's xorshift numbers (2003), below 2^31."""
    x = random[0]
    x ^= (x << np.uint64(13)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x ^= x >> np.uint64(7)
    x ^= (x << np.uint64(17)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    random[0] = x
    return np.int64(x >> np.uint64(33))


@compiled
def place(grid: Any, state: Any) -> None:
    """Work out all that depends on the choice of a state."""
    num_nodes = grid.first_N.shape[0] - 1
    twice = 0.0  # edges count at both ends
    once = 0.0
    num_times = state.used_T.shape[0]
    for t in range(num_times):
        state.used_T[t] = 0.0
    for n in range(num_nodes):
        start = grid.first_N[n]
        size = grid.first_N[n + 1] - start
        s = state.choice_N[n]
        for i in range(size):
            state.beside_C[start + i] = grid.cost_C[start + i]
        for x in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
            row = grid.table_first_X[x] + state.choice_N[grid.near_X[x]] * size
            for i in range(size):
                state.beside_C[start + i] += grid.table_B[row + i]
        once += grid.cost_C[start + s]
        twice += state.beside_C[start + s] - grid.cost_C[start + s]
        for u in range(grid.held_first_N[n], grid.held_first_N[n + 1]):
            amount = grid.usage_V[grid.usage_first_U[u] + s]
            state.used_T[grid.first_U[u]] += amount
            if grid.stop_U[u] < num_times:
                state.used_T[grid.stop_U[u]] -= amount
    over = 0.0
    for t in range(num_times):
        if t > 0:
            state.used_T[t] += state.used_T[t - 1]
        over += max(0.0, state.used_T[t] - grid.room_T[t])
    state.numbers[COST] = once + twice / 2.0
    state.numbers[OVER] = over


@compiled
def grow(grid: Any, state: Any, most: int) -> Any:
    """A random tree of up to `most` nodes with a choice, parents first; how many there are."""
    space = state.space
    num_nodes = grid.first_N.shape[0] - 1
    n = draw(state.random) % num_nodes
    size, touched, waiting = 0, 0, 0
    x = -1
    while True:
        if grid.first_N[n + 1] - grid.first_N[n] > 1 and space.inside_N[n] == (0 if size == 0 else 1):
            space.tree_N[size], space.parent_X[size] = n, x
            if space.inside_N[n] == 0:
                space.touched_N[touched] = n
                touched += 1
            space.inside_N[n] += IN_TREE
            size += 1
            if size == most:
                break
            for y in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
                other = grid.near_X[y]
                if space.inside_N[other] == 0:
                    space.touched_N[touched] = other
                    touched += 1
                    space.frontier_X[waiting] = grid.twin_X[y]
                    waiting += 1
                space.inside_N[other] += 1
        if waiting == 0:
            break
        pick = draw(state.random) % waiting
        x = space.frontier_X[pick]
        waiting -= 1
        space.frontier_X[pick] = space.frontier_X[waiting]
        n = grid.near_X[grid.twin_X[x]]
    for index in range(touched):
        space.inside_N[space.touched_N[index]] = 0
    return size


@compiled
def best_in_tree(grid: Any, state: Any, size: int, priced_C: Any, weight: float, gumbel: Any, warmth: float) -> None:
    """The tree's best strategies, into `new_N` by place: costs plus `weight` times the price of memory plus noise."""
    space, tables = state.space, grid.table_B
    for index in range(size):
        n = space.tree_N[index]
        start = grid.first_N[n]
        width = grid.first_N[n + 1] - start
        value = space.value_C[start : start + width]
        for i in range(width):
            value[i] = state.beside_C[start + i] + weight * priced_C[start + i]
        if warmth > 0.0:
            for i in range(width):
                value[i] -= warmth * gumbel[draw(state.random) & (gumbel.shape[0] - 1)]
        x = space.parent_X[index]
        if x >= 0:  # edges of the tree are not fixed: take them out at both ends
            parent = grid.near_X[x]
            row = tables[grid.table_first_X[x] + state.choice_N[parent] * width :]
            for i in range(width):
                value[i] -= row[i]
            above = grid.first_N[parent]
            y = grid.twin_X[x]
            wide = grid.first_N[parent + 1] - above
            row = tables[grid.table_first_X[y] + state.choice_N[n] * wide :]
            for i in range(wide):
                space.value_C[above + i] -= row[i]
    message = np.empty(1)
    for index in range(size - 1, 0, -1):
        n, x = space.tree_N[index], space.parent_X[index]
        start = grid.first_N[n]
        width = grid.first_N[n + 1] - start
        parent, y = grid.near_X[x], grid.twin_X[x]
        above = grid.first_N[parent]
        wide = grid.first_N[parent + 1] - above
        if message.shape[0] < wide:
            message = np.empty(2 * wide)
        for j in range(wide):
            message[j] = math.inf
        for i in range(width):
            here = space.value_C[start + i]
            row = tables[grid.table_first_X[y] + i * wide : grid.table_first_X[y] + (i + 1) * wide]
            for j in range(wide):
                message[j] = min(message[j], here + row[j])
        for j in range(wide):
            space.value_C[above + j] += message[j]
    for index in range(size):
        n, x = space.tree_N[index], space.parent_X[index]
        start = grid.first_N[n]
        width = grid.first_N[n + 1] - start
        best, best_s = math.inf, state.choice_N[n]
        row = 0 if x < 0 else grid.table_first_X[x] + space.new_N[grid.near_X[x]] * width
        for i in range(width):
            value = space.value_C[start + i] + (0.0 if x < 0 else tables[row + i])
            if value < best:
                best, best_s = value, i
        space.new_N[n] = best_s


@compiled
def rise(grid: Any, state: Any, size: int) -> Any:
    """What the tree's new strategies cost more than its old ones."""
    space, tables = state.space, grid.table_B
    total = 0.0
    for index in range(size):
        n, x = space.tree_N[index], space.parent_X[index]
        start, old, new = grid.first_N[n], state.choice_N[n], space.new_N[n]
        total += state.beside_C[start + new] - state.beside_C[start + old]
        if x >= 0:
            parent = grid.near_X[x]
            width = grid.first_N[n + 1] - start
            was = grid.table_first_X[x] + state.choice_N[parent] * width
            is_ = grid.table_first_X[x] + space.new_N[parent] * width
            total += tables[is_ + new] - tables[is_ + old] - tables[was + new] + tables[was + old]
    return total


@compiled
def change_usage(grid: Any, state: Any, size: int) -> Any:
    """Fill `change_T` with what the tree's new strategies use more; the first and the last time that it touches."""
    space = state.space
    first, last = state.used_T.shape[0], 0
    for index in range(size):
        n = space.tree_N[index]
        old, new = state.choice_N[n], space.new_N[n]
        if old == new:
            continue
        for u in range(grid.held_first_N[n], grid.held_first_N[n + 1]):
            amount = grid.usage_V[grid.usage_first_U[u] + new] - grid.usage_V[grid.usage_first_U[u] + old]
            if amount != 0.0:
                space.change_T[grid.first_U[u]] += amount
                space.change_T[grid.stop_U[u]] -= amount
                first, last = min(first, grid.first_U[u]), max(last, grid.stop_U[u])
    return first, last


@compiled
def take(grid: Any, state: Any, size: int) -> None:
    """Give the tree's nodes their new strategies, and tell their neighbours."""
    space, tables = state.space, grid.table_B
    for index in range(size):
        n = space.tree_N[index]
        old, new = state.choice_N[n], space.new_N[n]
        if old == new:
            continue
        state.choice_N[n] = new
        for x in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
            other, y = grid.near_X[x], grid.twin_X[x]
            start = grid.first_N[other]
            width = grid.first_N[other + 1] - start
            before = tables[grid.table_first_X[y] + old * width : grid.table_first_X[y] + (old + 1) * width]
            after = tables[grid.table_first_X[y] + new * width : grid.table_first_X[y] + (new + 1) * width]
            for i in range(width):
                state.beside_C[start + i] += after[i] - before[i]


@compiled
def search(
    grid: Any, state: Any, priced_C: Any, weights: Any, gumbel: Any, warmth: float, allowance: float, most_nodes: int,
    num_moves: int, repairing: bool, stop: Any,
) -> None:  # fmt: skip
    """Moves on trees of up to `most_nodes` nodes with noise of about `warmth`. One is taken where usage over the room
    does not grow and cost rises by at most about `allowance`; while `repairing`, where usage over the room falls."""
    numbers, space = state.numbers, state.space
    num_times = state.used_T.shape[0]
    for _ in range(num_moves):
        if stop[0] != 0 or (repairing and numbers[OVER] <= 0.0):
            return
        numbers[MOVES] += 1
        most = 1 + draw(state.random) % most_nodes
        size = grow(grid, state, most)
        if size == 0:
            continue
        weight = weights[draw(state.random) % weights.shape[0]]
        # Noise of all sizes up to the warmth, and none at times.
        noise = warmth * (draw(state.random) & 1023) / 1023.0
        best_in_tree(grid, state, size, priced_C, weight, gumbel, noise)
        changed = False
        for index in range(size):
            n = space.tree_N[index]
            changed = changed or space.new_N[n] != state.choice_N[n]
        if not changed:
            continue
        extra = rise(grid, state, size)
        if not repairing and extra > allowance * -math.log((draw(state.random) + 1) / 2147483649.0):
            continue
        first, last = change_usage(grid, state, size)
        fits, growth, so_far = True, 0.0, 0.0
        for t in range(first, last):
            so_far += space.change_T[t]
            if so_far != 0.0:
                old, new = state.used_T[t] - grid.room_T[t], state.used_T[t] + so_far - grid.room_T[t]
                if new > 0.0 or old > 0.0:
                    growth += max(0.0, new) - max(0.0, old)
                    if numbers[OVER] <= 0.0:
                        fits = False
                        break
        if repairing:
            fits = growth < 0.0 or (growth <= 0.0 and extra <= 0.0)
        elif numbers[OVER] > 0.0:
            fits = growth <= 0.0
        so_far = 0.0
        for t in range(first, min(last + 1, num_times + 1)):
            so_far += space.change_T[t]
            space.change_T[t] = 0.0
            if fits and t < last:
                state.used_T[t] += so_far
        if not fits:
            continue
        take(grid, state, size)
        numbers[COST] += extra
        if numbers[OVER] > 0.0:  # anew: a sum of differences would keep a rest of rounding
            numbers[OVER] = 0.0
            for t in range(num_times):
                numbers[OVER] += max(0.0, state.used_T[t] - grid.room_T[t])
        if numbers[OVER] <= 0.0 and numbers[COST] < numbers[BEST]:
            numbers[BEST] = numbers[COST]
            for n in range(state.best_N.shape[0]):
                state.best_N[n] = state.choice_N[n]
