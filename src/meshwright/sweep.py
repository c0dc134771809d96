"""When ordered work happens: tasks in streams, each stream in its own order, tasks waiting for others.

The one engine for fixed durations, below schedules (which replay a table with it), costs and the simulator: a task
starts when the one before it in its stream has ended and what it needs has arrived. That is a longest path, found in
one pass without a queue of events: a stream runs until it waits for a task that is not done, and goes on when that is.
Time and memory grow with the number of tasks and needs alone. What shares a resource at a rate that depends on who else
uses it is in `sim.flows`.

Legend: N tasks, numbered stream by stream; S streams; E needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

#: More tasks than this are swept by compiled code; below, loading the compiler would take longer than the sweep.
COMPILE_FROM = 20_000


@dataclass(frozen=True)
class Streams:
    """Tasks in order, with what they wait for.

    Stream s holds tasks `starts_S[s]` up to `starts_S[s + 1]`; task n needs tasks `needs_E[need_starts_N[n]]` up to
    `needs_E[need_starts_N[n + 1]]`, each of which arrives `lag_E` seconds after it has ended (None: at once).
    """

    starts_S: IndexArray
    need_starts_N: IndexArray
    needs_E: IndexArray
    lag_E: FloatArray | None = None

    @property
    def num_tasks(self) -> int:
        """N."""
        return int(self.starts_S[-1])

    def stream_of(self, task: int) -> int:
        """The stream that holds a task."""
        return int(np.searchsorted(self.starts_S, task, side="right")) - 1


@dataclass(frozen=True)
class Swept:
    """When each task starts and ends, in the unit of the durations, and the streams that never ended: `waits` maps each
    of them to (the task that it is at, the task that this waits for)."""

    start_N: FloatArray
    end_N: FloatArray
    waits: dict[int, tuple[int, int]]


def sweep(streams: Streams, duration_N: FloatArray) -> Swept:
    """Run all tasks; durations are finite and not negative.

    >>> two = Streams(np.array([0, 2, 3]), np.array([0, 0, 0, 1]), np.array([0]))  # the second stream needs task 0
    >>> sweep(two, np.array([1.0, 1.0, 5.0])).end_N
    array([1., 2., 6.])
    """
    num_tasks, num_streams = streams.num_tasks, len(streams.starts_S) - 1
    lag_E = np.zeros(0) if streams.lag_E is None else streams.lag_E
    start_N, end_N = np.empty(num_tasks), np.full(num_tasks, np.nan)
    blocked_on_S, at_S = np.full(num_streams, -1, dtype=np.int64), streams.starts_S[:-1].copy()
    kernel = _compiled() if num_tasks > COMPILE_FROM else _sweep
    kernel(
        streams.starts_S, streams.need_starts_N, streams.needs_E, lag_E, duration_N, start_N, end_N, at_S, blocked_on_S
    )
    stuck = np.flatnonzero(at_S < streams.starts_S[1:])
    return Swept(start_N, end_N, {int(s): (int(at_S[s]), int(blocked_on_S[s])) for s in stuck})


@cache
def _compiled() -> Callable[..., None]:
    import numba  # here: half a second that small work does not need

    compiled: Callable[..., None] = numba.njit(cache=True)(_sweep)
    return compiled


def _sweep(
    starts_S: Any,
    need_starts_N: Any,
    needs_E: Any,
    lag_E: Any,
    duration_N: Any,
    start_N: Any,
    end_N: Any,
    at_S: Any,
    blocked_on_S: Any,
) -> None:
    """Fill `start_N` and `end_N`; `at_S` ends at each stream's first task that could not run, `blocked_on_S` at what
    this waits for."""
    num_streams = starts_S.shape[0] - 1
    # Streams that wait for one task are a chain: from the task to the first of them, from each to the next.
    first_waiter_N = np.full(end_N.shape[0], -1, dtype=np.int32)
    next_waiter_S = np.full(num_streams, -1, dtype=np.int32)
    free_S = np.zeros(num_streams)
    runnable = np.empty(num_streams, dtype=np.int32)
    for s in range(num_streams):
        runnable[s] = num_streams - 1 - s
    num_runnable = num_streams
    has_lag = lag_E.shape[0] > 0
    while num_runnable > 0:
        num_runnable -= 1
        s = runnable[num_runnable]
        task = at_S[s]
        stop = starts_S[s + 1]
        free = free_S[s]
        while task < stop:
            begin = free
            missing = -1
            for e in range(need_starts_N[task], need_starts_N[task + 1]):
                need = needs_E[e]
                arrived = end_N[need]
                if arrived != arrived:  # not a number: not done
                    missing = need
                    break
                if has_lag:
                    arrived += lag_E[e]
                if arrived > begin:
                    begin = arrived
            if missing >= 0:
                blocked_on_S[s] = missing
                next_waiter_S[s] = first_waiter_N[missing]
                first_waiter_N[missing] = s
                break
            start_N[task] = begin
            free = begin + duration_N[task]
            end_N[task] = free
            waiter = first_waiter_N[task]
            while waiter >= 0:
                runnable[num_runnable] = waiter
                num_runnable += 1
                waiter = next_waiter_S[waiter]
            task += 1
        at_S[s] = task
        free_S[s] = free


def circle_of_waits(streams: Streams, waits: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """Of streams that never ended, a circle: pairs of (a task, the task that it waits for), the latter in the stream of
    the next pair's first, or nowhere done because its own stream is stuck there."""
    path = [min(waits)]
    # What a stuck stream waits for is in a stream that is stuck too, before or at it: the path must come back.
    while (stream := streams.stream_of(waits[path[-1]][1])) not in path:
        path.append(stream)
    return [waits[stream] for stream in path[path.index(stream) :]]
