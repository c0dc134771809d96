"""What waits for what: a table as tasks in streams, one stream a rank, ready for `sweep`.

A forward needs the forward of the stage before; a backward (B or I) needs its own forward and the backward of the stage
after; W needs its own I. Where the table has messages, what another rank makes is waited for through them.

Legend: N actions of a table, rank by rank (tasks); L their leaves, an overlap counting as its parts; E waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshwright.errors import Problem
from meshwright.schedule.action import MESSAGES, Action, ActionKind
from meshwright.sweep import IndexArray, Streams, Swept, circle_of_waits, sweep

Rows = Sequence[Sequence[Action]]
Mask = npt.NDArray[np.bool_]

_F, _I, _W, _B = ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B
_SEND_F, _RECV_F, _SEND_B, _RECV_B = MESSAGES
_CODE = {kind: code for code, kind in enumerate(ActionKind)}
_MESSAGE_STEPS = ((_SEND_F, _RECV_F, 1), (_SEND_B, _RECV_B, -1))  # and from which stage to which
_BACKWARD = (_B, _I)  # an input gradient serves others as well as a whole backward


@dataclass(frozen=True)
class Leaves:
    """The computations and messages of a table in columns, with what is needed to look one up."""

    actions: tuple[Action, ...]  # [N]
    starts_S: IndexArray  # of each rank's actions, and their number
    rank_N: IndexArray
    task_L: IndexArray
    stage_L: IndexArray
    kind_L: IndexArray
    microbatch_L: IndexArray

    def are(self, *kinds: ActionKind) -> Mask:
        """Which leaves are of these kinds."""
        return np.isin(self.kind_L, [_CODE[kind] for kind in kinds])

    @property
    def has_messages(self) -> bool:
        """Whether the table says who sends and receives."""
        return bool(self.are(*MESSAGES).any())

    @property
    def width(self) -> int:
        """More than any microbatch's number: stage x width + microbatch is one key."""
        return int(self.microbatch_L.max(initial=0)) + 1

    def leaf(self, index: int) -> Action:
        """One leaf as an action."""
        kind = list(ActionKind)[self.kind_L[index]]
        return Action(int(self.stage_L[index]), kind, int(self.microbatch_L[index]))

    def place(self, index: int) -> str:
        """Where a leaf stands, for problems."""
        return f"rank {self.rank_N[self.task_L[index]]}"

    def find(self, *kinds: ActionKind) -> Callable[[IndexArray, IndexArray], IndexArray]:
        """A function from (stages, microbatches) to the task that runs one of `kinds` there, -1 where there is none."""
        leaf = np.flatnonzero(self.are(*kinds))
        width = self.width
        keys = self.stage_L[leaf] * width + self.microbatch_L[leaf]
        order = np.argsort(keys, kind="stable")
        keys, task = keys[order], self.task_L[leaf[order]]

        def find(stages: IndexArray, microbatches: IndexArray) -> IndexArray:
            if not len(keys):
                return np.full(len(stages), -1)
            wanted = stages * width + microbatches
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            return np.where(keys[at] == wanted, task[at], -1)

        return find


def leaves_of(rows: Rows) -> Leaves:
    """The columns of a table; actions on state wait for nothing and are left out of them."""
    actions = tuple(action for row in rows for action in row)
    counts = [len(row) for row in rows]
    parts = [(action.parts or (action,)) for action in actions]
    leaves = [leaf for several in parts for leaf in several if leaf.microbatch is not None]
    tasks = [task for task, several in enumerate(parts) for leaf in several if leaf.microbatch is not None]
    return Leaves(
        actions,
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        np.repeat(np.arange(len(counts)), counts),
        np.array(tasks, dtype=np.int64),
        np.array([leaf.stage for leaf in leaves], dtype=np.int64),
        np.array([_CODE[leaf.kind] for leaf in leaves], dtype=np.int64),
        np.array([leaf.microbatch for leaf in leaves], dtype=np.int64),
    )


# --- what cannot run --------------------------------------------------------------------------------------------------


def doubled(leaves: Leaves) -> list[tuple[int, Problem]]:
    """Leaves whose work is in the table more than once, with what is wrong."""
    kind_L = np.where(leaves.are(_I), _CODE[_B], leaves.kind_L)
    key_L = (kind_L * (leaves.stage_L.max(initial=0) + 1) + leaves.stage_L) * leaves.width + leaves.microbatch_L
    _, index_L, counts = np.unique(key_L, return_inverse=True, return_counts=True)
    found = []
    for leaf in np.flatnonzero(counts[index_L] > 1).tolist():
        action = leaves.leaf(leaf)
        message = action.kind in MESSAGES
        rule = "is sent once and received once" if message else "passes a stage once forward and once backward"
        found.append((leaf, Problem(leaves.place(leaf), str(action), f"a microbatch {rule}")))
    return found


@dataclass(frozen=True)
class Waits:
    """Who waits for whom: task `task_E` for task `need_E`, which is a message under way where `travels_E`. `missing`
    has for each leaf that cannot run what no rank runs."""

    task_E: IndexArray
    need_E: IndexArray
    travels_E: Mask
    missing: dict[int, list[str]]

    def problems(self, leaves: Leaves) -> list[tuple[int, Problem]]:
        """What is missing, said leaf by leaf."""
        return [
            (leaf, Problem(leaves.place(leaf), str(leaves.leaf(leaf)), f"needs {', '.join(names)}, which no rank runs"))
            for leaf, names in sorted(self.missing.items())
        ]


class _Collector:
    """Waits while they are found."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.missing: dict[int, list[str]] = {}
        self._edges: list[tuple[IndexArray, IndexArray, Mask]] = []

    def demand(self, leaf: IndexArray, kinds: tuple[ActionKind, ...], step: int) -> IndexArray:
        """The tasks that run one of `kinds` for the stage `step` beyond each leaf's; -1, and noted, where none does."""
        stages, microbatches = self.leaves.stage_L[leaf] + step, self.leaves.microbatch_L[leaf]
        need = self.leaves.find(*kinds)(stages, microbatches)
        for index in np.flatnonzero(need < 0):
            missing = f"{stages[index]}{kinds[0]}{microbatches[index]}" if stages[index] >= 0 else "a stage before it"
            self.missing.setdefault(int(leaf[index]), []).append(missing)
        return need

    def link(self, leaf: IndexArray, kinds: tuple[ActionKind, ...], step: int, travels: bool | Mask = False) -> None:
        """`leaf` waits for one of `kinds` of the stage `step` further on."""
        need = self.demand(leaf, kinds, step)
        there = need >= 0
        flags = np.broadcast_to(np.asarray(travels), there.shape)[there]
        self._edges.append((self.leaves.task_L[leaf][there], need[there], flags))

    def waits(self) -> Waits:
        task, need, travels = (np.concatenate(column) for column in zip(*self._edges, strict=True))
        return Waits(task, need, travels, self.missing)


def find_waits(leaves: Leaves, num_stages: int) -> Waits:
    """All waits of a table whose stages are below `num_stages`."""
    stage_L = leaves.stage_L
    waits = _Collector(leaves)
    not_first, not_last = stage_L > 0, stage_L < num_stages - 1
    is_backward = leaves.are(*_BACKWARD)
    waits.link(np.flatnonzero(is_backward), (_F,), 0)
    _link_neighbours(waits, np.flatnonzero(leaves.are(_F) & not_first), (_F,), -1, (_SEND_F, _RECV_F))
    _link_neighbours(waits, np.flatnonzero(is_backward & not_last), _BACKWARD, 1, (_SEND_B, _RECV_B))
    waits.link(np.flatnonzero(leaves.are(_W)), (_I,), 0)
    if leaves.has_messages:
        waits.link(np.flatnonzero(leaves.are(_SEND_F)), (_F,), 0)
        waits.link(np.flatnonzero(leaves.are(_SEND_B)), _BACKWARD, 0)
        for send, receive, step in _MESSAGE_STEPS:
            waits.demand(np.flatnonzero(leaves.are(send)), (receive,), step)
            waits.demand(np.flatnonzero(leaves.are(receive)), (send,), -step)
    return waits.waits()


def _link_neighbours(
    waits: _Collector,
    leaf: IndexArray,
    kinds: tuple[ActionKind, ...],
    step: int,
    message: tuple[ActionKind, ActionKind],
) -> None:
    """`leaf` needs what the neighbouring stage makes: at once on the same rank, after a message from another."""
    leaves = waits.leaves
    source = leaves.find(*kinds)(leaves.stage_L[leaf] + step, leaves.microbatch_L[leaf])
    crosses = (source >= 0) & (leaves.rank_N[source] != leaves.rank_N[leaves.task_L[leaf]])
    if not leaves.has_messages:
        waits.link(leaf, kinds, step, crosses)
        return
    waits.link(leaf[~crosses], kinds, step)
    send, receive = message
    waits.link(leaf[crosses], (send,), step, travels=True)
    waits.link(leaf[crosses], (receive,), 0, travels=True)


# --- streams ----------------------------------------------------------------------------------------------------------


def streams_of(leaves: Leaves, waits: Waits, p2p_s: float = 0.0) -> Streams:
    """Tasks in their order, each waiting for what it needs; what travels arrives `p2p_s` later."""
    return _streams(leaves, waits.task_E, waits.need_E, np.where(waits.travels_E, p2p_s, 0.0))


def rendezvous_streams(leaves: Leaves, waits: Waits) -> tuple[Streams, dict[int, int]]:
    """The same with sends and receives that block until both sides are there; and which message meets which.

    A message passes once what comes before it on either side is done.
    """
    pairs: list[tuple[IndexArray, IndexArray]] = []
    for send, receive, step in _MESSAGE_STEPS:
        leaf = np.flatnonzero(leaves.are(send))
        met = leaves.find(receive)(leaves.stage_L[leaf] + step, leaves.microbatch_L[leaf])
        pairs.append((leaves.task_L[leaf][met >= 0], met[met >= 0]))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    this, that = np.concatenate([one, other]), np.concatenate([other, one])
    follows = that > leaves.starts_S[leaves.rank_N[that]]  # something comes before it
    # What travels is waited for at the receive; that it was sent follows.
    received = ~waits.travels_E | (leaves.rank_N[waits.need_E] == leaves.rank_N[waits.task_E])
    task = np.concatenate([waits.task_E[received], this[follows]])
    need = np.concatenate([waits.need_E[received], that[follows] - 1])
    return _streams(leaves, task, need, None), dict(zip(this.tolist(), that.tolist(), strict=True))


def _streams(leaves: Leaves, task_E: IndexArray, need_E: IndexArray, lag_E: npt.NDArray[np.float64] | None) -> Streams:
    order = np.argsort(task_E, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(task_E, minlength=len(leaves.actions)))]).astype(np.int64)
    has_lag = lag_E is not None and lag_E.any()
    return Streams(leaves.starts_S, starts, need_E[order], lag_E[order] if lag_E is not None and has_lag else None)


def deadlock(leaves: Leaves, streams: Streams, waits: dict[int, tuple[int, int]], partner: dict[int, int]) -> Problem:
    """A circle of ranks that wait for one another, named action by action."""

    def says(task: int, need: int) -> str:
        if task in partner and leaves.rank_N[task] != leaves.rank_N[need]:
            need = partner[task]  # it waits for what comes before the other half of the message
        return (
            f"rank {leaves.rank_N[task]} at {leaves.actions[task]} waits for {leaves.actions[need]} "
            f"of rank {leaves.rank_N[need]}"
        )

    circle = "; ".join(says(*wait) for wait in circle_of_waits(streams, waits))
    how = "with messages that block, " if partner else ""
    rule = f"deadlock, {how}the ranks wait for one another; run what is waited for earlier"
    return Problem("", circle, rule)


def order_problem(leaves: Leaves, waits: Waits) -> Problem | None:
    """The deadlock of a table whose waits are all there, if it has one."""
    streams = streams_of(leaves, waits)
    swept = _sweep_units(streams)
    return deadlock(leaves, streams, swept.waits, {}) if swept.waits else None


def rendezvous_problem(leaves: Leaves, waits: Waits) -> Problem | None:
    """The deadlock of messages that block, if there is one."""
    streams, partner = rendezvous_streams(leaves, waits)
    swept = _sweep_units(streams)
    return deadlock(leaves, streams, swept.waits, partner) if swept.waits else None


def _sweep_units(streams: Streams) -> Swept:
    return sweep(streams, np.ones(streams.num_tasks))
