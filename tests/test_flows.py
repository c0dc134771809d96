"""Shared links and cores: flows worked by hand, max-min fairness by its definition, the sweep as a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.sim import flows
from meshwright.sim.flows import Shared, max_min_rates, simulate_shared
from meshwright.sweep import FloatArray, IndexArray, Streams, Swept, circle_of_waits, sweep


@dataclass(frozen=True)
class Task:
    """`seconds` alone, then `work` over `route`; `needs` are (task, lag in seconds)."""

    seconds: float = 0.0
    work: float = 0.0
    route: tuple[int, ...] = ()
    cap: float = np.inf
    needs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Case:
    """Streams of tasks and what they share, as arrays."""

    streams: Streams
    duration_N: FloatArray
    shared: Shared

    def run(self) -> Swept:
        return simulate_shared(self.streams, self.duration_N, self.shared)


def starts_of(lengths: Sequence[int]) -> IndexArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def case(capacities: Sequence[float], *streams: Sequence[Task]) -> Case:
    tasks = [task for stream in streams for task in stream]
    needs = [need for task in tasks for need in task.needs]
    return Case(
        Streams(
            starts_of([len(stream) for stream in streams]),
            starts_of([len(task.needs) for task in tasks]),
            np.array([need for need, _ in needs], dtype=np.int64),
            np.array([lag for _, lag in needs], dtype=np.float64),
        ),
        np.array([task.seconds for task in tasks], dtype=np.float64),
        Shared(
            np.array(capacities, dtype=np.float64),
            np.array([task.work for task in tasks], dtype=np.float64),
            starts_of([len(task.route) for task in tasks]),
            np.array([link for task in tasks for link in task.route], dtype=np.int64),
            np.array([task.cap for task in tasks], dtype=np.float64),
        ),
    )


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_two_flows_on_one_link_and_one_ends_early() -> None:
    # 10 B/s. 5 B each at 20 B and 50 B: both at 5 B/s until 20 / 5 = 4 s, then the other has 50 - 20 = 30 B left at
    # 10 B/s: 4 + 3 = 7 s.
    swept = case([10.0], [Task(work=20, route=(0,))], [Task(work=50, route=(0,))]).run()
    assert swept.end_N == pytest.approx([4.0, 7.0], rel=1e-12)
    assert swept.start_N.tolist() == [0.0, 0.0]
    assert swept.waits == {}


def test_latency_comes_first_and_takes_no_share() -> None:
    # The second flow's 2 s of latency leave the link to the first: 20 B moved by then, 30 B left; at 5 B/s each the
    # first ends at 2 + 6 = 8 s with 30 of the other's 40 B moved; the last 10 B take 1 s.
    swept = case([10.0], [Task(work=50, route=(0,))], [Task(seconds=2, work=40, route=(0,))]).run()
    assert swept.end_N == pytest.approx([8.0, 9.0], rel=1e-12)
    assert swept.start_N.tolist() == [0.0, 0.0]


def test_a_cap_leaves_the_rest_to_others() -> None:
    # 10 B/s, one flow capped at 2: the other has 8. 16 B / 8 = 2 s; the capped one stays at 2 B/s: 8 / 2 = 4 s.
    swept = case([10.0], [Task(work=8, route=(0,), cap=2.0)], [Task(work=16, route=(0,))]).run()
    assert swept.end_N == pytest.approx([4.0, 2.0], rel=1e-12)


def test_a_parking_lot() -> None:
    # Links of 1, 2 and 3 B/s; a long flow over all, one more on each. The long one has 1/2, what is left over is
    # 1/2, 3/2 and 5/2.
    rates = max_min_rates(
        np.array([1.0, 2.0, 3.0]), np.array([0, 3, 4, 5, 6]), np.array([0, 1, 2, 0, 1, 2]), np.full(4, np.inf)
    )
    assert rates == pytest.approx([0.5, 0.5, 1.5, 2.5], rel=1e-12)
    # 1 B each: the fast ones end at 0.4 and 2/3 s, which gives the long one nothing, for the first link is full until
    # 2 s, when both on it end.
    one = [[Task(work=1, route=(0, 1, 2))], *([Task(work=1, route=(link,))] for link in range(3))]
    assert case([1, 2, 3], *one).run().end_N == pytest.approx([2.0, 2.0, 2 / 3, 0.4], rel=1e-12)


def test_rates_over_cores() -> None:
    # 4 cores; a process of 8 threads, two of one thread: caps 8, 1, 1: the first has the 2 that are left over.
    rates = max_min_rates(np.array([4.0]), np.arange(4), np.zeros(3, np.int64), np.array([8.0, 1.0, 1.0]))
    assert rates.tolist() == [2.0, 1.0, 1.0]
    # Six processes of one thread on 4 cores run at 2/3: 3 core-seconds take 4.5 s.
    assert case([4.0], *([Task(work=3, route=(0,), cap=1.0)] for _ in range(6))).run().end_N == pytest.approx([4.5] * 6)


def test_a_resource_that_stands_twice_carries_twice() -> None:
    assert max_min_rates(np.array([1.0]), np.array([0, 2]), np.array([0, 0]), np.array([np.inf])) == pytest.approx(0.5)


def test_what_has_no_limit() -> None:
    # No route: the cap alone. Neither cap nor route, or an infinite resource: no time.
    swept = case([np.inf], [Task(1, 6, (), 3.0)], [Task(1, 6)], [Task(1, 6, (0,))], [Task(1, 6, (0,), 2.0)]).run()
    assert swept.end_N.tolist() == [3.0, 1.0, 1.0, 4.0]
    assert max_min_rates(np.array([np.inf]), np.array([0, 0, 1]), np.array([0]), np.full(2, np.inf)).tolist() == [
        np.inf,
        np.inf,
    ]


def test_order_in_a_stream_needs_and_lags() -> None:
    # Stream 0: 10 B then 10 B on a link of 10 B/s. Stream 1 computes 1.5 s and then needs task 0 with a lag of 1 s:
    # it starts at 2 s, when the link is its own again. Stream 2 needs that with a lag of 0.25 s.
    swept = case(
        [10.0],
        [Task(work=10, route=(0,)), Task(work=10, route=(0,))],
        [Task(1.5), Task(work=10, route=(0,), needs=((0, 1.0),))],
        [Task(0.5, needs=((3, 0.25),))],
    ).run()
    assert swept.start_N == pytest.approx([0, 1, 0, 2, 3.25], rel=1e-12)
    assert swept.end_N == pytest.approx([1, 2, 1.5, 3, 3.75], rel=1e-12)


def test_who_is_woken_by_a_flow_competes_at_once() -> None:
    # 10 B on link 0, then (a need) 10 B on link 1, where a flow of 30 B began at 0. Link 1 has 10 B/s, so 10 B of the
    # 30 have moved at 1 s; then 5 B/s each: the second ends at 3 s, the third has 10 B left and ends at 4 s.
    swept = case(
        [10, 10], [Task(work=10, route=(0,))], [Task(work=10, route=(1,), needs=((0, 0),))], [Task(work=30, route=(1,))]
    ).run()
    assert swept.end_N == pytest.approx([1, 3, 4], rel=1e-12)


def test_streams_that_wait_for_each_other_are_named() -> None:
    # As in sweep: stream 0 moves bytes and then needs task 3, which stands behind task 2, which needs task 1.
    stuck = case(
        [1.0],
        [Task(work=2, route=(0,)), Task(1, needs=((3, 0),))],
        [Task(work=1, route=(0,), needs=((1, 0),)), Task(1)],
        [Task(work=1, route=(0,))],
    )
    swept = stuck.run()
    assert swept.waits == {0: (1, 3), 1: (2, 1)}
    assert circle_of_waits(stuck.streams, swept.waits) == [(1, 3), (2, 1)]
    assert swept.end_N[[0, 4]] == pytest.approx([3.0, 2.0])
    assert np.isnan(swept.end_N[1:4]).all()


def test_all_that_is_wrong_is_said_at_once() -> None:
    good = case([1.0], [Task(work=1, route=(0,))], [Task(1)])
    shared = Shared(
        np.array([0.0]), np.array([-1.0, np.nan]), np.array([0, 1, 1]), np.array([3]), np.array([0.0, np.inf])
    )
    with pytest.raises(InputError) as caught:
        simulate_shared(good.streams, np.array([1.0, -2.0]), shared)
    assert str(caught.value).splitlines() == [
        "capacity_L[0] = 0.0: a resource gives more than 0 per second",
        "cap_N[0] = 0.0: a task can do more than 0 per second",
        "duration_N[1] = -2.0: must be finite and not negative",
        "work_N[0] (and 1 more) = -1.0: must be finite and not negative",
        "routes[0] = 3: is none of the 1 resources",
    ]
    with pytest.raises(InputError, match=r"route_starts_N = 2 entries: 2 tasks need 3 \(nearest: 3\)"):
        simulate_shared(
            good.streams, good.duration_N, Shared(np.ones(1), np.ones(2), np.arange(2), np.zeros(1, int), np.ones(2))
        )
    with pytest.raises(InputError, match=r"route_starts_N = 0 ... 2: must rise from 0 to the 1 entries of routes"):
        simulate_shared(
            good.streams, good.duration_N, Shared(np.ones(1), np.ones(2), np.arange(3), np.zeros(1, int), np.ones(2))
        )


def test_rates_of_what_cannot_be_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        max_min_rates(np.array([1.0, np.nan]), np.array([0, 1]), np.array([2]), np.array([-1.0]))
    assert str(caught.value).splitlines() == [
        "capacity_L[1] = nan: a resource gives more than 0 per second",
        "cap_N[0] = -1.0: a task can do more than 0 per second",
        "routes[0] = 2: is none of the 2 resources",
    ]


# --- properties -------------------------------------------------------------------------------------------------------

SPEEDS = st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]) | st.floats(0.01, 100.0)


@st.composite
def flow_sets(draw: st.DrawFn) -> tuple[FloatArray, IndexArray, IndexArray, FloatArray]:
    """Capacities, routes and caps of up to 12 flows over up to 6 links."""
    capacities = draw(st.lists(SPEEDS, min_size=1, max_size=6))
    routes = draw(
        st.lists(st.lists(st.integers(0, len(capacities) - 1), min_size=1, max_size=4), min_size=1, max_size=12)
    )
    caps = [draw(SPEEDS | st.just(np.inf)) for _ in routes]
    flat = [link for route in routes for link in route]
    return np.array(capacities), starts_of([len(r) for r in routes]), np.array(flat, dtype=np.int64), np.array(caps)


def check_max_min(
    capacity_L: FloatArray, route_starts_N: IndexArray, routes: IndexArray, cap_N: FloatArray, rate_N: FloatArray
) -> None:
    """Bertsekas and Gallager's definition: nothing overloaded, and each flow at its cap or with a bottleneck, a full
    link on which nobody is faster. Only one set of rates is so."""
    owners = np.repeat(np.arange(len(cap_N)), np.diff(route_starts_N))
    load_L = np.bincount(routes, weights=rate_N[owners], minlength=len(capacity_L))
    assert (load_L <= capacity_L * (1 + 1e-9)).all()
    assert (rate_N <= cap_N * (1 + 1e-9)).all()
    full_L = load_L >= capacity_L * (1 - 1e-9)
    for n, (begin, end) in enumerate(pairwise(route_starts_N)):
        bottleneck = any(
            full_L[link] and rate_N[n] >= rate_N[owners[routes == link]].max() * (1 - 1e-9)
            for link in routes[begin:end]
        )
        assert bottleneck or rate_N[n] >= cap_N[n] * (1 - 1e-9), n


@given(flow_sets())
@settings(deadline=None)
def test_rates_are_max_min_fair(flow_set: tuple[FloatArray, IndexArray, IndexArray, FloatArray]) -> None:
    check_max_min(*flow_set, max_min_rates(*flow_set))


@st.composite
def cases(draw: st.DrawFn, *, ordered: bool = True) -> Case:
    """Up to 6 streams of up to 4 tasks; needs point to tasks of lower position, so that nothing waits in a circle."""
    capacities = draw(st.lists(SPEEDS, min_size=1, max_size=4))
    lengths = draw(st.lists(st.integers(1, 4 if ordered else 1), min_size=1, max_size=6))
    starts = starts_of(lengths)
    streams = []
    for length in lengths:
        stream = []
        for position in range(length):
            earlier = [int(s) + p for s, n in zip(starts, lengths, strict=False) for p in range(min(n, position))]
            needs = draw(st.lists(st.tuples(st.sampled_from(earlier), st.floats(0, 2)), max_size=2)) if earlier else []
            stream.append(
                Task(
                    draw(st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 3)),
                    draw(st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0.01, 9)),
                    tuple(draw(st.lists(st.integers(0, len(capacities) - 1), max_size=3, unique=True))),
                    draw(SPEEDS | st.just(np.inf)),
                    tuple(needs),
                )
            )
        streams.append(stream)
    return case(capacities, *streams)


@given(cases())
@settings(deadline=None)
def test_work_is_conserved_at_fair_rates(some: Case) -> None:
    """Between any two events the rates of those at work, found afresh, move exactly each task's work in all; and each
    task starts when its needs have arrived and its stream is free."""
    swept, shared, streams = some.run(), some.shared, some.streams
    assert swept.waits == {}
    from_N = swept.start_N + some.duration_N
    moves_N = (shared.work_N > 0) & ((np.diff(shared.route_starts_N) > 0) | np.isfinite(shared.cap_N))
    moments = np.unique(np.concatenate([from_N[moves_N], swept.end_N[moves_N]]))
    moved_N = np.zeros(len(from_N))
    for begin, end in pairwise(moments):
        if end - begin <= 1e-11 * end:
            continue  # one event to the simulator
        now = np.flatnonzero(moves_N & (from_N <= begin + 1e-11 * end) & (swept.end_N >= end - 1e-11 * end))
        parts = [shared.routes[shared.route_starts_N[n] : shared.route_starts_N[n + 1]] for n in now]
        chosen = (starts_of([len(p) for p in parts]), np.concatenate([*parts, np.zeros(0, np.int64)]))
        rates = max_min_rates(shared.capacity_L, *chosen, shared.cap_N[now])
        check_max_min(shared.capacity_L, *chosen, shared.cap_N[now], rates)
        moved_N[now] += rates * (end - begin)
    assert moved_N[moves_N] == pytest.approx(shared.work_N[moves_N], rel=1e-7, abs=1e-9)
    assert (swept.end_N[~moves_N] == from_N[~moves_N]).all()
    assert streams.lag_E is not None
    for n in range(streams.num_tasks):
        needed = range(streams.need_starts_N[n], streams.need_starts_N[n + 1])
        before = [swept.end_N[n - 1]] if n not in streams.starts_S else [0.0]
        before += [swept.end_N[streams.needs_E[e]] + streams.lag_E[e] for e in needed]
        assert swept.start_N[n] == max(before)


@given(cases(ordered=False), st.floats(1, 10))
@settings(deadline=None)
def test_more_capacity_never_delays_independent_flows_on_one_link(some: Case, more: float) -> None:
    """On one resource; over several it can, as the next test shows."""
    shared = some.shared
    one = Shared(
        shared.capacity_L[:1],
        shared.work_N,
        np.arange(len(shared.work_N) + 1),
        np.zeros(len(shared.work_N), np.int64),
        shared.cap_N,
    )
    before = simulate_shared(some.streams, some.duration_N, one)
    wider = Shared(one.capacity_L * more, one.work_N, one.route_starts_N, one.routes, one.cap_N)
    after = simulate_shared(some.streams, some.duration_N, wider)
    assert after.end_N.max() <= before.end_N.max() * (1 + 1e-9)


@pytest.mark.parametrize(("first_link", "last_end"), [(2.0, 2.7), (3.0, 167 / 60)])
def test_a_wider_link_can_delay_the_last_flow(first_link: float, last_end: float) -> None:
    # Links of 2, 4 and 5 B/s. A: 1 B over link 0; B: 3 B over 0 and 2; C and D: 4 and 6 B over 1 and 2.
    # Rates 1 1 2 2 until 1 s (A ends), 5/3 for B, C, D until 2.2 s (B and C end), then 4 for D's last 2 B: 2.7 s.
    # With 3 B/s on link 0: 3/2 3/2 7/4 7/4 until 2/3 s, 5/3 each until 28/15 s (B ends), 2 2 until 137/60 s (C ends),
    # 4 for D's last 2 B: 167/60 s. B was quicker at the cost of C, with which D shares link 1.
    tasks = [
        Task(work=1, route=(0,)),
        Task(work=3, route=(0, 2)),
        Task(work=4, route=(1, 2)),
        Task(work=6, route=(1, 2)),
    ]
    assert case([first_link, 4, 5], *([task] for task in tasks)).run().end_N.max() == pytest.approx(last_end, rel=1e-12)


@given(cases(ordered=False), st.floats(1, 10))
@settings(deadline=None)
def test_a_network_that_is_faster_everywhere_is_never_later(some: Case, more: float) -> None:
    """All capacities and caps times k: every independent flow without latency ends k times earlier."""
    still = np.zeros(len(some.duration_N))
    before = simulate_shared(some.streams, still, some.shared)
    shared = some.shared
    faster = Shared(shared.capacity_L * more, shared.work_N, shared.route_starts_N, shared.routes, shared.cap_N * more)
    after = simulate_shared(some.streams, still, faster)
    assert after.end_N * more == pytest.approx(before.end_N, rel=1e-7)


@given(cases())
@settings(deadline=None)
def test_without_sharing_it_is_the_sweep_to_the_last_bit(some: Case) -> None:
    nothing = Shared(some.shared.capacity_L, some.shared.work_N * 0, *_routes(some), some.shared.cap_N)
    swept = sweep(some.streams, some.duration_N)
    for shared in (
        nothing,
        Shared(some.shared.capacity_L * np.inf, some.shared.work_N, *_routes(some), _no_caps(some)),
    ):
        found = simulate_shared(some.streams, some.duration_N, shared)
        assert found.start_N.tolist() == swept.start_N.tolist()
        assert found.end_N.tolist() == swept.end_N.tolist()


@given(cases())
@settings(deadline=None)
def test_huge_capacity_is_the_sweep(some: Case) -> None:
    """Here the events are simulated: finite capacities, flows that move their work in next to no time."""
    huge = Shared(some.shared.capacity_L * 1e18, some.shared.work_N, *_routes(some), _no_caps(some))
    found, swept = simulate_shared(some.streams, some.duration_N, huge), sweep(some.streams, some.duration_N)
    assert found.start_N == pytest.approx(swept.start_N, rel=1e-12, abs=1e-12)
    assert found.end_N == pytest.approx(swept.end_N, rel=1e-12, abs=1e-12)


def _routes(some: Case) -> tuple[IndexArray, IndexArray]:
    return some.shared.route_starts_N, some.shared.routes


def _no_caps(some: Case) -> FloatArray:
    return np.full(len(some.shared.cap_N), np.inf)


def test_compiled_or_not_the_answer_is_the_same() -> None:
    # 60 hosts behind 4-fold oversubscribed leaves of 10, 8 messages each to random others, lags and all.
    random = np.random.default_rng(7)
    hosts = range(60)
    streams = []
    for host in hosts:
        stream = []
        for number in range(8):
            to = int(random.integers(60))
            needs = ((int(random.integers(60)) * 8 + number - 1, float(random.random())),) if number else ()
            route = (host, 120 + host // 10, 126 + to // 10, 60 + to)
            stream.append(Task(float(random.random()), float(random.random() * 9), route, 0.7, needs))
        streams.append(stream)
    some = case([1.0] * 120 + [2.5] * 12, *streams)
    with mock.patch.object(flows, "COMPILE_FROM", 0):
        compiled = some.run()
    with mock.patch.object(flows, "COMPILE_FROM", 10**9):
        interpreted = some.run()
    assert compiled.start_N.tolist() == interpreted.start_N.tolist()
    assert compiled.end_N.tolist() == interpreted.end_N.tolist()
    assert compiled.waits == interpreted.waits == {}
