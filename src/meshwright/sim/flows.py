"""When ordered work happens where tasks share links or cores, each at its max-min fair rate.

As in `sweep`, tasks run in streams and wait for others; here a task first takes its fixed seconds (latency), then moves
its work (bytes, core-seconds) over the resources of its route, as fast as all who are at it leave room. Rates are those
of progressive filling: all grow alike until a resource is full or a task has reached its cap, those stop, the others go
on (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2). This is the fluid limit of many small packets under
fair queueing; left out are packets, congestion control that converges slowly, and unfair protocols.

Cost: tasks that share nothing run ahead of the clock as in `sweep`, in O(tasks + needs). When the set of flows changes,
what depends on it is found anew: O(c (r + log c)) for c flows of r resources each in the component that changed. A
resource that its flows could not fill even at their peaks joins nothing, so a network that does not block costs
little. Flows that start or end together are one change.

Legend: N tasks, numbered stream by stream; S streams; E needs; L resources; R route entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.sweep import FloatArray, IndexArray, Streams, Swept, sweep

#: Relative distance below which times are one event and rates one rate: what arithmetic makes of equal numbers.
SAME = 1e-12

#: More route entries or tasks than this are simulated by compiled code; below, loading it would take longer.
COMPILE_FROM = 1_000


@dataclass(frozen=True)
class Shared:
    """What tasks share, and how much of it they need.

    `capacity_L` is what a resource gives per second (B/s of a link, cores of a host). Task n has `work_N[n]` to move
    (bytes, core-seconds; 0: none, it takes its fixed duration alone) over all the resources
    `routes[route_starts_N[n]]` up to `routes[route_starts_N[n + 1]]` at once, at `cap_N[n]` per second at most.
    Capacities and caps may be infinite. A resource that stands twice in a route carries the task twice.
    """

    capacity_L: FloatArray
    work_N: FloatArray
    route_starts_N: IndexArray
    routes: IndexArray
    cap_N: FloatArray


def simulate_shared(streams: Streams, duration_N: FloatArray, shared: Shared) -> Swept:
    """Run all tasks; each takes `duration_N` seconds and then moves its work. Lags and durations are not negative.

    Where no task shares anything the result is that of `sweep`, to the last bit. Events less than `SAME` apart happen
    at once. Raises `InputError` for arrays that don't fit together or hold what no resource or task can have.

    Two flows of 4 B on a link of 2 B/s, the second a second late. From then on each has 1 B/s, until the first ends:
    >>> streams = Streams(np.array([0, 1, 2]), np.zeros(3, np.int64), np.zeros(0, np.int64))
    >>> shared = Shared(np.array([2.0]), np.array([4.0, 4.0]), np.arange(3), np.array([0, 0]), np.full(2, np.inf))
    >>> simulate_shared(streams, np.array([0.0, 1.0]), shared).end_N
    array([3., 4.])
    """
    _check(streams.num_tasks, shared, duration_N, streams.lag_E)
    peak_N = _peaks(shared.capacity_L, shared.route_starts_N, shared.routes, shared.cap_N)
    alone_N = (np.diff(shared.route_starts_N) == 0) | np.isinf(peak_N)
    own_s_N = duration_N + np.where(alone_N, shared.work_N / peak_N, 0.0)
    shares_N = (shared.work_N > 0) & ~alone_N
    if not shares_N.any():
        return sweep(streams, own_s_N)
    num_tasks, num_streams = streams.num_tasks, len(streams.starts_S) - 1
    start_N, end_N = np.full(num_tasks, np.nan), np.full(num_tasks, np.nan)
    at_S, blocked_on_S = streams.starts_S[:-1].copy(), np.full(num_streams, -1, dtype=np.int64)
    table = _table(shared.capacity_L, peak_N, shared.route_starts_N, shared.routes, num_streams)
    lag_E = np.zeros(0) if streams.lag_E is None else streams.lag_E
    left_N = np.where(shares_N, shared.work_N, 0.0)
    wanted = (streams.starts_S, streams.need_starts_N, streams.needs_E, lag_E, own_s_N, left_N)
    kernel = _kernel("_simulate", num_tasks + len(shared.routes))
    kernel(*wanted, table, start_N, end_N, at_S, blocked_on_S)
    stuck = np.flatnonzero(at_S < streams.starts_S[1:])
    return Swept(start_N, end_N, {int(s): (int(at_S[s]), int(blocked_on_S[s])) for s in stuck})


def max_min_rates(
    capacity_L: FloatArray, route_starts_N: IndexArray, routes: IndexArray, cap_N: FloatArray
) -> FloatArray:
    """The rates of N tasks that are all at work: max-min fair, so that none can have more without a slower one having
    less. Each runs at its cap or has on its route a full resource on which nobody is faster. Arrays as in `Shared`, and
    `InputError` likewise.

    Three links of 1 B/s in a row; one flow over all of them, one over each, one more over the last (a parking lot):
    >>> routes = np.array([0, 1, 2, 0, 1, 2, 2])
    >>> max_min_rates(np.ones(3), np.array([0, 3, 4, 5, 6, 7]), routes, np.full(5, np.inf)).round(6)
    array([0.333333, 0.666667, 0.666667, 0.333333, 0.333333])
    """
    idle_N = np.zeros(len(cap_N))
    _check(len(cap_N), Shared(capacity_L, idle_N, route_starts_N, routes, cap_N), idle_N, None)
    peak_N = _peaks(capacity_L, route_starts_N, routes, cap_N)
    limited_N = np.isfinite(peak_N)
    table = _table(capacity_L, peak_N, route_starts_N, routes, len(peak_N))
    _kernel("_rates_of", len(routes))(np.flatnonzero(limited_N), table)
    return np.where(limited_N, table.fresh_N, np.inf)


def _peaks(capacity_L: FloatArray, route_starts_N: IndexArray, routes: IndexArray, cap_N: FloatArray) -> FloatArray:
    """The rate of each task alone: its cap, or the narrowest of its resources."""
    peak_N = np.array(cap_N, dtype=np.float64)
    routed_N = np.flatnonzero(np.diff(route_starts_N))
    if len(routed_N):
        peak_N[routed_N] = np.minimum(
            peak_N[routed_N], np.minimum.reduceat(capacity_L[routes], route_starts_N[routed_N])
        )
    return peak_N


# --- input ------------------------------------------------------------------------------------------------------------


def _check(num_tasks: int, shared: Shared, duration_N: FloatArray, lag_E: FloatArray | None) -> None:
    problems = list(_problems(num_tasks, shared, duration_N, lag_E))
    if problems:
        raise InputError(problems)


def _problems(num_tasks: int, shared: Shared, duration_N: FloatArray, lag_E: FloatArray | None) -> Iterator[Problem]:
    num_resources = len(shared.capacity_L)
    lengths: list[tuple[str, Any, int]] = [("duration_N", duration_N, num_tasks), ("work_N", shared.work_N, num_tasks)]
    lengths += [("cap_N", shared.cap_N, num_tasks), ("route_starts_N", shared.route_starts_N, num_tasks + 1)]
    unfit = [(where, len(values), needed) for where, values, needed in lengths if len(values) != needed]
    for where, found, needed in unfit:
        yield Problem(where, f"{found} entries", f"{num_tasks} tasks need {needed}", str(needed))
    with np.errstate(invalid="ignore"):
        yield from _first(
            "capacity_L", shared.capacity_L, ~(shared.capacity_L > 0), "a resource gives more than 0 per second"
        )
        yield from _first("cap_N", shared.cap_N, ~(shared.cap_N > 0), "a task can do more than 0 per second")
        finite = "must be finite and not negative"
        for where, values in (("duration_N", duration_N), ("work_N", shared.work_N), ("lag_E", lag_E)):
            if values is not None:
                yield from _first(where, values, ~((values >= 0) & (values < np.inf)), finite)
    unknown = (shared.routes < 0) | (shared.routes >= num_resources)
    yield from _first("routes", shared.routes, unknown, f"is none of the {num_resources} resources")
    if not unfit:
        starts = shared.route_starts_N
        if starts[0] != 0 or starts[-1] != len(shared.routes) or (np.diff(starts) < 0).any():
            rule = f"must rise from 0 to the {len(shared.routes)} entries of routes"
            yield Problem("route_starts_N", f"{starts[0]} ... {starts[-1]}", rule)


def _first(where: str, values: Any, is_wrong: Any, rule: str) -> Iterator[Problem]:
    wrong = np.flatnonzero(is_wrong)
    if len(wrong):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Problem(f"{where}[{wrong[0]}]{more}", str(values[wrong[0]]), rule)


# --- kernel -----------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """Who is at which resource, and room to work out rates: C flows at once at most.

    The flows at resource l are a chain of route entries: `head_L[l]`, then `next_R` of each, -1 at its end.
    `peaks_L` sums what they would take alone. The heap `order`, `place`, `key` holds resources as l, task n as L + n.
    """

    capacity_L: Any
    peak_N: Any
    route_starts_N: Any
    routes: Any
    owner_R: Any
    next_R: Any
    previous_R: Any
    head_L: Any
    peaks_L: Any
    left_L: Any
    count_L: Any
    seen_L: Any
    seen_N: Any
    fresh_N: Any
    seeds_L: Any
    links_L: Any
    flows_C: Any
    order: Any
    place: Any
    key: Any


def _table(capacity_L: Any, peak_N: Any, route_starts_N: Any, routes: Any, num_at_once: int) -> _Table:
    L, N, R = len(capacity_L), len(peak_N), len(routes)
    return _Table(
        capacity_L=np.asarray(capacity_L, dtype=np.float64),
        peak_N=peak_N,
        route_starts_N=np.asarray(route_starts_N, dtype=np.int64),
        routes=np.asarray(routes, dtype=np.int64),
        owner_R=np.repeat(np.arange(N, dtype=np.int32), np.diff(route_starts_N)),
        next_R=np.full(R, -1, dtype=np.int32),
        previous_R=np.full(R, -1, dtype=np.int32),
        head_L=np.full(L, -1, dtype=np.int32),
        peaks_L=np.zeros(L),
        left_L=np.zeros(L),
        count_L=np.zeros(L, dtype=np.int32),
        seen_L=np.zeros(L, dtype=np.int64),
        seen_N=np.zeros(N, dtype=np.int64),
        fresh_N=np.zeros(N),
        seeds_L=np.zeros(L, dtype=np.int32),
        links_L=np.zeros(L, dtype=np.int32),
        flows_C=np.zeros(num_at_once, dtype=np.int32),
        order=np.zeros(L + num_at_once, dtype=np.int32),
        place=np.zeros(L + N, dtype=np.int32),
        key=np.zeros(L + N),
    )


def _kernel(name: str, size: int) -> Callable[..., None]:
    kernel: Callable[..., None] = (_compiled() if size > COMPILE_FROM else globals())[name]
    return kernel


@cache
def _compiled() -> dict[str, Any]:
    """The functions below under their names, compiled: copies that find each other instead of the originals."""
    import numba  # here: half a second that small work does not need

    names = dict(globals())
    helpers = (_sift_up, _sift_down, _enter, _leave, _binds, _visit, _component, _settle, _fill)
    functions: tuple[Any, ...] = (*helpers, _rates_of, _simulate)
    for function in functions:
        names[function.__name__] = numba.njit(cache=True)(FunctionType(function.__code__, names))
    return names


def _sift_up(order: Any, place: Any, key: Any, at: Any) -> None:
    """Move the item at `at` of a binary heap up to where it belongs; `place` is where each item stands."""
    item = order[at]
    while at > 0:
        above = (at - 1) // 2
        if key[order[above]] <= key[item]:
            break
        order[at] = order[above]
        place[order[at]] = at
        at = above
    order[at] = item
    place[item] = at


def _sift_down(order: Any, place: Any, key: Any, at: Any, size: Any) -> None:
    """Move the item at `at` of a heap of `size` items down to where it belongs."""
    item = order[at]
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and key[order[below + 1]] < key[order[below]]:
            below += 1
        if key[item] <= key[order[below]]:
            break
        order[at] = order[below]
        place[order[at]] = at
        at = below
    order[at] = item
    place[item] = at


def _enter(table: Any, n: Any) -> None:
    """Task n begins to use its resources."""
    for entry in range(table.route_starts_N[n], table.route_starts_N[n + 1]):
        link = table.routes[entry]
        first = table.head_L[link]
        table.next_R[entry] = first
        table.previous_R[entry] = -1
        if first >= 0:
            table.previous_R[first] = entry
        table.head_L[link] = entry
        table.peaks_L[link] += table.peak_N[n]


def _leave(table: Any, n: Any) -> None:
    """Task n uses its resources no more."""
    for entry in range(table.route_starts_N[n], table.route_starts_N[n + 1]):
        link = table.routes[entry]
        after = table.next_R[entry]
        before = table.previous_R[entry]
        if after >= 0:
            table.previous_R[after] = before
        if before >= 0:
            table.next_R[before] = after
        else:
            table.head_L[link] = after
        # An empty resource forgets the rounding of its sum.
        table.peaks_L[link] = table.peaks_L[link] - table.peak_N[n] if table.head_L[link] >= 0 else 0.0


def _binds(table: Any, link: Any) -> Any:
    """Whether a resource's flows could fill it; one that they could not is no tie between them."""
    return table.peaks_L[link] > table.capacity_L[link] * (1 + SAME)


def _visit(table: Any, link: Any, num_flows: Any, num_links: Any, turn: Any) -> Any:
    """Take a resource and its flows into the component; returns the new sizes."""
    table.seen_L[link] = turn
    count = 0
    entry = table.head_L[link]
    while entry >= 0:
        n = table.owner_R[entry]
        if table.seen_N[n] != turn:
            table.seen_N[n] = turn
            table.flows_C[num_flows] = n
            num_flows += 1
        count += 1
        entry = table.next_R[entry]
    if _binds(table, link):
        table.links_L[num_links] = link
        num_links += 1
        table.left_L[link] = table.capacity_L[link]
        table.count_L[link] = count
    return num_flows, num_links


def _component(table: Any, num_flows: Any, num_seeds: Any, turn: Any) -> Any:
    """All flows that depend on the first `num_flows` of `flows_C` or on the first `num_seeds` of `seeds_L`, and the
    resources that tie them; returns the numbers of both."""
    num_links = 0
    for at in range(num_flows):
        table.seen_N[table.flows_C[at]] = turn
    for at in range(num_seeds):
        num_flows, num_links = _visit(table, table.seeds_L[at], num_flows, num_links, turn)
    at = 0
    while at < num_flows:
        n = table.flows_C[at]
        for entry in range(table.route_starts_N[n], table.route_starts_N[n + 1]):
            link = table.routes[entry]
            if table.seen_L[link] != turn and _binds(table, link):
                num_flows, num_links = _visit(table, link, num_flows, num_links, turn)
        at += 1
    return num_flows, num_links


def _settle(table: Any, n: Any, rate: Any) -> None:
    """Task n has its rate; its resources have that much less for the others."""
    table.fresh_N[n] = rate
    for entry in range(table.route_starts_N[n], table.route_starts_N[n + 1]):
        link = table.routes[entry]
        if table.count_L[link] > 0:
            table.left_L[link] = max(table.left_L[link] - rate, 0.0)
            table.count_L[link] -= 1


def _fill(table: Any, num_flows: Any, num_links: Any) -> None:
    """Progressive filling of a component: `fresh_N` of its flows. Leaves `count_L` at zero."""
    order, place, key = table.order, table.place, table.key
    num_resources = table.capacity_L.shape[0]
    if num_links == 0:
        for at in range(num_flows):
            table.fresh_N[table.flows_C[at]] = table.peak_N[table.flows_C[at]]
        return
    size = 0
    for at in range(num_links):
        link = table.links_L[at]
        order[size] = link
        key[link] = table.left_L[link] / table.count_L[link]
        size += 1
    for at in range(num_flows):
        n = table.flows_C[at]
        table.fresh_N[n] = -1.0
        order[size] = num_resources + n
        key[num_resources + n] = table.peak_N[n]
        size += 1
    for at in range(size // 2 - 1, -1, -1):
        _sift_down(order, place, key, at, size)
    unsettled = num_flows
    while unsettled > 0:
        item = order[0]
        if item < num_resources and table.count_L[item] > 0:
            # Shares only grow, so a key may be out of date but never too large: it is brought up to date on top.
            share = table.left_L[item] / table.count_L[item]
            if share > key[item]:
                key[item] = share
                _sift_down(order, place, key, 0, size)
                continue
            entry = table.head_L[item]
            while entry >= 0:
                n = table.owner_R[entry]
                if table.fresh_N[n] < 0:
                    _settle(table, n, share)
                    unsettled -= 1
                entry = table.next_R[entry]
        elif item >= num_resources and table.fresh_N[item - num_resources] < 0:
            _settle(table, item - num_resources, table.peak_N[item - num_resources])
            unsettled -= 1
        size -= 1
        order[0] = order[size]
        _sift_down(order, place, key, 0, size)


def _rates_of(tasks: Any, table: Any) -> None:
    """`fresh_N` of tasks that are all at work."""
    for at in range(tasks.shape[0]):
        _enter(table, tasks[at])
        table.flows_C[at] = tasks[at]
    num_flows, num_links = _component(table, tasks.shape[0], 0, 1)
    _fill(table, num_flows, num_links)


def _simulate(
    starts_S: Any,
    need_starts_N: Any,
    needs_E: Any,
    lag_E: Any,
    duration_N: Any,
    left_N: Any,
    table: Any,
    start_N: Any,
    end_N: Any,
    at_S: Any,
    blocked_on_S: Any,
) -> None:
    """Fill `start_N` and `end_N`; `at_S` and `blocked_on_S` as in `sweep`. `left_N` is the work still to move.

    Streams run ahead of the clock until they need a flow's end. Each stream then has one event in the heap: its task
    begins to move its work (`rate_N` is 0), or has moved it all.
    """
    num_tasks = end_N.shape[0]
    num_streams = starts_S.shape[0] - 1
    stream_N = np.empty(num_tasks, dtype=np.int32)
    runnable = np.empty(num_streams, dtype=np.int32)
    for s in range(num_streams):
        stream_N[starts_S[s] : starts_S[s + 1]] = s
        runnable[s] = num_streams - 1 - s
    num_runnable = num_streams
    # Streams that wait for one task are a chain: from the task to the first of them, from each to the next.
    first_waiter_N = np.full(num_tasks, -1, dtype=np.int32)
    next_waiter_S = np.full(num_streams, -1, dtype=np.int32)
    free_S = np.zeros(num_streams)
    has_lag = lag_E.shape[0] > 0
    order = np.empty(num_streams, dtype=np.int32)
    place = np.full(num_tasks, -1, dtype=np.int32)
    key = np.zeros(num_tasks)
    size = 0
    rate_N = np.zeros(num_tasks)
    since_N = np.zeros(num_tasks)
    now = 0.0
    together_until = -1.0
    turn = 1
    num_joined = 0
    num_seeds = 0
    while True:
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
                if left_N[task] > 0:
                    key[task] = free
                    order[size] = task
                    _sift_up(order, place, key, size)
                    size += 1
                    break
                end_N[task] = free
                waiter = first_waiter_N[task]
                while waiter >= 0:
                    runnable[num_runnable] = waiter
                    num_runnable += 1
                    waiter = next_waiter_S[waiter]
                task += 1
            at_S[s] = task
            free_S[s] = free
        if size == 0 or key[order[0]] > together_until:
            if num_joined + num_seeds > 0:
                num_flows, num_links = _component(table, num_joined, num_seeds, turn)
                _fill(table, num_flows, num_links)
                for at in range(num_flows):
                    n = table.flows_C[at]
                    fresh = table.fresh_N[n]
                    if abs(fresh - rate_N[n]) > SAME * fresh:
                        left_N[n] = max(left_N[n] - rate_N[n] * (now - since_N[n]), 0.0)
                        since_N[n] = now
                        rate_N[n] = fresh
                        key[n] = now + left_N[n] / fresh
                        if place[n] < 0:
                            order[size] = n
                            place[n] = size
                            size += 1
                        _sift_up(order, place, key, place[n])
                        _sift_down(order, place, key, place[n], size)
                num_joined = 0
                num_seeds = 0
                turn += 1
            if size == 0:
                break
            together_until = key[order[0]] * (1 + SAME)
        n = order[0]
        place[n] = -1
        size -= 1
        if size > 0:
            order[0] = order[size]
            _sift_down(order, place, key, 0, size)
        now = max(now, key[n])
        if rate_N[n] == 0:
            _enter(table, n)
            table.flows_C[num_joined] = n
            num_joined += 1
            continue
        for entry in range(table.route_starts_N[n], table.route_starts_N[n + 1]):
            link = table.routes[entry]
            if table.seen_L[link] != turn and _binds(table, link):
                table.seen_L[link] = turn
                table.seeds_L[num_seeds] = link
                num_seeds += 1
        _leave(table, n)
        end_N[n] = key[n]
        s = stream_N[n]
        at_S[s] = n + 1
        free_S[s] = key[n]
        runnable[num_runnable] = s
        num_runnable += 1
        waiter = first_waiter_N[n]
        while waiter >= 0:
            runnable[num_runnable] = waiter
            num_runnable += 1
            waiter = next_waiter_S[waiter]
