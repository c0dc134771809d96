"""Dynamic programs over states of a lattice: from the end to the front, stage by stage, device by device.

best[s, v, d] is the best that s stages on exactly d devices can make of what is left in state v. The first of these s
stages has as many microbatches in flight as its distance from the end says, so that memory is checked exactly. Alpa's
equation 3 (2201.12023) adds the seconds of the stages, under a cap on each; PipeDream's, RaNNC's and Piper's take the
largest. The loops are compiled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np

from meshwright.search.choose.solver import ENDLESS, Deadline
from meshwright.search.pipelines.lattice import StageTable
from meshwright.search.stages import Array, StagePlan


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a dynamic program found: the value of its best plan and the plan's stages, (transition, index of size)."""

    value: float
    stages: tuple[tuple[int, int], ...] = ()
    slowest_s: float = math.inf


@numba.njit(cache=True)
def _sweep(first_V, next_T, distinct_T, time_QGN, sizes_N, num_devices, cap_s, adds):  # type: ignore[no-untyped-def]
    num_stages, _, num_sizes = time_QGN.shape
    num_states = len(first_V) - 1
    best = np.full((num_stages + 1, num_states, num_devices + 1), np.inf)
    chosen = np.full((num_stages + 1, num_states, num_devices + 1), -1, dtype=np.int64)
    reached = np.zeros((num_stages + 1, num_states), dtype=np.bool_)
    best[0, num_states - 1, 0] = 0.0
    reached[0, num_states - 1] = True
    for s in range(1, num_stages + 1):
        for v in range(num_states - 1):
            for t in range(first_V[v], first_V[v + 1]):
                after = next_T[t]
                if not reached[s - 1, after]:
                    continue
                for n in range(num_sizes):
                    took_s = time_QGN[s - 1, distinct_T[t], n]
                    if not took_s <= cap_s or took_s == np.inf:
                        continue
                    size = sizes_N[n]
                    code = t * num_sizes + n
                    for d in range(size, num_devices + 1):
                        rest = best[s - 1, after, d - size]
                        value = took_s + rest if adds else max(took_s, rest)
                        if value < best[s, v, d]:
                            best[s, v, d] = value
                            chosen[s, v, d] = code
                            reached[s, v] = True
    return best, chosen


def sweep(
    table: StageTable, num_devices: int, cap_s: float = math.inf, *, adds: bool = True, stages: int | None = None
) -> Sweep:
    """The best plan on exactly `num_devices` devices with no turn longer than `cap_s`, and of so many `stages` where
    that is given: by the sum of its turns, or by the longest. Infinite where there is none."""
    lattice = table.lattice
    unit = math.gcd(num_devices, *table.sizes_N.tolist())
    best, chosen = _sweep(
        lattice.first_V,
        lattice.next_T,
        lattice.distinct_T,
        np.ascontiguousarray(table.time_QGN),
        table.sizes_N // unit,
        num_devices // unit,
        cap_s,
        adds,
    )
    whole = best[:, 0, num_devices // unit].copy()
    whole[0] = np.inf
    s = int(whole.argmin()) if stages is None else stages
    if not s < len(whole) or not math.isfinite(whole[s]):
        return Sweep(math.inf)
    return _traced(table, chosen, float(whole[s]), s, num_devices // unit, table.sizes_N // unit)


def _traced(table: StageTable, chosen: Array, value: float, s: int, devices: int, sizes_N: Array) -> Sweep:
    stages: list[tuple[int, int]] = []
    slowest_s, state = 0.0, 0
    while s:
        transition, size = divmod(int(chosen[s, state, devices]), len(sizes_N))
        stages.append((transition, size))
        slowest_s = max(slowest_s, float(table.time_QGN[s - 1, table.lattice.distinct_T[transition], size]))
        state, devices, s = int(table.lattice.next_T[transition]), devices - int(sizes_N[size]), s - 1
    return Sweep(value, tuple(stages), slowest_s)


@dataclass(frozen=True, eq=False)
class Found:
    """The best plan of a search, its objective, and what no plan's objective is below."""

    plan: StagePlan | None
    objective: float
    lower_bound: float
    stages: tuple[tuple[int, int], ...] = ()
    num_sweeps: int = 0


def least_pipeline_time(
    table: StageTable, num_devices: int, num_microbatches: int, deadline: Deadline = ENDLESS
) -> Found:
    """The plan with the least sum of turns plus m - 1 times the longest (2201.12023, equation 2), exactly.

    Alpa tries every value that the longest turn may have, in steps of a tolerance. Here g(c), the least sum of turns
    under a cap c, is evaluated at few of them: g falls with c, so that between two caps no plan is better than g at the
    upper one plus m - 1 times the lower; intervals whose bound is above the best plan so far are left out.
    """
    search = _CapSearch(table, num_devices, num_microbatches - 1, deadline)
    shortest = sweep(table, num_devices, adds=False)
    if not math.isfinite(shortest.value):
        return Found(None, math.inf, math.inf, num_sweeps=1)
    caps = np.unique(table.time_QGN[np.isfinite(table.time_QGN)])
    caps = caps[caps >= shortest.slowest_s]
    search.run(caps)
    return Found(table.plan(search.stages), search.best, search.bound, search.stages, search.num_sweeps + 1)


@dataclass(eq=False)
class _CapSearch:
    """The intervals of caps that are still open, and the best so far. Made, run once, read."""

    table: StageTable
    num_devices: int
    turns: int
    deadline: Deadline
    best: float = math.inf
    bound: float = math.inf
    stages: tuple[tuple[int, int], ...] = ()
    num_sweeps: int = 0
    _open: list[tuple[int, int, float]] = field(default_factory=list)

    def run(self, caps: Any) -> None:
        """Look through all caps, ascending."""
        # The smallest cap at which there is a plan, then the largest, with the least g.
        self._at(float(caps[0]))
        last = self._at(float(caps[-1]))
        self._close(caps, 0, int(np.searchsorted(caps, last.slowest_s)), last.value)
        while self._open:
            low, high, least_sum = min(self._open, key=lambda each: each[2] + self.turns * float(caps[each[0] + 1]))
            bound = least_sum + self.turns * float(caps[low + 1])
            if bound >= self.best or self.deadline.passed:
                self.bound = min(self.best, bound)
                return
            self._open.remove((low, high, least_sum))
            # Caps are many where they are close: halve the seconds, not their number.
            middle = int(np.searchsorted(caps, (caps[low + 1] + caps[high - 1]) / 2))
            middle = min(max(middle, low + 1), high - 1)
            found = self._at(float(caps[middle]))
            self._close(caps, middle, high, least_sum)
            self._close(caps, low, int(np.searchsorted(caps, found.slowest_s)), found.value)
        self.bound = self.best

    def _at(self, cap_s: float) -> Sweep:
        found = sweep(self.table, self.num_devices, cap_s)
        self.num_sweeps += 1
        if found.value + self.turns * found.slowest_s < self.best:
            self.best, self.stages = found.value + self.turns * found.slowest_s, found.stages
        return found

    def _close(self, caps: Any, low: int, high: int, least_sum: float) -> None:
        """Keep the caps strictly between two that are done, as far as they may hold something better."""
        high = min(high, int(np.searchsorted(caps, (self.best - least_sum) / self.turns if self.turns else -1.0)))
        if high - low > 1:
            self._open.append((low, high, least_sum))


def least_longest_turn(table: StageTable, num_devices: int, stages: int | None = None) -> Found:
    """The plan whose longest turn is the shortest; of those the one whose turns are least in sum."""
    shortest = sweep(table, num_devices, adds=False, stages=stages)
    if not math.isfinite(shortest.value):
        return Found(None, math.inf, math.inf, num_sweeps=1)
    found = sweep(table, num_devices, shortest.value, stages=stages)
    return Found(table.plan(found.stages), shortest.value, shortest.value, found.stages, 2)


def longest_turns(table: StageTable, num_devices: int) -> list[Sweep]:
    """For each number of stages, from one on, the plan whose longest turn is the shortest."""
    lattice = table.lattice
    unit = math.gcd(num_devices, *table.sizes_N.tolist())
    sizes_N, devices = table.sizes_N // unit, num_devices // unit
    times = np.ascontiguousarray(table.time_QGN)
    best, chosen = _sweep(lattice.first_V, lattice.next_T, lattice.distinct_T, times, sizes_N, devices, math.inf, False)
    values = [float(best[s, 0, devices]) for s in range(1, len(best))]
    return [
        _traced(table, chosen, value, s, devices, sizes_N) if math.isfinite(value) else Sweep(math.inf)
        for s, value in enumerate(values, start=1)
    ]
