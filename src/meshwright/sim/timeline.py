"""What a simulated step shows: the critical path, where each rank idles and why, memory over time, and its trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from meshwright.io.trace import Counter, Span, Trace, Track
from meshwright.schedule import Action, ActionKind, Timeline
from meshwright.sim.program import COMPUTE
from meshwright.sim.step import Simulation
from meshwright.sim.tasks import KINDS, RankTasks
from meshwright.sweep import FloatArray


@dataclass(frozen=True)
class Segment:
    """A part of the critical path: what a rank does from `start_s` to `end_s`, and in which action (or '')."""

    rank: int
    device: int
    action: str
    name: str
    kind: str
    start_s: float
    end_s: float


def critical_path(simulation: Simulation) -> tuple[Segment, ...]:
    """The chain of tasks that makes the step as long as it is, first to last; tasks of one action as one segment.

    From the task that ends last back to whatever it waited for: that before it in its stream or, where that ended
    earlier, what it needed."""
    segments: list[Segment] = []
    for rank, device, action, tasks in _by_action(simulation, _path(simulation)):
        own, index = simulation.graph.ranks[rank], simulation.graph.place_of(tasks[0])
        assert index is not None
        first, last = tasks[0], tasks[-1]
        kinds = {KINDS[own.kind_n[_local(simulation, task)]].value for task in tasks}
        names = {own.names[own.name_n[_local(simulation, task)]] for task in tasks}
        segments.append(
            Segment(
                rank,
                device,
                action,
                names.pop() if len(names) == 1 else f"{len(tasks)} tasks",
                kinds.pop() if len(kinds) == 1 else "mixed",
                float(simulation.swept.start_N[first]),
                float(simulation.swept.end_N[last]),
            )
        )
    return tuple(segments)


def _by_action(simulation: Simulation, path: list[int]) -> Iterator[tuple[int, int, str, list[int]]]:
    def key(task: int) -> tuple[int, int, str, str]:
        place = simulation.graph.place_of(task)
        assert place is not None
        rank, device, index = place
        own = simulation.graph.ranks[rank]
        action = str(own.actions[own.action_n[index]]) if own.action_n[index] >= 0 else ""
        stream = "" if action else own.names[own.name_n[index]]
        return rank, device, action, stream

    for (rank, device, action, _), tasks in groupby(path, key):
        yield rank, device, action, list(tasks)


def _local(simulation: Simulation, task: int) -> int:
    place = simulation.graph.place_of(task)
    assert place is not None
    return place[2]


def _path(simulation: Simulation) -> list[int]:
    """Task numbers of the critical path, first to last; rendezvous left out."""
    streams, start_N, end_N = simulation.graph.streams, simulation.swept.start_N, simulation.swept.end_N
    firsts = set(streams.starts_S[:-1].tolist())
    task = int(np.argmax(end_N[: simulation.graph.num_tasks]))
    path = []
    while True:
        if task < simulation.graph.num_tasks:
            path.append(task)
        before = [] if task in firsts else [task - 1]
        before += streams.needs_E[streams.need_starts_N[task] : streams.need_starts_N[task + 1]].tolist()
        if not before or start_N[task] <= 0:
            return path[::-1]
        task = max(before, key=lambda other: end_N[other])


def timeline_of(simulation: Simulation, device: int = 0) -> Timeline:
    """When each action of a device of each pipeline rank computes, as the replay of a table tells it: messages and the
    step's end left out."""
    starts, ends, rows = [], [], []
    for rank, own in enumerate(simulation.graph.ranks):
        tasks = simulation.graph.tasks_of(rank, device)
        start_n, end_n = simulation.swept.start_N[tasks], simulation.swept.end_N[tasks]
        messages = np.array([stream.startswith("pp") for stream in own.streams])
        counted = own.chained_n & ~np.repeat(messages, np.diff(own.starts_S)) & (own.action_n >= 0)
        spans = [np.flatnonzero(counted & (own.action_n == code)) for code in range(len(own.actions))]
        rows.append(own.actions)
        starts.append(tuple(float(start_n[mine].min()) for mine in spans))
        ends.append(tuple(float(end_n[mine].max()) for mine in spans))
    return Timeline(tuple(rows), tuple(starts), tuple(ends))


# --- idle time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle:
    """Seconds in which a device neither computes nor waits for its own transfers: before its first work, after its
    last, for others that are slower or later, and for messages on their way, by link."""

    warm_up_s: float
    drain_s: float
    imbalance_s: float
    links: dict[str, float] = field(default_factory=dict)


def idle(simulation: Simulation, rank: int, device: int = 0) -> Idle:
    """Where a device idles in a step, and what for."""
    graph, swept = simulation.graph, simulation.swept
    own, tasks = graph.ranks[rank], graph.tasks_of(rank, device)
    chain = own.emitted_n[own.chained_n[own.emitted_n]]
    starts, ends = swept.start_N[tasks][chain], swept.end_N[tasks][chain]
    gaps = starts[1:] - ends[:-1]
    links: dict[str, float] = {}
    waited_s = 0.0
    for index in np.flatnonzero(gaps > 0):
        waited_s += gaps[index]
        link = _message_before(simulation, tasks.start + int(chain[index + 1]))
        if link is not None:
            name, sent_s = link
            on_its_way = min(float(gaps[index]), float(starts[index + 1] - sent_s))
            links[name] = links.get(name, 0.0) + on_its_way
    return Idle(
        warm_up_s=float(starts[0]),
        drain_s=float(simulation.makespan_s - ends[-1]),
        imbalance_s=float(waited_s - sum(links.values())),
        links=dict(sorted(links.items())),
    )


def _message_before(simulation: Simulation, task: int) -> tuple[str, float] | None:
    """The message that a task waited for, as its link, and when it was sent."""
    streams, swept = simulation.graph.streams, simulation.swept
    needs = streams.needs_E[streams.need_starts_N[task] : streams.need_starts_N[task + 1]]
    if not len(needs):
        return None
    need = int(needs[np.argmax(swept.end_N[needs])])
    place = simulation.graph.place_of(need)
    if place is None:
        return None
    rank, _, index = place
    own = simulation.graph.ranks[rank]
    stream = own.streams[int(np.searchsorted(own.starts_S, index, side="right")) - 1]
    if not stream.startswith("pp"):
        return None
    return f"rank {rank} {stream.removeprefix('pp ')}", float(swept.start_N[need])


# --- memory ---------------------------------------------------------------------------------------------------------


def memory_over_time(simulation: Simulation, rank: int) -> tuple[FloatArray, FloatArray]:
    """Moments in seconds, and the bytes in use on a rank from each on.

    What a microbatch keeps is there from the start of its forward to the end of its backward (of the gradient of its
    weights, where that is apart)."""
    own, tasks = simulation.graph.ranks[rank], simulation.graph.tasks_of(rank)
    start_n, end_n = simulation.swept.start_N[tasks], simulation.swept.end_N[tasks]
    moments, changes = [0.0], [0.0]
    for code, action in enumerate(own.actions):
        held = simulation.kept_bytes[action.stage]
        mine = np.flatnonzero((own.action_n == code) & own.chained_n)
        if action.kind is ActionKind.F:
            moments.append(float(start_n[mine].min()))
            changes.append(held)
        elif action.kind in (ActionKind.B, ActionKind.W):
            moments.append(float(end_n[mine].max()))
            changes.append(-held)
    order = np.lexsort((changes, moments))  # what is freed at a moment goes before what is kept
    in_use = np.cumsum(np.array(changes)[order])
    rest = sum(simulation.memory[rank].values()) - in_use.max()
    return np.array(moments)[order], rest + in_use


# --- trace ----------------------------------------------------------------------------------------------------------


def trace_of(simulation: Simulation, device: int = 0) -> Trace:
    """All tasks of one device of each rank as spans, those of the critical path marked, and memory over time."""
    critical = set(_path(simulation))
    tracks, counters = [], []
    for rank, own in enumerate(simulation.graph.ranks):
        process = f"rank {rank}"
        for index, stream in enumerate(own.streams):
            numbers = range(int(own.starts_S[index]), int(own.starts_S[index + 1]))
            spans = [_span(simulation, rank, device, own, stream, number, critical) for number in numbers]
            tracks.append(Track(name=stream, spans=tuple(spans), process=process))
        moments, in_use = memory_over_time(simulation, rank)
        points = tuple(zip(moments.tolist(), in_use.tolist(), strict=True))
        counters.append(Counter(name="memory", process=process, points=points))
    return Trace(name=simulation.case.graph.name, tracks=tuple(tracks), counters=tuple(counters))


def _span(
    simulation: Simulation, rank: int, device: int, own: RankTasks, stream: str, number: int, critical: set[int]
) -> Span:
    task = simulation.graph.tasks_of(rank, device).start + number
    action = own.actions[own.action_n[number]] if own.action_n[number] >= 0 else None
    args: dict[str, Any] = {"rank": rank}
    if action is not None:
        args |= {"action": str(action), "stage": action.stage, "microbatch": action.microbatch}
    args["critical"] = task in critical
    return Span(
        name=_words(action, own.names[own.name_n[number]]) if stream == COMPUTE else own.names[own.name_n[number]],
        start_s=float(simulation.swept.start_N[task]),
        end_s=float(simulation.swept.end_N[task]),
        category=KINDS[own.kind_n[number]].value,
        args=args,
    )


def _words(action: Action | None, name: str) -> str:
    return f"{action} {name}" if action is not None else name
