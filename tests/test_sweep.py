"""The engine for ordered tasks: equal to a longest path, alike compiled or not, deadlocks as circles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import sweep as engine
from meshwright.sweep import Streams, circle_of_waits, sweep


def streams_of(lengths: list[int], needs: dict[int, list[int]], lags: dict[int, float] | None = None) -> Streams:
    """Streams of these lengths; `needs` by task, with a lag for each needed task."""
    total = sum(lengths)
    flat = [need for task in range(total) for need in needs.get(task, [])]
    return Streams(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([[0], np.cumsum([len(needs.get(task, [])) for task in range(total)])]).astype(np.int64),
        np.array(flat, dtype=np.int64),
        None if lags is None else np.array([lags[need] for need in flat]),
    )


def test_tasks_wait_for_their_stream_and_their_needs() -> None:
    # stream 0: tasks 0, 1; stream 1: tasks 2, 3. Task 3 needs 1, which ends at 2 + 3 = 5, and comes 0.5 later.
    streams = streams_of([2, 2], {3: [1]}, {1: 0.5})
    found = sweep(streams, np.array([2.0, 3.0, 1.0, 4.0]))
    assert found.start_N.tolist() == [0.0, 2.0, 0.0, 5.5]
    assert found.end_N.tolist() == [2.0, 5.0, 1.0, 9.5]
    assert not found.waits


def longest_path(streams: Streams, duration: np.ndarray) -> np.ndarray:
    """Ends by relaxing every edge until nothing changes."""
    total = streams.num_tasks
    before = {task: [] for task in range(total)}
    for start, stop in zip(streams.starts_S, streams.starts_S[1:], strict=False):
        for task in range(start + 1, stop):
            before[task].append((task - 1, 0.0))
    for task in range(total):
        for edge in range(streams.need_starts_N[task], streams.need_starts_N[task + 1]):
            lag = 0.0 if streams.lag_E is None else streams.lag_E[edge]
            before[task].append((streams.needs_E[edge], lag))
    ends = duration.copy()
    for _ in range(total):
        new = np.array(
            [duration[n] + max((ends[other] + lag for other, lag in before[n]), default=0.0) for n in range(total)]
        )
        if np.array_equal(new, ends):
            return ends
        ends = new
    return ends


@given(data=st.data())
def test_equals_the_longest_path(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    total = sum(lengths)
    # Needs that follow some order of all tasks which keeps each stream's: no circles.
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rank = rng.permutation(total)
    for start, stop in zip(np.cumsum([0, *lengths]), np.cumsum(lengths), strict=False):
        rank[start:stop] = np.sort(rank[start:stop])
    needs = {n: [o for o in range(total) if rank[o] < rank[n] and rng.random() < 0.2] for n in range(total)}
    lags = {n: float(rng.random()) for n in range(total)}
    streams = streams_of(lengths, needs, lags)
    duration = rng.random(total)
    found = sweep(streams, duration)
    assert not found.waits
    np.testing.assert_allclose(found.end_N, longest_path(streams, duration), rtol=1e-12)


def test_compiled_code_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    p, m = 6, 40
    needs = {rank * m + b: [(rank - 1) * m + b] for rank in range(1, p) for b in range(m)}
    streams, duration = streams_of([m] * p, needs), rng.random(p * m)
    plain = sweep(streams, duration)
    monkeypatch.setattr(engine, "COMPILE_FROM", 0)
    compiled = sweep(streams, duration)
    assert np.array_equal(plain.start_N, compiled.start_N)
    assert np.array_equal(plain.end_N, compiled.end_N)


def test_a_deadlock_is_a_circle_of_waits() -> None:
    # Task 0 needs task 3, task 2 needs task 1: each stands first in its stream before what the other waits for.
    streams = streams_of([2, 2, 1], {0: [3], 2: [1], 4: [0]})
    found = sweep(streams, np.ones(5))
    assert found.waits == {0: (0, 3), 1: (2, 1), 2: (4, 0)}
    assert circle_of_waits(streams, found.waits) == [(0, 3), (2, 1)]


def test_no_tasks_are_done_at_once() -> None:
    assert sweep(streams_of([0, 0], {}), np.zeros(0)).waits == {}
