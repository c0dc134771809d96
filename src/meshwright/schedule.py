"""Pipeline schedules: who runs which forward and backward when. The one place for them, for cost, sim and runtime.

A schedule is a *table*: for each rank the `Action`s it runs, in order, in PyTorch's own notation ("2F0": stage 2,
forward, microbatch 0). Times are not in the table; `replay` adds them. How long a step takes in closed form is in
`cost/`; how actions become sends and receives is in `runtime/`.

Legend: p = `num_ranks` pipeline ranks, v = `num_virtual` stages on each rank (chunks), p v stages in all,
m = `num_microbatches`, r = microbatches per round (Interleaved1F1B takes them through its chunks r at a time).

References
    GPipe: Huang et al. 2019, arXiv:1811.06965, section 2.3.
    1F1B (PipeDream-Flush) and its interleaved form: Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2.
    ZB-H1, ZB-H2: Qi et al. 2023, arXiv:2401.10241, section 2.2.
    Orders and rules of the first three are those of `torch.distributed.pipelining.schedules` 2.13; tests compare them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from meshwright.errors import InputError, Problem
from meshwright.registry import Registry

IntArray = npt.NDArray[np.int64]


class ActionKind(StrEnum):
    """What an action computes; the letters are PyTorch's."""

    F = "F"  # forward
    I = "I"  # noqa: E741  gradient of the stage's input: all that the stage before waits for
    W = "W"  # gradient of the weights: nobody waits for it
    B = "B"  # full backward: I and W in one


@dataclass(frozen=True)
class Action:
    """One stage's work on one microbatch.

    >>> print(Action(stage=1, kind=ActionKind.B, microbatch=5))
    1B5
    """

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Table = tuple[tuple[Action, ...], ...]  # [rank][position]


def parse_action(text: str) -> Action:
    """The action that `text` writes in PyTorch's notation; raises `InputError` for any other text.

    >>> parse_action("0F3")
    Action(stage=0, kind=<ActionKind.F: 'F'>, microbatch=3)
    """
    match = re.fullmatch(r"([0-9]+)([FIWB])([0-9]+)", text.strip())
    if match is None:
        raise InputError([Problem("action", repr(text), "must be stage, one of F I W B, microbatch", "0F3")])
    return Action(int(match[1]), ActionKind(match[2]), int(match[3]))


def stage_of(rank: int, virtual_index: int, num_ranks: int) -> int:
    """The stage that is chunk `virtual_index` of `rank` in loop placement: stages are dealt to ranks like cards.

    >>> [stage_of(rank=1, virtual_index=k, num_ranks=4) for k in range(3)]
    [1, 5, 9]
    """
    return virtual_index * num_ranks + rank


def rank_of(stage: int, num_ranks: int) -> int:
    """The rank that holds `stage` in loop placement.

    >>> rank_of(stage=9, num_ranks=4)
    1
    """
    return stage % num_ranks


# --- the named schedules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A named pipeline schedule: its rule, its table, its memory. A new one is one more record in `SCHEDULES`.

    Every function takes (p, v, m) in this order. `problems` and `table` see only positive numbers, and v > 1 only where
    `virtual_stages_allowed`; `problems` holds what is particular to this schedule. `peak_in_flight` takes the rank as
    a fourth argument, and arrays that broadcast; so does `num_deferred`: microbatches whose gradient of the weights
    waits, what that needs being kept meanwhile.
    """

    name: str
    virtual_stages_allowed: bool
    problems: Callable[[int, int, int], list[Problem]]
    table: Callable[[int, int, int], Table]
    peak_in_flight: Callable[[IntArray, IntArray, IntArray, IntArray], IntArray]
    num_deferred: Callable[[IntArray, IntArray, IntArray, IntArray], IntArray] = lambda p, v, m, rank: np.zeros_like(m)


SCHEDULES: Registry[Schedule] = Registry("schedule")


def schedule_problems(name: str, num_ranks: int, num_virtual: int, num_microbatches: int) -> list[Problem]:
    """All rules that schedule `name` with these sizes breaks; empty where it is legal.

    `where` of each is the key of the strategy shorthand (`schedule`, `pp`, `vpp`) or `num_microbatches`.

    >>> for problem in schedule_problems("Interleaved1F1B", 4, 2, 11):
    ...     print(problem)
    num_microbatches = 11: Interleaved1F1B with pp=4 runs max(1, 11 // 4) = 2 rounds, which must divide it \
(nearest: num_microbatches=10 or num_microbatches=12)
    """
    sizes = {"pp": num_ranks, "vpp": num_virtual, "num_microbatches": num_microbatches}
    found = [Problem(key, str(size), "must be at least 1", f"{key}=1") for key, size in sizes.items() if size < 1]
    try:
        schedule = SCHEDULES[name]
    except InputError as unknown:
        return [*unknown.problems, *found]
    if num_virtual > 1 and not schedule.virtual_stages_allowed:
        several = ", ".join(other for other in SCHEDULES if SCHEDULES[other].virtual_stages_allowed)
        rule = f"{name} has one stage per rank; several are for {several}"
        found.append(Problem("vpp", str(num_virtual), rule, "vpp=1"))
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
    return SCHEDULES[name].table(num_ranks, num_virtual, num_microbatches)


def peak_in_flight(
    name: str,
    num_ranks: npt.ArrayLike,
    num_virtual: npt.ArrayLike,
    num_microbatches: npt.ArrayLike,
    rank: npt.ArrayLike,
) -> IntArray:
    """The most forwards that `rank` holds whose backward (input gradient, where split) has not ended.

    Each chunk of a rank counts as one: a unit is the activations of one stage for one microbatch. The closed form of
    counting over the table of `actions`; arguments are integers or arrays that broadcast and must be legal
    (`schedule_problems`), with 0 <= rank < num_ranks. Returns an array of their common shape, to be read only.

    >>> peak_in_flight("1F1B", 4, 1, 8, np.arange(4))
    array([4, 3, 2, 1])
    >>> int(peak_in_flight("Interleaved1F1B", 4, 2, 8, 0))
    11
    """
    return _by_rank(SCHEDULES[name].peak_in_flight, num_ranks, num_virtual, num_microbatches, rank)


def num_deferred(
    name: str,
    num_ranks: npt.ArrayLike,
    num_virtual: npt.ArrayLike,
    num_microbatches: npt.ArrayLike,
    rank: npt.ArrayLike,
) -> IntArray:
    """Microbatches that `rank` keeps beside those in flight, until the gradient of their weights is computed."""
    return _by_rank(SCHEDULES[name].num_deferred, num_ranks, num_virtual, num_microbatches, rank)


def _by_rank(count: Callable[[IntArray, IntArray, IntArray, IntArray], IntArray], *sizes: npt.ArrayLike) -> IntArray:
    p, v, m, k = (np.asarray(size, dtype=np.int64) for size in sizes)
    found = count(p, v, m, k)  # GPipe's knows nothing of p and rank, the answer's shape does
    return np.broadcast_to(found, np.broadcast_shapes(p.shape, v.shape, m.shape, k.shape))


# --- GPipe, 1F1B, Interleaved1F1B: warm up with forwards, then alternate ----------------------------------------------
# The three are one family. Each rank runs w forwards, then pairs of one forward and one backward, then the backwards
# that are left. Only w differs (GPipe: all forwards), so tables and memory follow from it; w may exceed m v.

WarmUp = Callable[[IntArray, IntArray, IntArray, IntArray], IntArray]  # (p, v, m, rank) -> w


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


def _interleaved_problems(p: int, v: int, m: int) -> list[Problem]:
    if interleaved_legal(p, m):
        return []
    # Both multiples of p around m are legal, so the nearest legal number on each side lies between them.
    around = np.arange(m // p * p, m // p * p + p + 1)
    legal = around[interleaved_legal(p, around)]
    nearest = f"num_microbatches={legal[legal < m].max()} or num_microbatches={legal[legal > m].min()}"
    rule = f"Interleaved1F1B with pp={p} runs max(1, {m} // {p}) = {m // p} rounds, which must divide it"
    return [Problem("num_microbatches", str(m), rule, nearest)]


def _gpipe_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray(m * v)


def _1f1b_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    return np.asarray(p - 1 - rank)


def _interleaved_warm_up(p: IntArray, v: IntArray, m: IntArray, rank: IntArray) -> IntArray:
    # A round through all chunks but the last, then two per hop: a microbatch's way down to the last rank and back.
    r = m // _num_rounds(p, m)
    return np.asarray((v - 1) * r + 2 * (p - 1 - rank))


def _family_table(warm_up: WarmUp, p: int, v: int, m: int) -> Table:
    r = m // int(_num_rounds(np.asarray(p), np.asarray(m)))  # with v = 1 any r gives the order 0, 1, 2 ...
    # The n-th forward: r microbatches through chunk 0, the same through chunk 1 ..., then the next r. Backwards run the
    # same way with the chunks in reverse.
    chunk_and_microbatch = [(n // r % v, n // (r * v) * r + n % r) for n in range(m * v)]

    def rank_actions(rank: int) -> tuple[Action, ...]:
        w = int(warm_up(np.asarray(p), np.asarray(v), np.asarray(m), np.asarray(rank)))
        forwards = [Action(stage_of(rank, chunk, p), ActionKind.F, b) for chunk, b in chunk_and_microbatch]
        backwards = [Action(stage_of(rank, v - 1 - chunk, p), ActionKind.B, b) for chunk, b in chunk_and_microbatch]
        pairs = list(zip(forwards[w:], backwards, strict=False))
        return (*forwards[:w], *(action for pair in pairs for action in pair), *backwards[len(pairs) :])

    return tuple(rank_actions(rank) for rank in range(p))


def _add_family(
    name: str,
    warm_up: WarmUp,
    *,
    virtual_stages_allowed: bool = False,
    problems: Callable[[int, int, int], list[Problem]] = lambda p, v, m: [],
) -> None:
    SCHEDULES.add(
        name,
        Schedule(
            name=name,
            virtual_stages_allowed=virtual_stages_allowed,
            problems=problems,
            table=lambda p, v, m: _family_table(warm_up, p, v, m),
            # The forward of the first pair runs before its backward frees anything: w + 1.
            peak_in_flight=lambda p, v, m, rank: np.asarray(np.minimum(warm_up(p, v, m, rank) + 1, m * v)),
        ),
    )


_add_family("GPipe", _gpipe_warm_up)
_add_family("1F1B", _1f1b_warm_up)
_add_family("Interleaved1F1B", _interleaved_warm_up, virtual_stages_allowed=True, problems=_interleaved_problems)


# --- ZB-H1, ZB-H2: the gradient of the weights fills the bubbles -----------------------------------------------------
# Each rank runs w forwards, then turns of an input gradient, the gradient of the weights of d microbatches before, and
# a forward; the gradients that are left come last. H1 holds as many microbatches as 1F1B, H2 as many as it takes to
# leave no bubble.


def _zero_bubble_table(warm_up: WarmUp, deferred: WarmUp, p: int, v: int, m: int) -> Table:
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


def _add_zero_bubble(name: str, warm_up: WarmUp, deferred: WarmUp) -> None:
    SCHEDULES.add(
        name,
        Schedule(
            name=name,
            virtual_stages_allowed=False,
            problems=lambda p, v, m: [],
            table=lambda p, v, m: _zero_bubble_table(warm_up, deferred, p, v, m),
            # The input gradient of a turn goes before its forward: w.
            peak_in_flight=lambda p, v, m, rank: np.asarray(np.minimum(warm_up(p, v, m, rank), m)),
            num_deferred=lambda p, v, m, rank: np.asarray(
                np.minimum(deferred(p, v, m, rank), m - np.minimum(warm_up(p, v, m, rank), m))
            ),
        ),
    )


_add_zero_bubble("ZB-H1", lambda p, v, m, rank: p - rank, lambda p, v, m, rank: rank)
_add_zero_bubble("ZB-H2", lambda p, v, m, rank: 2 * (p - rank) - 1, lambda p, v, m, rank: 2 * rank)


# --- replay -----------------------------------------------------------------------------------------------------------


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
        """The longest span, over ranks, from first to last action: steps can follow one another this closely."""
        spans = [ends[-1] - starts[0] for starts, ends in zip(self.start_s, self.end_s, strict=True) if ends]
        return max(spans, default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """The idle share, 0 to 1, of ranks x period; 0 where nothing takes time."""
        spans = zip(self.start_s, self.end_s, strict=True)
        busy_s = sum(end - start for starts, ends in spans for start, end in zip(starts, ends, strict=True))
        offered_s = len(self.actions) * self.period_s
        return max(0.0, offered_s - busy_s) / offered_s if offered_s else 0.0  # max: rounding only


def replay(
    actions: Sequence[Sequence[Action]],
    duration: Callable[[Action], float],
    num_stages: int,
    p2p_s: float = 0.0,
) -> Timeline:
    """Run a table on paper: each action starts once its rank is free and what it needs has arrived.

    A forward needs the forward of the stage before; a backward (B or I) needs its own forward and the backward of the
    stage after; W needs its own I. What comes from another rank arrives `p2p_s` later; links are never busy and sending
    costs the ranks nothing (the simulator knows better). `duration` gives seconds, or any unit if `p2p_s` has the same.

    Raises `InputError` where an action is there twice, needs one that is nowhere, or where ranks wait in a circle.

    >>> table = actions("GPipe", 2, 1, 4)
    >>> timeline = replay(table, lambda action: {"F": 1, "B": 2}[action.kind], num_stages=2)
    >>> timeline.makespan_s, timeline.period_s, timeline.bubble_fraction  # 3 (m + p - 1); (p - 1) / (m + p - 1)
    (15.0, 15.0, 0.2)
    """
    rank_of_result = {_result(action): rank for rank, row in enumerate(actions) for action in row}
    if problems := _table_problems(actions, num_stages):
        raise InputError(problems)
    arrived_s: dict[Action, float] = {}
    start_s: list[list[float]] = [[] for _ in actions]
    end_s: list[list[float]] = [[] for _ in actions]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(actions):
            for action in row[len(end_s[rank]) :]:
                needs = _needs(action, num_stages)
                if any(need not in arrived_s for need in needs):
                    break
                free_s = end_s[rank][-1] if end_s[rank] else 0.0
                ready_s = (arrived_s[need] + (p2p_s if rank_of_result[need] != rank else 0.0) for need in needs)
                start_s[rank].append(max(free_s, *ready_s, 0.0))
                end_s[rank].append(start_s[rank][-1] + duration(action))
                arrived_s[_result(action)] = end_s[rank][-1]
                moved = True
    waiting = {rank: row[len(end_s[rank])] for rank, row in enumerate(actions) if len(end_s[rank]) < len(row)}
    if waiting:
        needed = {
            rank: next(need for need in _needs(action, num_stages) if need not in arrived_s)
            for rank, action in waiting.items()
        }
        raise InputError([_circle(waiting, needed, rank_of_result)])
    return Timeline(tuple(map(tuple, actions)), tuple(map(tuple, start_s)), tuple(map(tuple, end_s)))


def _result(action: Action) -> Action:
    """What others wait for: an input gradient serves them as well as a full backward, so both are known as B."""
    return Action(action.stage, ActionKind.B, action.microbatch) if action.kind is ActionKind.I else action


def _needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    stage, microbatch = action.stage, action.microbatch
    own_forward = Action(stage, ActionKind.F, microbatch)
    match action.kind:
        case ActionKind.F:
            return (Action(stage - 1, ActionKind.F, microbatch),) if stage > 0 else ()
        case ActionKind.W:
            return (Action(stage, ActionKind.B, microbatch),)
        case ActionKind.B | ActionKind.I:
            is_last = stage == num_stages - 1
            return (own_forward,) if is_last else (own_forward, Action(stage + 1, ActionKind.B, microbatch))


def _table_problems(actions: Sequence[Sequence[Action]], num_stages: int) -> list[Problem]:
    times_run = Counter(_result(action) for row in actions for action in row)
    found = []
    for rank, row in enumerate(actions):
        for action in row:
            where = f"schedule, rank {rank}"
            if action.stage >= num_stages:
                found.append(Problem(where, str(action), f"there are {num_stages} stages", f"stage {num_stages - 1}"))
                continue
            if times_run[_result(action)] > 1:
                found.append(Problem(where, str(action), "a microbatch passes a stage once forward and once backward"))
            missing = [str(need) for need in _needs(action, num_stages) if need not in times_run]
            if missing:
                found.append(Problem(where, str(action), f"needs {', '.join(missing)}, which no rank runs"))
    return found


def _circle(waiting: dict[int, Action], needed: dict[int, Action], rank_of_result: dict[Action, int]) -> Problem:
    path = [min(waiting)]
    # What a waiting rank needs is in the table and not done, so its rank waits too: the path must come back to itself.
    while (rank := rank_of_result[needed[path[-1]]]) not in path:
        path.append(rank)
    circle = path[path.index(rank) :]
    waits = "; ".join(
        f"rank {rank} at {waiting[rank]} waits for {needed[rank]} of rank {rank_of_result[needed[rank]]}"
        for rank in circle
    )
    return Problem("schedule", waits, "deadlock, the ranks wait for one another; run what is waited for earlier")
