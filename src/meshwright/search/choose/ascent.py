"""A lower bound on its way up, by messages and prices, and choices read off them.

Tree-reweighted message passing (TRW-S, Kolmogorov 2006) bounds what costs and edges come to; each time at which memory
can bind has a price (Lagrange multipliers), so that the bound knows about memory; after every sweep of messages all
prices take one step. The choices that the sweeps read off need not fit; repaired by `local`, the best are near optimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from meshwright.choice import Array
from meshwright.search.choose import ascent_loops as loops
from meshwright.search.choose.grid import Grid, Scaled


@dataclass(frozen=True)
class Pace:
    """How prices move: first step (of Polyak's), momentum, and sweeps without a better bound that shorten the step."""

    step: float
    momentum: float
    patience: int


#: One after the other, each from the best prices of the one before: quick at first, then with less momentum, which
#: goes on where the first has swung itself out. [fit: sweeps on the contest's instances M and S; the same for all]
PACES = (Pace(0.1, 0.8, 10), Pace(0.05, 0.6, 20))

#: Sweeps at first without prices: until messages have come some way, the bound says nothing about them.
WARM_UP_SWEEPS = 30

#: A step this short moves nothing any more.
SETTLED_STEP = 2e-4

#: Without memory, so many sweeps without a better bound are the end.
SETTLED_SWEEPS = 50

#: Sweeps between two looks at what other threads found; a sweep takes 1e-8 s an entry.
ENTRIES_A_CALL = 4_000_000


@dataclass(eq=False)
class Ascent:
    """A bound on its way up: call `advance` until it has `settled`."""

    scaled: Scaled
    message_G: Array
    price_T: Array
    best_price_T: Array
    drift_T: Array
    state: Array
    choice_N: Array
    pace: int = 0

    @property
    def grid(self) -> Grid:
        """What it works on."""
        return self.scaled.grid

    @property
    def sweeps(self) -> int:
        """Sweeps so far."""
        return int(self.state[loops.SWEEPS])

    @property
    def bound(self) -> float:
        """The best bound so far, lowered by what rounding can have added.

        In the last sweep each message and each node adds a number that is off by some units in the last place of the
        cap at most; that is far below the gaps that matter.
        """
        raw = float(self.state[loops.BOUND])
        pieces = len(self.choice_N) + len(self.grid.near_X)
        magnitude = min(self.scaled.cap, abs(raw) + self.scaled.cap) + abs(self.scaled.constant) / pieces
        return raw + self.scaled.constant - 8 * np.finfo(float).eps * pieces * magnitude

    @property
    def settled(self) -> bool:
        """Whether more sweeps would hardly help."""
        if not len(self.price_T):
            return bool(self.state[loops.SINCE] > SETTLED_SWEEPS)
        return self.pace >= len(PACES)

    @property
    def warming(self) -> bool:
        """Whether prices stand still yet."""
        return self.sweeps < WARM_UP_SWEEPS and len(self.price_T) > 0

    def advance(self, stop: Array, upper: float = math.inf) -> None:
        """Some more sweeps, a few hundredths of a second; `upper` is the cost of the best choice known."""
        sweeps = 1 + min(200, ENTRIES_A_CALL // (len(self.grid.table_B) + 10 * len(self.grid.cost_C)))
        constant = self.scaled.constant
        warming = self.warming
        so_far = float(self.state[loops.BOUND]) + constant
        # Where no choice is known, or a bad one: half as much again.
        target = -math.inf if warming else min(upper, so_far + 0.5 * abs(so_far)) - constant
        self._call(min(sweeps, WARM_UP_SWEEPS - self.sweeps) if warming else sweeps, target, stop)
        if warming and self.sweeps >= WARM_UP_SWEEPS:
            self._begin_pace(0)
        elif self.state[loops.STEP] < SETTLED_STEP:
            self._begin_pace(self.pace + 1)

    def _begin_pace(self, pace: int) -> None:
        self.pace = pace
        self.price_T[:] = self.best_price_T
        self.drift_T[:] = 0.0
        self.state[loops.SINCE] = 0
        self.state[loops.STEP] = PACES[min(pace, len(PACES) - 1)].step

    def _call(self, sweeps: int, target: float, stop: Array) -> None:
        pace = PACES[min(self.pace, len(PACES) - 1)]
        loops.ascend(
            self.grid, self.message_G, self.price_T, self.best_price_T, self.drift_T, self.state, self.choice_N,
            float(target), pace.momentum, pace.patience, int(sweeps), stop,
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        """Whether the choice of the last sweep fits."""
        used_T = np.zeros(len(self.price_T))
        loops.use(self.grid, self.choice_N, used_T)
        return not bool((used_T > self.grid.room_T).any())

    def priced(self) -> Array:
        """For each strategy, what it uses at the best prices so far."""
        priced_C = np.zeros(len(self.grid.cost_C))
        loops.price_strategies(self.grid, self.best_price_T.copy(), 1.0, priced_C)
        return priced_C

    def hopeless(self, upper: float, stop: Array) -> Array:
        """Strategies that no choice has which costs less than `upper`."""
        self.price_T[:] = self.best_price_T
        self.drift_T[:] = 0.0
        hopeless_C = np.zeros(len(self.grid.cost_C), dtype=np.bool_)
        # One sweep more at these prices, such that messages and bound belong together.
        unary_C = self.grid.cost_C + self.priced()
        theta = np.zeros(int(np.diff(self.grid.first_N).max()))
        bound = loops.sweep(self.grid, unary_C, self.message_G, theta, self.choice_N)
        bound += self.scaled.constant - float(self.best_price_T @ self.grid.room_T)
        slack = upper - bound + (float(self.state[loops.BOUND]) + self.scaled.constant - self.bound)
        loops.hopeless(self.grid, unary_C, self.message_G, slack + 1e-9 * abs(upper), hopeless_C)
        return hopeless_C


def continued(up: Ascent, scaled: Scaled) -> Ascent:
    """The same ascent on a grid of the same instance with another cap. Any messages and prices prove a bound."""
    message_G = np.minimum(up.message_G, scaled.cap)
    return replace(up, scaled=scaled, message_G=message_G)


def ascent(scaled: Scaled) -> Ascent:
    """The beginning: no messages, no prices."""
    grid = scaled.grid
    num_times, num_nodes = len(grid.room_T), len(grid.first_N) - 1
    return Ascent(
        scaled=scaled,
        message_G=np.zeros(int(grid.message_first_X[-1])),
        price_T=np.zeros(num_times),
        best_price_T=np.zeros(num_times),
        drift_T=np.zeros(num_times),
        state=np.array([-math.inf, PACES[0].step, 0.0, 0.0]),
        choice_N=np.zeros(num_nodes, dtype=np.int64),
    )
