"""Chains of equal blocks: shortest paths by products of matrices in (min, +).

A block that repeats n times, whose cost is a matrix over the strategies at its two boundaries (`min_marginals` gives
it), costs the n-th power of that matrix, in which sums are minima and products are sums. Squaring again and again needs
about 2 log2(n) products, and halving again and again finds the strategies at every boundary between.

Legend: S strategies at a boundary; N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.choice import Array

#: Sums are made in blocks of about so many entries, which the second-level cache holds.
BLOCK_ENTRIES = 2**17


def min_plus(one: Array, other: Array) -> Array:
    """The cheapest way from each row of `one` to each column of `other`, by any state between.

    >>> min_plus(np.array([[1, 5]]), np.array([[7, 0], [1, 1]]))
    array([[6, 1]])
    """
    assert one.shape[1] == other.shape[0], "the boundary between has one number of states"
    rows = max(1, BLOCK_ENTRIES // max(1, other.size))
    return np.concatenate(
        [(one[first : first + rows, :, None] + other).min(axis=1) for first in range(0, len(one), rows)]
        or [np.zeros((0, other.shape[1]))]
    )


@dataclass(frozen=True, eq=False)
class Chain:
    """`num_blocks` equal blocks in a row: `cost_SS[i, j]` is the least cost from state i before the first to state j
    after the last, and `states` the states on the way. `powers[k]` is the cost of 2^k blocks."""

    num_blocks: int
    powers: tuple[Array, ...]
    cost_SS: Array

    def states(self, first: int, last: int) -> Array:
        """The states at all boundaries of a cheapest way: N + 1 of them, the first and the last as given."""
        states = np.empty(self.num_blocks + 1, dtype=np.int64)
        states[0], states[-1] = first, last
        self._fill(states, 0, self.num_blocks, self.cost_SS)
        return states

    def _fill(self, states: Array, start: int, stop: int, cost_SS: Array) -> None:
        """Fill in the states between two boundaries by splitting off the largest power of two below."""
        length = stop - start
        if length < 2:
            return
        power = (length - 1).bit_length() - 1
        head, tail = self.powers[power], _power(self.powers, length - 2**power)
        middle = int((head[states[start]] + tail[:, states[stop]]).argmin())
        states[start + 2**power] = middle
        self._fill(states, start, start + 2**power, head)
        self._fill(states, start + 2**power, stop, tail)


def _power(powers: tuple[Array, ...], blocks: int) -> Array:
    """The cost of some blocks, from that of 1, 2, 4, 8 ..."""
    parts = [powers[k] for k in range(blocks.bit_length()) if blocks >> k & 1]
    cost = parts[0]
    for part in parts[1:]:
        cost = min_plus(part, cost)
    return cost


def chain(block_SS: Array, num_blocks: int) -> Chain:
    """The cheapest ways through `num_blocks` >= 1 equal blocks; the cost of what lies on a boundary belongs to one of
    the two blocks that meet there.

    >>> three = chain(np.array([[2.0, 0.0], [0.0, 3.0]]), 3)
    >>> three.cost_SS.tolist(), three.states(0, 1).tolist()
    ([[2.0, 0.0], [0.0, 2.0]], [0, 1, 0, 1])
    """
    assert num_blocks >= 1, "a chain has a block"
    assert block_SS.shape[0] == block_SS.shape[1], "equal blocks meet at equal boundaries"
    powers = [np.asarray(block_SS, dtype=float)]
    while 2 ** len(powers) <= num_blocks:
        powers.append(min_plus(powers[-1], powers[-1]))
    return Chain(num_blocks, tuple(powers), _power(tuple(powers), num_blocks))
