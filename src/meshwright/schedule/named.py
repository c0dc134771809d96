"""The schedules of whole backwards: warm up with forwards, then alternate.

GPipe, 1F1B, Interleaved1F1B and the asynchronous two are one family. Each rank runs w forwards, then pairs of one
forward and one backward, then the backwards that are left. Only w differs (GPipe: all forwards), so tables and memory
follow from it; w may exceed m v. LoopedBFS takes all microbatches through one chunk after the other; ForwardOnly has no
backward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.errors import Problem
from meshwright.schedule.action import Action, ActionKind, Table, stage_of
from meshwright.schedule.record import SCHEDULES, Count, IntArray, Schedule


def interleaved_legal(num_ranks: npt.ArrayLike, num_microbatches: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether Interleaved1F1B can run m microbatches on p ranks: PyTorch's rule, m mod max(1, floor(m / p)) = 0.

    Megatron asks more: m must be a multiple of p. Fewer microbatches than ranks are one round, thus always legal.
    Arguments are positive integers or arrays that broadcast.

    >>> interleaved_legal(4, np.array([3, 8, 10, 11]))
    array([ True,  True,  True, False])
    """
    p, m = np.asarray(num_ranks, dtype=np.int64), np.asarray(num_microbatches, dtype=np.int64)
    return np.asarray(m % _num_rounds(p, m) == 0)


def _num_rounds(p: IntArray, m: IntArray) -> IntArray:
    return np.asarray(np.maximum(1, m // p))


def round_problems(name: str, p: int, m: int) -> list[Problem]:
    """What an interleaved schedule says to m microbatches that are no whole number of equal rounds."""
    if interleaved_legal(p, m):
        return []
    # Both multiples of p around m are legal, so the nearest legal number on each side lies between them.
    around = np.arange(m // p * p, m // p * p + p + 1)
    legal = around[interleaved_legal(p, around)]
    nearest = f"num_microbatches={legal[legal < m].max()} or num_microbatches={legal[legal > m].min()}"
    rule = f"{name} with pp={p} runs max(1, {m} // {p}) = {m // p} rounds, which must divide it"
    return [Problem("num_microbatches", str(m), rule, nearest)]


def chunk_orders(p: int, v: int, m: int, rank: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(stage, microbatch) of a rank's forwards and backwards, round by round.

    The n-th forward: r microbatches through chunk 0, the same through chunk 1 ..., then the next r. Backwards run the
    same way with the chunks in reverse.
    """
    r = int(microbatches_per_round(p, m))  # with v = 1 any r gives the order 0, 1, 2 ...
    stages = [stage_of(rank, chunk, p) for chunk in range(v)]
    chunk_and_microbatch = [(n // r % v, n // (r * v) * r + n % r) for n in range(m * v)]
    return (
        [(stages[chunk], b) for chunk, b in chunk_and_microbatch],
        [(stages[v - 1 - chunk], b) for chunk, b in chunk_and_microbatch],
    )


def microbatches_per_round(p: Any, m: Any) -> Any:
    """r: about p, so that a round fills the pipeline."""
    return m // np.maximum(1, m // p)


def _gpipe_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray(m * v)


def _1f1b_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray(p - 1 - rank)


def _interleaved_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    # A round through all chunks but the last, then two per hop: a microbatch's way down to the last rank and back.
    return np.asarray((v - 1) * microbatches_per_round(p, m) + 2 * (p - 1 - rank))


def _family_table(warm_up: Count, p: int, v: int, m: int) -> Table:
    def rank_actions(rank: int) -> tuple[Action, ...]:
        w = int(warm_up(np.asarray(p), np.asarray(v), np.asarray(m), np.asarray(rank)))
        forward_order, backward_order = chunk_orders(p, v, m, rank)
        forwards = [Action(stage, ActionKind.F, b) for stage, b in forward_order]
        backwards = [Action(stage, ActionKind.B, b) for stage, b in backward_order]
        pairs = list(zip(forwards[w:], backwards, strict=False))
        return (*forwards[:w], *(action for pair in pairs for action in pair), *backwards[len(pairs) :])

    return tuple(rank_actions(rank) for rank in range(p))


def _none(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.zeros_like(m)


def _family(name: str, warm_up: Count, **particular: Any) -> Schedule:
    return Schedule(
        name=name,
        table=lambda p, v, m: _family_table(warm_up, p, v, m),
        # The forward of the first pair runs before its backward frees anything: w + 1.
        peak_in_flight=lambda p, v, m, rank: np.asarray(np.minimum(warm_up(p, v, m, rank) + 1, m * v)),
        num_deferred=_none,
        **particular,
    )


def _looped_table(p: int, v: int, m: int) -> Table:
    def rank_actions(rank: int) -> tuple[Action, ...]:
        forwards = [Action(stage_of(rank, chunk, p), ActionKind.F, b) for chunk in range(v) for b in range(m)]
        # Last in, first out: what the last forward left is still at hand.
        return (*forwards, *(Action(forward.stage, ActionKind.B, forward.microbatch) for forward in reversed(forwards)))

    return tuple(rank_actions(rank) for rank in range(p))


def _forward_table(p: int, v: int, m: int) -> Table:
    return tuple(tuple(Action(rank, ActionKind.F, b) for b in range(m)) for rank in range(p))


def _double_buffer_problems(p: int, v: int, m: int) -> list[Problem]:
    if m >= p:
        return []
    rule = f"PipeDream-2BW with pp={p} updates every {m} microbatches, which two versions of the weights allow from {p}"
    return [Problem("num_microbatches", str(m), rule, f"num_microbatches={p}")]


def _add(*schedules: Schedule) -> None:
    for schedule in schedules:
        SCHEDULES.add(schedule.name, schedule)


_add(
    _family("GPipe", _gpipe_warm_up),
    _family("1F1B", _1f1b_warm_up),
    _family(
        "Interleaved1F1B",
        _interleaved_warm_up,
        virtual_stages=None,
        problems=lambda p, v, m: round_problems("Interleaved1F1B", p, m),
    ),
    Schedule(
        name="LoopedBFS",
        table=_looped_table,
        virtual_stages=None,
        peak_in_flight=lambda p, v, m, rank: np.asarray(m * v),
        num_deferred=_none,
    ),
    # The order of 1F1B without its flush. PipeDream updates after each backward: a rank keeps the weights that the
    # microbatches in flight have seen.
    _family(
        "PipeDream",
        _1f1b_warm_up,
        is_asynchronous=True,
        updates_each_microbatch=True,
        weight_versions=lambda p, v, m, rank: np.asarray(p - rank),
    ),
    # 2BW updates after m backwards. Microbatches in flight have seen two versions, as long as m >= p.
    _family(
        "PipeDream-2BW",
        _1f1b_warm_up,
        is_asynchronous=True,
        weight_versions=lambda p, v, m, rank: np.full_like(m, 2),
        problems=_double_buffer_problems,
    ),
    Schedule(
        name="ForwardOnly",
        table=_forward_table,
        has_backward=False,
        peak_in_flight=_none,
        num_deferred=_none,
    ),
)
