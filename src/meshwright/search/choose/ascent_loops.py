"""The compiled loops of `dual`: sequential tree-reweighted message passing, and prices of memory.

Bounds are made of these numbers, so nothing here may be reordered (no fastmath). Legend: see `grid`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meshwright.search.choose.compiled import compiled


@compiled
def pass_message(grid: Any, x: int, size: int, share: float, theta: Any, message_G: Any) -> Any:
    """Send what a node of `size` strategies knows (`theta`, of which the edge gets a `share`) over its end x; the least
    of the message, which is taken out of it."""
    twin = grid.twin_X[x]
    own, at = grid.message_first_X[x], grid.message_first_X[twin]
    width = grid.message_first_X[twin + 1] - at
    table, tables = grid.table_first_X[twin], grid.table_B
    out = message_G[at : at + width]
    for j in range(width):
        out[j] = math.inf
    for i in range(size):
        here = share * theta[i] - message_G[own + i]
        row = tables[table + i * width : table + (i + 1) * width]
        for j in range(width):
            out[j] = min(out[j], here + row[j])
    least = out[0]
    for j in range(1, width):
        least = min(least, out[j])
    for j in range(width):
        out[j] -= least
    return least


@compiled
def sweep(grid: Any, unary_C: Any, message_G: Any, theta: Any, choice_N: Any) -> Any:
    """One pass forth and one back (Kolmogorov 2006, "Convergent tree-reweighted message passing for energy
    minimization", figure 3); the bound after it, and in `choice_N` a choice read off on the way back."""
    num_nodes = grid.first_N.shape[0] - 1
    bound = 0.0
    for turn in range(2):
        for index in range(num_nodes):
            n = index if turn == 0 else num_nodes - 1 - index
            start = grid.first_N[n]
            size = grid.first_N[n + 1] - start
            first, stop = grid.near_first_N[n], grid.near_first_N[n + 1]
            for i in range(size):
                theta[i] = unary_C[start + i]
            later = 0
            for x in range(first, stop):
                later += grid.near_X[x] > n
                at = grid.message_first_X[x]
                for i in range(size):
                    theta[i] += message_G[at + i]
            if turn == 1:
                least = theta[0]
                for i in range(1, size):
                    least = min(least, theta[i])
                for i in range(size):
                    theta[i] -= least
                bound += least
                choice_N[n] = read_off(grid, unary_C, message_G, n, choice_N)
            share = 1.0 / max(later, stop - first - later, 1)
            for x in range(first, stop):
                if (grid.near_X[x] > n) == (turn == 0):
                    least = pass_message(grid, x, size, share, theta, message_G)
                    if turn == 1:
                        bound += least
    return bound


@compiled
def read_off(grid: Any, unary_C: Any, message_G: Any, n: int, choice_N: Any) -> Any:
    """The strategy of node n that is best beside those of later nodes and what earlier ones say."""
    start = grid.first_N[n]
    size = grid.first_N[n + 1] - start
    best, best_s = math.inf, 0
    for i in range(size):
        value = unary_C[start + i]
        for x in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
            other = grid.near_X[x]
            if other > n:
                value += grid.table_B[grid.table_first_X[x] + choice_N[other] * size + i]
            else:
                value += message_G[grid.message_first_X[x] + i]
        if value < best:
            best, best_s = value, i
    return best_s


@compiled
def price_strategies(grid: Any, price_T: Any, scale: float, priced_C: Any) -> None:
    """Add to `priced_C` what each strategy's usage costs at `scale` times these prices."""
    so_far = np.zeros(price_T.shape[0] + 1)
    for t in range(price_T.shape[0]):
        so_far[t + 1] = so_far[t] + price_T[t]
    for n in range(grid.first_N.shape[0] - 1):
        for u in range(grid.held_first_N[n], grid.held_first_N[n + 1]):
            price = so_far[grid.stop_U[u]] - so_far[grid.first_U[u]]
            if price > 0.0:
                for i in range(grid.first_N[n + 1] - grid.first_N[n]):
                    priced_C[grid.first_N[n] + i] += scale * price * grid.usage_V[grid.usage_first_U[u] + i]


@compiled
def use(grid: Any, choice_N: Any, used_T: Any) -> None:
    """What a choice has in use at each time."""
    num = used_T.shape[0]
    for t in range(num):
        used_T[t] = 0.0
    for n in range(grid.first_N.shape[0] - 1):
        for u in range(grid.held_first_N[n], grid.held_first_N[n + 1]):
            amount = grid.usage_V[grid.usage_first_U[u] + choice_N[n]]
            used_T[grid.first_U[u]] += amount
            if grid.stop_U[u] < num:
                used_T[grid.stop_U[u]] -= amount
    for t in range(1, num):
        used_T[t] += used_T[t - 1]


#: Places in the state that `ascend` keeps from call to call.
BOUND, STEP, SINCE, SWEEPS = 0, 1, 2, 3


@compiled
def ascend(
    grid: Any, message_G: Any, price_T: Any, best_price_T: Any, drift_T: Any, state: Any, choice_N: Any, target: float,
    momentum: float, patience: int, num_sweeps: int, stop: Any,
) -> None:  # fmt: skip
    """Raise the bound: after each sweep one step of all prices along the usage above the room, with momentum.

    The step is Polyak's (1969), `state[STEP]` times (target - bound) / |direction|^2. It grows a little with each
    better bound and shrinks after `patience` sweeps without one: messages need sweeps to follow the prices.
    """
    num_times, num_strategies = price_T.shape[0], grid.cost_C.shape[0]
    widest = 0
    for n in range(grid.first_N.shape[0] - 1):
        widest = max(widest, grid.first_N[n + 1] - grid.first_N[n])
    theta, unary_C, used_T = np.empty(widest), np.empty(num_strategies), np.empty(num_times)
    for _ in range(num_sweeps):
        if stop[0] != 0:
            return
        for i in range(num_strategies):
            unary_C[i] = grid.cost_C[i]
        price_strategies(grid, price_T, 1.0, unary_C)
        bound = sweep(grid, unary_C, message_G, theta, choice_N)
        for t in range(num_times):
            bound -= price_T[t] * grid.room_T[t]
        state[SWEEPS] += 1
        if bound > state[BOUND]:
            state[BOUND], state[SINCE] = bound, 0
            state[STEP] = min(state[STEP] * 1.05, 0.2)
            for t in range(num_times):
                best_price_T[t] = price_T[t]
        else:
            state[SINCE] += 1
        if num_times == 0:
            continue
        use(grid, choice_N, used_T)
        length = 0.0
        for t in range(num_times):
            over = used_T[t] - grid.room_T[t]
            if price_T[t] <= 0.0 and over < 0.0:
                over = 0.0
            drift_T[t] = momentum * drift_T[t] + (1.0 - momentum) * over
            if price_T[t] <= 0.0 and drift_T[t] < 0.0:
                drift_T[t] = 0.0
            length += drift_T[t] * drift_T[t]
        if state[SINCE] >= patience:
            state[SINCE] = 0
            state[STEP] *= 0.9
        if length <= 0.0:
            continue
        step = state[STEP] * max(target - bound, 0.0) / length
        for t in range(num_times):
            price_T[t] = max(0.0, price_T[t] + step * drift_T[t])


@compiled
def hopeless(grid: Any, unary_C: Any, message_G: Any, slack: float, hopeless_C: Any) -> None:
    """Mark strategies with which a choice costs more than the bound of these messages plus `slack`.

    On the way forth, a node's sum of messages and costs is what the trees through it cost at least with each of its
    strategies, up to a constant (Kolmogorov 2006, section 3)."""
    num_nodes = grid.first_N.shape[0] - 1
    widest = 0
    for n in range(num_nodes):
        widest = max(widest, grid.first_N[n + 1] - grid.first_N[n])
    theta = np.empty(widest)
    for n in range(num_nodes):
        start = grid.first_N[n]
        size = grid.first_N[n + 1] - start
        for i in range(size):
            theta[i] = unary_C[start + i]
        later = 0
        for x in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
            later += grid.near_X[x] > n
            at = grid.message_first_X[x]
            for i in range(size):
                theta[i] += message_G[at + i]
        least = theta[0]
        for i in range(1, size):
            least = min(least, theta[i])
        for i in range(size):
            hopeless_C[start + i] = theta[i] - least > slack
        share = 1.0 / max(later, grid.near_first_N[n + 1] - grid.near_first_N[n] - later, 1)
        for x in range(grid.near_first_N[n], grid.near_first_N[n + 1]):
            if grid.near_X[x] > n:
                pass_message(grid, x, size, share, theta, message_G)
