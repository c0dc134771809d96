"""The task graph: programs of pipeline ranks as streams of tasks on devices, folded or spelled out.

Folded, one device stands for all that share a pipeline rank: they do the same at the same time. Unfolded, each device
has its own tasks, and a collective starts on all of its group once all of them have come to it (a rendezvous, a task
without duration in a stream of its own). Both give the same times to the last bit where all devices are equal; unfolded
ones may differ (stragglers, jitter, links that are shared).

Legend: N tasks, of which the last are rendezvous; S streams; P pipeline ranks; D devices of a pipeline rank that are
spelled out; n tasks of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from meshwright.schedule import Action
from meshwright.sim.program import Kind, Program
from meshwright.strategy import MeshAxis, root_axis
from meshwright.sweep import FloatArray, IndexArray, Streams

KINDS = tuple(Kind)


@dataclass(frozen=True)
class RankTasks:
    """The tasks of each device of a pipeline rank, stream by stream.

    `streams` names the streams, which start at `starts_S`; `name_n` and `action_n` index `names` and `actions` (-1: no
    action), `kind_n` indexes `KINDS`; `root_n` indexes `roots`, the degrees of collectives (-1: none). `emitted_n` is
    the order in which the rank comes to its tasks. `need_n` is the task that one waits for (-1: none but that before it
    in its stream); `waits` are those for other ranks: (task, rank, its task)."""

    streams: tuple[str, ...]
    starts_S: IndexArray
    duration_n: FloatArray
    names: tuple[str, ...]
    name_n: Any
    kind_n: Any
    roots: tuple[str, ...]
    root_n: Any
    actions: tuple[Action, ...]
    action_n: Any
    chained_n: Any
    emitted_n: IndexArray
    need_n: IndexArray
    waits: tuple[tuple[int, int, int], ...]

    @property
    def num_tasks(self) -> int:
        """n."""
        return len(self.duration_n)

    def collectives(self, stream: int) -> tuple[str, IndexArray]:
        """The degree whose collectives run in a stream (by its number), and their tasks; "" and none in others."""
        first, stop = self.starts_S[stream], self.starts_S[stream + 1]
        tasks: IndexArray = first + np.flatnonzero(self.root_n[first:stop] >= 0)
        return (self.roots[self.root_n[tasks[0]]] if len(tasks) else "", tasks)


@dataclass(frozen=True)
class TaskGraph:
    """Streams of tasks, with what each device of each pipeline rank does; task `bases_P[rank] + device * n + i` is the
    i-th of a device of a rank."""

    streams: Streams
    duration_N: FloatArray
    ranks: tuple[RankTasks, ...]
    bases_P: tuple[int, ...]
    num_devices: int

    @property
    def num_tasks(self) -> int:
        """Tasks that take part, rendezvous left out."""
        return sum(rank.num_tasks for rank in self.ranks) * self.num_devices

    def tasks_of(self, rank: int, device: int = 0) -> slice:
        """The tasks of a device."""
        size = self.ranks[rank].num_tasks
        start = self.bases_P[rank] + device * size
        return slice(start, start + size)

    def place_of(self, task: int) -> tuple[int, int, int] | None:
        """Pipeline rank, device and local number of a task; None for a rendezvous."""
        if task >= self.num_tasks:
            return None
        rank = int(np.searchsorted(self.bases_P, task, side="right")) - 1
        device, index = divmod(task - self.bases_P[rank], self.ranks[rank].num_tasks)
        return rank, device, index


def rank_tasks(programs: Sequence[Program]) -> tuple[RankTasks, ...]:
    """The tasks of each rank in order of its streams."""
    laid = [_laid_out(program) for program in programs]
    places = [np.empty(len(order), dtype=np.int64) for order, _ in laid]
    for place, (order, _) in zip(places, laid, strict=True):
        place[order] = np.arange(len(order))
    found = []
    for program, place, (order, make) in zip(programs, places, laid, strict=True):
        waits = [(int(place[w.position]), w.of_rank, int(places[w.of_rank][w.of_position])) for w in program.waits]
        found.append(make(order, place, tuple(sorted(waits))))
    return tuple(found)


def _laid_out(program: Program) -> tuple[IndexArray, Any]:
    """The order of a program's tasks by stream, and what makes the record once all ranks have theirs."""
    coded: dict[int, tuple[Any, ...]] = {}
    streams: dict[str, int] = {}
    names: dict[str, int] = {}
    roots: dict[str, int] = {}
    actions: dict[Action, int] = {}
    parts: list[tuple[Any, ...]] = []
    action_counts: list[tuple[int, int]] = []

    def code(table: dict[Any, int], key: Any) -> int:
        return table.setdefault(key, len(table))

    for action, tasks in program.pieces:
        if id(tasks) not in coded:
            coded[id(tasks)] = (
                np.array([code(streams, task.stream) for task in tasks], dtype=np.int16),
                np.array([task.seconds for task in tasks]),
                np.array([code(names, task.name) for task in tasks], dtype=np.int32),
                np.array([KINDS.index(task.kind) for task in tasks], dtype=np.int8),
                np.array([code(roots, task.root) if task.root else -1 for task in tasks], dtype=np.int8),
                np.array([task.chained for task in tasks], dtype=bool),
            )
        parts.append(coded[id(tasks)])
        action_counts.append((code(actions, action) if action is not None else -1, len(tasks)))
    stream_n, duration_n, name_n, kind_n, root_n, chained_n = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    action_n = np.repeat(*(np.array(column, dtype=np.int32) for column in zip(*action_counts, strict=True)))
    order = np.argsort(stream_n, kind="stable")

    def make(order: IndexArray, place: IndexArray, waits: tuple[tuple[int, int, int], ...]) -> RankTasks:
        need = _chain_before(chained_n)
        # What stands before a task in its own stream it waits for anyway.
        same = (need >= 0) & (stream_n[np.maximum(need, 0)] == stream_n)
        need_n = np.where((need < 0) | same, -1, place[np.maximum(need, 0)])
        counts = np.bincount(stream_n, minlength=len(streams))
        return RankTasks(
            streams=tuple(streams),
            starts_S=np.concatenate([[0], np.cumsum(counts)]),
            duration_n=duration_n[order],
            names=tuple(names),
            name_n=name_n[order],
            kind_n=kind_n[order],
            roots=tuple(roots),
            root_n=root_n[order],
            actions=tuple(actions),
            action_n=action_n[order],
            chained_n=chained_n[order],
            emitted_n=place,
            need_n=need_n[order],
            waits=waits,
        )

    return order, make


def _chain_before(chained_n: Any) -> IndexArray:
    """For each task the last chained one before it; -1 where there is none."""
    last = np.maximum.accumulate(np.where(chained_n, np.arange(len(chained_n)), -1))
    found: IndexArray = np.concatenate([[-1], last[:-1]])
    return found


def task_graph(ranks: Sequence[RankTasks], mesh: Sequence[MeshAxis] = (), *, unfold: bool = False) -> TaskGraph:
    """The streams of all devices: one a pipeline rank, or all of the mesh (its `pp` axis outermost)."""
    axes = [axis for axis in mesh if axis.name != "pp"] if unfold else []
    num_devices = int(np.prod([axis.size for axis in axes], dtype=np.int64))
    sizes = [rank.num_tasks * num_devices for rank in ranks]
    bases = tuple(accumulate(sizes, initial=0))
    meetings = [_meetings(rank, axes) for rank in ranks] if num_devices > 1 else []
    meeting_bases = list(accumulate((each.num_tasks for each in meetings), initial=bases[-1]))
    parts = [
        _device_needs(
            index, ranks, bases, num_devices, *((meetings[index], meeting_bases[index]) if meetings else (None, 0))
        )
        for index in range(len(ranks))
    ]
    parts += [_meeting_needs(meeting, bases[index]) for index, meeting in enumerate(meetings)]
    counts, needs = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = [
        base + (np.arange(num_devices)[:, None] * rank.num_tasks + rank.starts_S[:-1]).ravel()
        for base, rank in zip(bases, ranks, strict=False)
    ]
    starts += [base + each.starts for base, each in zip(meeting_bases, meetings, strict=False)]
    durations = [np.tile(rank.duration_n, num_devices) for rank in ranks]
    return TaskGraph(
        streams=Streams(
            np.concatenate([*starts, [meeting_bases[-1]]]).astype(np.int64),
            np.concatenate([[0], np.cumsum(counts)]),
            needs,
        ),
        duration_N=np.concatenate([*durations, np.zeros(meeting_bases[-1] - bases[-1])]),
        ranks=tuple(ranks),
        bases_P=bases[:-1],
        num_devices=num_devices,
    )


@dataclass(frozen=True)
class _Meetings:
    """The rendezvous of a rank's devices: `groups` has, for each stream with collectives, their tasks and the members
    of each group of its degree; for each group a stream of meetings, whose first are `starts`."""

    rank: RankTasks
    groups: tuple[tuple[IndexArray, IndexArray], ...]
    starts: IndexArray
    num_tasks: int


def groups_of(axes: Sequence[MeshAxis], root: str) -> IndexArray:
    """The groups of a degree among the devices of a pipeline rank, numbered in the order of the axes: a row each."""
    sizes = [axis.size for axis in axes]
    inside = [index for index, axis in enumerate(axes) if root_axis(axis.name) == root]
    outside = [index for index in range(len(axes)) if index not in inside]
    width = int(np.prod([sizes[index] for index in inside]))
    devices = np.arange(int(np.prod(sizes))).reshape(sizes)
    found: IndexArray = devices.transpose([*outside, *inside]).reshape(-1, width)
    return found


def _meetings(rank: RankTasks, axes: Sequence[MeshAxis]) -> _Meetings:
    groups, starts, total = [], [], 0
    for stream in range(len(rank.streams)):
        root, tasks = rank.collectives(stream)
        members_GS = groups_of(axes, root)
        if members_GS.shape[1] > 1 and len(tasks):
            groups.append((tasks, members_GS))
            starts.append(total + np.arange(len(members_GS)) * len(tasks))
            total += len(members_GS) * len(tasks)
    return _Meetings(rank, tuple(groups), np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64), total)


def _meeting_needs(meetings: _Meetings, base: int) -> tuple[IndexArray, IndexArray]:
    """How many tasks each meeting needs, and which: of every member what comes before its collective."""
    rank, size = meetings.rank, meetings.rank.num_tasks
    first_n = np.zeros(size, dtype=bool)
    first_n[rank.starts_S[:-1][rank.starts_S[:-1] < size]] = True
    counts, needs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for tasks, members_GS in meetings.groups:
        before_C2 = np.stack([rank.need_n[tasks], np.where(first_n[tasks], -1, tasks - 1)], axis=1)
        # G groups x C collectives x S members x 2 needs each
        needed = base + members_GS[:, None, :, None] * size + before_C2[None, :, None, :]
        wanted = np.broadcast_to(before_C2[None, :, None, :] >= 0, needed.shape)
        counts.append(wanted.sum(axis=(2, 3)).ravel())
        needs.append(needed[wanted])
    return np.concatenate(counts), np.concatenate(needs)


def _device_needs(
    index: int,
    ranks: Sequence[RankTasks],
    bases: Sequence[int],
    num_devices: int,
    meetings: _Meetings | None,
    meeting_base: int,
) -> tuple[IndexArray, IndexArray]:
    """How many tasks each task of a rank's devices needs, and which."""
    rank = ranks[index]
    size = rank.num_tasks
    met_n = np.zeros(size, dtype=bool)
    for tasks, _ in meetings.groups if meetings else ():
        met_n[tasks] = True
    own = np.flatnonzero((rank.need_n >= 0) & ~met_n)
    wait_task, wait_rank, wait_of = (
        np.array(column, dtype=np.int64) for column in (zip(*rank.waits, strict=True) if rank.waits else ([], [], []))
    )
    task_E = np.concatenate([own, wait_task, np.flatnonzero(met_n)])
    order = np.argsort(task_E, kind="stable")
    counts_n = np.bincount(task_E, minlength=size)
    device_D = np.arange(num_devices)[:, None]
    others = np.array([other.num_tasks for other in ranks])
    local_DE = np.concatenate(
        [
            bases[index] + device_D * size + rank.need_n[own],
            np.array(bases)[wait_rank] + device_D * others[wait_rank] + wait_of,
            _met_by(meetings, met_n, num_devices, meeting_base),
        ],
        axis=1,
    )
    return np.tile(counts_n, num_devices), local_DE[:, order].ravel()


def _met_by(meetings: _Meetings | None, met_n: Any, num_devices: int, base: int) -> IndexArray:
    """The meeting of each collective on each device: D x (collectives in order of their tasks)."""
    number_Dn = np.full((num_devices, len(met_n)), -1, dtype=np.int64)
    for tasks, members_GS in meetings.groups if meetings else ():
        num_groups, width = members_GS.shape
        first_G = base + np.arange(num_groups) * len(tasks)
        number_Dn[members_GS.ravel()[:, None], tasks] = np.repeat(first_G, width)[:, None] + np.arange(len(tasks))
        base += num_groups * len(tasks)
    return number_Dn[:, met_n]


def devices_of(mesh: Sequence[MeshAxis], rank: int) -> IndexArray:
    """The devices of a pipeline rank, by their number in the cluster, in the order of the other axes."""
    names, sizes = [axis.name for axis in mesh], [axis.size for axis in mesh]
    devices = np.arange(int(np.prod(sizes, dtype=np.int64))).reshape(sizes)
    found: IndexArray = devices.take(rank, axis=names.index("pp")).ravel() if "pp" in names else devices.ravel()
    return found
