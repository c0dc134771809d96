"""The schedules that split the backward: the gradient of the weights, which nobody waits for, fills the bubbles.

ZB-H1 and ZB-H2 have one stage a rank, InterleavedZeroBubble several in a loop, ZBVZeroBubble and DualPipeV two in the
shape of a V: chunk 0 of rank k is stage k, chunk 1 is stage 2 p - 1 - k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from meshwright.schedule.action import Action, ActionKind, Table, compute_parts
from meshwright.schedule.named import chunk_orders, microbatches_per_round, round_problems
from meshwright.schedule.record import SCHEDULES, Count, IntArray, Placement, Schedule

# --- ZB-H1, ZB-H2 -----------------------------------------------------------------------------------------------------
# Each rank runs w forwards, then turns of an input gradient, the gradient of the weights of d microbatches before, and
# a forward; the gradients that are left come last. H1 holds as many microbatches as 1F1B, H2 as many as it takes to
# leave no bubble.


def _split_table(warm_up: Count, deferred: Count, p: int, v: int, m: int) -> Table:
    def rank_actions(rank: int) -> Iterator[Action]:
        sizes = [np.asarray(size) for size in (p, v, m, rank)]
        w, d = (min(int(count(*sizes)), m) for count in (warm_up, deferred))
        yield from (Action(rank, ActionKind.F, b) for b in range(w))
        for b in range(m):
            yield Action(rank, ActionKind.I, b)
            if b >= d:
                yield Action(rank, ActionKind.W, b - d)
            if w + b < m:
                yield Action(rank, ActionKind.F, w + b)
        yield from (Action(rank, ActionKind.W, b) for b in range(m - d, m))

    return tuple(tuple(rank_actions(rank)) for rank in range(p))


def _handcrafted(name: str, warm_up: Count, deferred: Count, *, staggers_steps: bool = False) -> Schedule:
    return Schedule(
        name=name,
        table=lambda p, v, m: _split_table(warm_up, deferred, p, v, m),
        # The input gradient of a turn goes before its forward: w.
        peak_in_flight=lambda p, v, m, rank: np.asarray(np.minimum(warm_up(p, v, m, rank), m)),
        num_deferred=lambda p, v, m, rank: np.asarray(
            np.minimum(deferred(p, v, m, rank), m - np.minimum(warm_up(p, v, m, rank), m))
        ),
        staggers_steps=staggers_steps,
        splits_backward=True,
    )


# --- InterleavedZeroBubble --------------------------------------------------------------------------------------------
# Interleaved1F1B with one forward per hop in the warm-up: an input gradient comes back in half the time of a backward.
# The gradient of the weights follows `rank` input gradients later.


def _interleaved_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray((v - 1) * microbatches_per_round(p, m) + p - 1 - rank)


def _interleaved_table(p: int, v: int, m: int) -> Table:
    def rank_actions(rank: int) -> Iterator[Action]:
        w = min(int(_interleaved_warm_up(*(np.asarray(size) for size in (p, v, m, rank)))), m * v)
        forwards, backwards = chunk_orders(p, v, m, rank)
        yield from (Action(stage, ActionKind.F, b) for stage, b in forwards[:w])
        for n, (stage, b) in enumerate(backwards):
            if w + n < m * v:
                yield Action(forwards[w + n][0], ActionKind.F, forwards[w + n][1])
            yield Action(stage, ActionKind.I, b)
            if n >= rank:
                yield Action(backwards[n - rank][0], ActionKind.W, backwards[n - rank][1])
        yield from (Action(stage, ActionKind.W, b) for stage, b in backwards[max(m * v - rank, 0) :])

    return tuple(tuple(rank_actions(rank)) for rank in range(p))


def _interleaved_peak(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray(np.minimum(_interleaved_warm_up(p, v, m, rank) + 1, m * v))


# --- ZBVZeroBubble, DualPipeV: two chunks in the shape of a V ---------------------------------------------------------
# Both are written for enough microbatches to fill the pipeline. With fewer, the order is that of enough, without those
# that are not there: microbatches wait for none but themselves, so what is left still runs.

Script = list[tuple[ActionKind, int]]  # (kind, chunk): the n-th of a pair is microbatch n


def _zbv_script(p: int, m: int, rank: int) -> Script:
    """ZB-V (2401.10241, section 6): memory of 1F1B, no bubble where F = I = W."""
    forward_0, forward_1 = (ActionKind.F, 0), (ActionKind.F, 1)
    input_0, input_1 = (ActionKind.I, 0), (ActionKind.I, 1)
    weight_0, weight_1 = (ActionKind.W, 0), (ActionKind.W, 1)
    down = [forward_0] * (2 * (p - rank) - 1)  # until microbatch 0 has come back up chunk 1
    both = [forward_1, forward_0] * rank
    up = [forward_1, input_1, weight_1] * (p - rank)  # until its gradient has come back up chunk 0
    steady = (
        [forward_0, input_0, weight_0, forward_1, input_1, weight_1] * (m - (2 * p - 1 - rank))
        + [input_0, weight_0, forward_1, input_1, weight_1] * (p - 1 - rank)
    )  # fmt: skip
    drain = [input_0, input_1] * rank + [input_0, weight_0] * (p - rank)
    return down + both + up + steady + drain + [weight_1] * rank + [weight_0] * rank


def _numbered(script: Script, stages: tuple[int, int], m: int) -> Iterator[Action]:
    times: Counter[tuple[ActionKind, int]] = Counter()
    for kind, chunk in script:
        b = times[kind, chunk]
        times[kind, chunk] += 1
        if b < m:
            yield Action(stages[chunk], kind, b)


def _zbv_table(p: int, v: int, m: int) -> Table:
    enough = max(m, 2 * p - 1)
    return tuple(
        tuple(_numbered(_zbv_script(p, enough, rank), (rank, 2 * p - 1 - rank), m)) for rank in range(p)
    )  # fmt: skip


def _zbv_peak(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    # Before the first input gradient: all that went down, and what came up of it.
    return np.asarray(np.minimum(m, 2 * p - 1 - rank) + np.minimum(m, rank + 1))


class _DualPipeRank:
    """A rank's row while it is written: what is next in each chunk, and the gradients of weights that wait.

    A whole backward B and an input gradient I count as one; W takes the oldest I that waits.
    """

    def __init__(self, stages: tuple[int, int]) -> None:
        self.row: list[Action] = []
        self._stages = stages
        self._next: Counter[tuple[bool, int]] = Counter()  # by (is forward, chunk)
        self._waiting: list[Action] = []

    def run(self, kind: ActionKind, chunk: int) -> None:
        self.row.append(self._take(kind, chunk))
        if kind is ActionKind.I:
            self._waiting.append(self.row[-1])

    def overlap(self, forward_chunk: int, backward_chunk: int) -> None:
        parts = (self._take(ActionKind.F, forward_chunk), self._take(ActionKind.B, backward_chunk))
        self.row.append(Action(-1, ActionKind.OVERLAP_F_B, None, parts))

    def weights(self) -> None:
        oldest = self._waiting.pop(0)
        self.row.append(Action(oldest.stage, ActionKind.W, oldest.microbatch))

    def _take(self, kind: ActionKind, chunk: int) -> Action:
        key = (kind is ActionKind.F, chunk)
        self._next[key] += 1
        return Action(self._stages[chunk], kind, self._next[key] - 1)


def _dual_pipe_row(p: int, m: int, rank: int) -> list[Action]:
    """One rank of DualPipe (2412.19437, figure 5) folded into a V; m >= 2 p - 1."""
    forward, backward = ActionKind.F, ActionKind.B
    others = p - 1 - rank
    line = _DualPipeRank((rank, 2 * p - 1 - rank))
    for _ in range(2 * others):
        line.run(forward, 0)
    for _ in range(rank + 1):
        line.run(forward, 0)
        line.run(forward, 1)
    for _ in range(others):
        line.run(ActionKind.I, 1)
        line.weights()
        line.run(forward, 1)
    for turn in range(m - 2 * p + 1 + rank):
        if turn == 0 and others == 0:  # the V's tip has its own forward to wait for: one after the other is sooner
            line.run(forward, 0)
            line.run(backward, 1)
        else:
            line.overlap(0, 1)
        line.overlap(1, 0)
    for _ in range(others):
        line.run(backward, 1)
        line.overlap(1, 0)
    for turn in range(2 * (rank + 1)):  # the second half leaves its weights for the end, where others wait
        line.run(backward if turn <= rank else ActionKind.I, 1 - turn % 2)
    for _ in range(others):
        line.weights()
        line.run(ActionKind.I, 0)
    for _ in range(rank + 1):
        line.weights()
    return line.row


def _dual_pipe_table(p: int, v: int, m: int) -> Table:
    enough = max(m, 2 * p - 1)
    rows = (_dual_pipe_row(p, enough, rank) for rank in range(p))
    return tuple(tuple(row if m == enough else _first_microbatches(row, m)) for row in rows)


def _first_microbatches(row: list[Action], m: int) -> Iterator[Action]:
    for action in row:
        parts = tuple(part for part in compute_parts(action) if (part.microbatch or 0) < m)
        if len(parts) > 1:
            yield Action(-1, ActionKind.OVERLAP_F_B, None, parts)
        else:
            yield from parts


def _dual_pipe_peak(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    # As ZB-V, and one more where a forward overlaps with the backward that frees its place.
    return np.asarray(_zbv_peak(p, v, m, rank) + (m >= 2 * p - rank))


def _none(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.zeros_like(m)


for _schedule in (
    _handcrafted("ZB-H1", lambda p, v, m, rank: p - rank, lambda p, v, m, rank: rank),
    _handcrafted(
        "ZB-H2", lambda p, v, m, rank: 2 * (p - rank) - 1, lambda p, v, m, rank: 2 * rank, staggers_steps=True
    ),
    Schedule(
        name="InterleavedZeroBubble",
        table=_interleaved_table,
        problems=lambda p, v, m: round_problems("InterleavedZeroBubble", p, m),
        virtual_stages=None,
        peak_in_flight=_interleaved_peak,
        num_deferred=lambda p, v, m, rank: np.asarray(np.minimum(rank, m * v - _interleaved_peak(p, v, m, rank))),
        splits_backward=True,
    ),
    # In both, a gradient of the weights that waits is followed by no forward: nothing is kept beside those in flight.
    Schedule(
        name="ZBVZeroBubble",
        table=_zbv_table,
        virtual_stages=2,
        placement=Placement.V,
        peak_in_flight=_zbv_peak,
        num_deferred=_none,
        staggers_steps=True,
        splits_backward=True,
    ),
    Schedule(
        name="DualPipeV",
        table=_dual_pipe_table,
        virtual_stages=2,
        placement=Placement.V,
        peak_in_flight=_dual_pipe_peak,
        num_deferred=_none,
        splits_backward=True,
    ),
):
    SCHEDULES.add(_schedule.name, _schedule)
