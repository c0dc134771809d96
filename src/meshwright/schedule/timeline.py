"""A table with times, and how to get it: replay on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.schedule.action import Action, ActionKind, Table, compute_parts
from meshwright.schedule.record import held
from meshwright.schedule.waits import Leaves, Rows, deadlock, doubled, find_waits, leaves_of, streams_of
from meshwright.sweep import sweep


@dataclass(frozen=True)
class Idle:
    """When a rank computes nothing, in seconds: before its first computation, after its last, and between the two."""

    warm_up_s: float
    waiting_s: float
    drain_s: float


@dataclass(frozen=True)
class Timeline:
    """A table with times: `start_s[rank][position]` and `end_s[rank][position]` of `actions[rank][position]`."""

    actions: Table
    start_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]

    @property
    def makespan_s(self) -> float:
        """When the last action of all ends; the first starts at 0."""
        return max((ends[-1] for ends in self.end_s if ends), default=0.0)

    @property
    def period_s(self) -> float:
        """The longest span, over ranks, from first to last work: steps can follow one another this closely."""
        return max((last - first for first, last in self._spans()), default=0.0)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """The work of each rank."""
        rows = zip(self.start_s, self.end_s, strict=True)
        return tuple(sum(end - start for start, end in zip(*row, strict=True)) for row in rows)

    @property
    def bubble_fraction(self) -> float:
        """The idle share, 0 to 1, of ranks x period; 0 where nothing takes time."""
        offered_s = len(self.actions) * self.period_s
        return max(0.0, offered_s - sum(self.busy_s)) / offered_s if offered_s else 0.0  # max: rounding only

    @property
    def idle(self) -> tuple[Idle, ...]:
        """Of each rank, what of the makespan is not work; a rank without work warms up all the time."""
        makespan_s = self.makespan_s
        found = []
        for (first, last), busy_s in zip(self._spans(), self.busy_s, strict=True):
            warm_up_s = first if last > first else makespan_s
            found.append(Idle(warm_up_s, max(0.0, last - first - busy_s), makespan_s - max(last, warm_up_s)))
        return tuple(found)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Of each rank, the most forwards whose backward (input gradient, where split) has not ended."""
        return tuple(held(row, ActionKind.I) for row in self.actions)

    def _spans(self) -> list[tuple[float, float]]:
        """From the first to the last action of each rank that computes or takes time: a receive may stand there long
        before what it receives."""
        spans = []
        for row, starts, ends in zip(self.actions, self.start_s, self.end_s, strict=True):
            work = [n for n, action in enumerate(row) if ends[n] > starts[n] or compute_parts(action)]
            spans.append((starts[work[0]], ends[work[-1]]) if work else (0.0, 0.0))
        return spans


def replay(
    actions: Rows,
    duration: Callable[[Action], float],
    num_stages: int,
    p2p_s: float = 0.0,
    *,
    overhead: Callable[[Action], float] | None = None,
) -> Timeline:
    """Run a table on paper: each action starts once its rank is free and what it needs has arrived.

    A forward needs the forward of the stage before; a backward (B or I) needs its own forward and the backward of the
    stage after; W needs its own I. What comes from another rank arrives `p2p_s` later; links are never busy and sending
    costs the ranks nothing (the simulator knows better). In a table with messages they are what is waited for: one
    travels once it is sent and its receive is posted, and neither holds up its rank, as in PyTorch's runtime. The parts
    of an overlap start together, once all can, and end together after the sum of their times.

    `duration` gives seconds of a computation, or any unit if `p2p_s` has the same; `overhead`, those that a rank spends
    on a message or on a stage's state (none where it is not given).

    Raises `InputError` where an action is there twice, needs one that is nowhere, or where ranks wait in a circle.

    >>> from meshwright.schedule import actions
    >>> table = actions("GPipe", 2, 1, 4)
    >>> timeline = replay(table, lambda action: {"F": 1, "B": 2}[action.kind], num_stages=2)
    >>> timeline.makespan_s, timeline.period_s, timeline.bubble_fraction  # 3 (m + p - 1); (p - 1) / (m + p - 1)
    (15.0, 15.0, 0.2)
    >>> timeline.idle[1], timeline.peak_in_flight
    (Idle(warm_up_s=1.0, waiting_s=0.0, drain_s=2.0), (4, 4))
    """
    leaves = leaves_of(actions)
    waits = find_waits(leaves, num_stages)
    if problems := _problems(leaves, num_stages, doubled(leaves) + waits.problems(leaves)):
        raise InputError(problems)
    streams = streams_of(leaves, waits, p2p_s)
    swept = sweep(streams, np.array([_seconds(action, duration, overhead) for action in leaves.actions], dtype=float))
    if swept.waits:
        raise InputError([replace(deadlock(leaves, streams, swept.waits, {}), where="schedule")])
    start, end, starts = swept.start_N.tolist(), swept.end_N.tolist(), leaves.starts_S.tolist()
    rows = [slice(starts[rank], starts[rank + 1]) for rank in range(len(actions))]
    return Timeline(
        tuple(map(tuple, actions)), tuple(tuple(start[row]) for row in rows), tuple(tuple(end[row]) for row in rows)
    )


def _seconds(action: Action, duration: Callable[[Action], float], overhead: Callable[[Action], float] | None) -> float:
    if parts := compute_parts(action):
        return sum(duration(part) for part in parts)
    return overhead(action) if overhead else 0.0


def _problems(leaves: Leaves, num_stages: int, found: list[tuple[int, Problem]]) -> list[Problem]:
    """Leaf by leaf in the order of the table; of a stage that is not there, only that."""
    unknown = set(np.flatnonzero(leaves.stage_L >= num_stages).tolist())
    rule, nearest = f"there are {num_stages} stages", f"stage {num_stages - 1}"
    told = [(leaf, Problem(leaves.place(leaf), str(leaves.leaf(leaf)), rule, nearest)) for leaf in unknown]
    told += [(leaf, problem) for leaf, problem in found if leaf not in unknown]
    return [
        replace(problem, where=f"schedule, {problem.where}") for _, problem in sorted(told, key=lambda each: each[0])
    ]
