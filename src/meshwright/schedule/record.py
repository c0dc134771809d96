"""What a named schedule is, the table of them, and questions to it by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from meshwright.errors import InputError, Problem
from meshwright.registry import Registry
from meshwright.schedule.action import Action, ActionKind, Table, compute_parts, rank_of

IntArray = npt.NDArray[np.int64]
Count = Callable[[IntArray, IntArray, IntArray, IntArray], IntArray]  # (p, v, m, rank) -> a number for each


class Placement(StrEnum):
    """Which rank holds which stage."""

    LOOP = "loop"  # stage i on rank i mod p
    V = "v"  # ranks 0 to p - 1, then p - 1 to 0, and so on: neighbours at every turn are on one rank


def _one(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.ones_like(m)


@dataclass(frozen=True)
class Schedule:
    """A named pipeline schedule: its rule, its table, its memory. A new one is one more record in `SCHEDULES`.

    Every function takes (p, v, m) in this order. `problems` and `table` see only positive numbers, and only a v that
    `virtual_stages` allows: the number of stages that each rank has, None for any. `problems` holds what is particular
    to this schedule. The others take the rank as a fourth argument, and arrays that broadcast: `peak_in_flight` and
    `num_deferred` are the closed forms of what is counted over the table, None where it has to be counted;
    `weight_versions` is how many copies of its weights a rank keeps.

    An asynchronous schedule does not drain between steps: the next m microbatches follow these at once; its weights are
    updated after all m, or, with `updates_each_microbatch`, after each. One with
    `staggers_steps` is synchronous, and each rank goes on to its next step when its own is done, without a barrier of
    all ranks (2401.10241, section 4: the update is validated afterwards): a step takes the span of one rank.
    """

    name: str
    table: Callable[[int, int, int], Table]
    problems: Callable[[int, int, int], list[Problem]] = lambda p, v, m: []
    virtual_stages: int | None = 1
    placement: Placement = Placement.LOOP
    peak_in_flight: Count | None = None
    num_deferred: Count | None = None
    weight_versions: Count = _one
    is_asynchronous: bool = False
    updates_each_microbatch: bool = False
    staggers_steps: bool = False
    has_backward: bool = True
    splits_backward: bool = False  # into I and W


SCHEDULES: Registry[Schedule] = Registry("schedule")


def schedule_problems(name: str, num_ranks: int, num_virtual: int, num_microbatches: int) -> list[Problem]:
    """All rules that schedule `name` with these sizes breaks; empty where it is legal.

    `where` of each is the key of the strategy shorthand (`schedule`, `pp`, `vpp`) or `num_microbatches`.

    >>> for problem in schedule_problems("Interleaved1F1B", 4, 2, 11):
    ...     print(problem)
    num_microbatches = 11: Interleaved1F1B with pp=4 runs max(1, 11 // 4) = 2 rounds, which must divide it \
(nearest: num_microbatches=10 or num_microbatches=12)
    >>> print(*schedule_problems("DualPipeV", 4, 1, 8))
    vpp = 1: DualPipeV has exactly 2 stages per rank (nearest: vpp=2)
    """
    sizes = {"pp": num_ranks, "vpp": num_virtual, "num_microbatches": num_microbatches}
    found = [Problem(key, str(size), "must be at least 1", f"{key}=1") for key, size in sizes.items() if size < 1]
    try:
        schedule = SCHEDULES[name]
    except InputError as unknown:
        return [*unknown.problems, *found]
    demanded = schedule.virtual_stages
    if num_virtual >= 1 and demanded not in (None, num_virtual):
        several = ", ".join(other for other in SCHEDULES if SCHEDULES[other].virtual_stages is None)
        one = f"{name} has one stage per rank; several are for {several}"
        rule = one if demanded == 1 else f"{name} has exactly {demanded} stages per rank"
        found.append(Problem("vpp", str(num_virtual), rule, f"vpp={demanded}"))
    return found or schedule.problems(num_ranks, num_virtual, num_microbatches)


def actions(name: str, num_ranks: int, num_virtual: int, num_microbatches: int) -> Table:
    """The action table of schedule `name`: `[rank][position]`, without idle entries. Raises `InputError` if illegal.

    >>> for rank_actions in actions("1F1B", 2, 1, 3):
    ...     print(*rank_actions)
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    if problems := schedule_problems(name, num_ranks, num_virtual, num_microbatches):
        raise InputError(problems)
    return _table(SCHEDULES[name], num_ranks, num_virtual, num_microbatches)


@lru_cache(maxsize=8)  # a table cannot be changed, and large ones are asked for several times in a row
def _table(schedule: Schedule, p: int, v: int, m: int) -> Table:
    return schedule.table(p, v, m)


def rank_of_stage(name: str, stage: int, num_ranks: int) -> int:
    """The rank that holds `stage` under schedule `name`.

    >>> [rank_of_stage("ZBVZeroBubble", stage, 3) for stage in range(6)]
    [0, 1, 2, 2, 1, 0]
    """
    rank = rank_of(stage, num_ranks)
    goes_back = SCHEDULES[name].placement is Placement.V and stage // num_ranks % 2 == 1
    return num_ranks - 1 - rank if goes_back else rank


def stages_of_rank(name: str, rank: int, num_ranks: int, num_virtual: int) -> tuple[int, ...]:
    """The stages of `rank` under schedule `name`, in order.

    >>> stages_of_rank("ZBVZeroBubble", 1, 3, 2), stages_of_rank("LoopedBFS", 1, 3, 2)
    ((1, 4), (1, 4))
    >>> stages_of_rank("ZBVZeroBubble", 0, 3, 2), stages_of_rank("LoopedBFS", 0, 3, 2)
    ((0, 5), (0, 3))
    """
    stages = range(num_ranks * num_virtual)
    return tuple(stage for stage in stages if rank_of_stage(name, stage, num_ranks) == rank)


def is_asynchronous(name: str) -> bool:
    """Whether steps of a schedule follow one another without a flush; a table of one's own has one."""
    return name in SCHEDULES and SCHEDULES[name].is_asynchronous


def updates_each_microbatch(name: str) -> bool:
    """Whether a schedule updates its weights after each microbatch, not once a step."""
    return name in SCHEDULES and SCHEDULES[name].updates_each_microbatch


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_in_flight(
    name: str,
    num_ranks: npt.ArrayLike,
    num_virtual: npt.ArrayLike,
    num_microbatches: npt.ArrayLike,
    rank: npt.ArrayLike,
) -> IntArray:
    """The most forwards that `rank` holds whose backward (input gradient, where split) has not ended.

    Each chunk of a rank counts as one: a unit is the activations of one stage for one microbatch. Where forward and
    backward overlap, both are held. Where there is no backward nothing is held for one: 0. What is counted over the
    table of `actions`; arguments are integers or arrays that broadcast and must be legal (`schedule_problems`), with
    0 <= rank < num_ranks. Returns an array of their common shape, to be read only.

    >>> peak_in_flight("1F1B", 4, 1, 8, np.arange(4))
    array([4, 3, 2, 1])
    >>> int(peak_in_flight("Interleaved1F1B", 4, 2, 8, 0))
    11
    """
    schedule = SCHEDULES[name]
    count = schedule.peak_in_flight or _counted(schedule, lambda peak, kept: peak)
    return _by_rank(count, num_ranks, num_virtual, num_microbatches, rank)


def num_deferred(
    name: str,
    num_ranks: npt.ArrayLike,
    num_virtual: npt.ArrayLike,
    num_microbatches: npt.ArrayLike,
    rank: npt.ArrayLike,
) -> IntArray:
    """Microbatches that `rank` keeps beside those in flight, until the gradient of their weights is computed.

    The most forwards whose gradient of the weights has not ended, less `peak_in_flight`.

    >>> num_deferred("ZB-H1", 4, 1, 8, np.arange(4))
    array([0, 1, 2, 3])
    """
    schedule = SCHEDULES[name]
    count = schedule.num_deferred or _counted(schedule, lambda peak, kept: kept - peak)
    return _by_rank(count, num_ranks, num_virtual, num_microbatches, rank)


def weight_versions(
    name: str,
    num_ranks: npt.ArrayLike,
    num_virtual: npt.ArrayLike,
    num_microbatches: npt.ArrayLike,
    rank: npt.ArrayLike,
) -> IntArray:
    """How many versions of its weights `rank` keeps; more than one only where steps overlap.

    >>> weight_versions("PipeDream", 4, 1, 8, np.arange(4))
    array([4, 3, 2, 1])
    """
    return _by_rank(SCHEDULES[name].weight_versions, num_ranks, num_virtual, num_microbatches, rank)


def _by_rank(count: Count, *sizes: npt.ArrayLike) -> IntArray:
    p, v, m, k = (np.asarray(size, dtype=np.int64) for size in sizes)
    found = count(p, v, m, k)  # GPipe's knows nothing of p and rank, the answer's shape does
    return np.broadcast_to(found, np.broadcast_shapes(p.shape, v.shape, m.shape, k.shape))


def _counted(schedule: Schedule, choose: Callable[[int, int], int]) -> Count:
    """Counting over the table, for schedules without a closed form."""

    def one(p: int, v: int, m: int, rank: int) -> int:
        return choose(*_held_by_rank(schedule, p, v, m)[rank])

    return lambda p, v, m, rank: np.asarray(np.vectorize(one, otypes=[np.int64])(p, v, m, rank))


@lru_cache(maxsize=4096)
def _held_by_rank(schedule: Schedule, p: int, v: int, m: int) -> tuple[tuple[int, int], ...]:
    return tuple((held(row, ActionKind.I), held(row, ActionKind.W)) for row in _table(schedule, p, v, m))


def held(row: tuple[Action, ...], until: ActionKind) -> int:
    """The most forwards of a row whose `until` (I or W; a full backward is both) has not ended; 0 without any.

    >>> held(actions("ZB-H1", 2, 1, 4)[1], ActionKind.W)
    2
    """
    started, ended = [0], [0]
    for action in row:
        parts = compute_parts(action)
        started.append(sum(part.kind is ActionKind.F for part in parts))
        ended.append(sum(part.kind in (until, ActionKind.B) for part in parts))
    if not any(ended):
        return 0
    before = [0, *accumulate(ended)]  # what starts in an action is held beside what ends in it
    return max(now - gone for now, gone in zip(accumulate(started), before, strict=False))
