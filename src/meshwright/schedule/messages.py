"""Tables with what a runtime does beside computing: messages between ranks, and the state of stages."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from meshwright.errors import InputError, Problem
from meshwright.schedule.action import Action, ActionKind, Table, compute_parts
from meshwright.schedule.waits import find_waits, leaves_of, order_problem

_F, _BACKWARD = ActionKind.F, (ActionKind.B, ActionKind.I)


def with_messages(
    table: Table, rank_of_stage: Callable[[int], int] | None = None, num_stages: int | None = None
) -> Table:
    """The table with its SENDs and RECVs, in an order that even messages which block can run; PyTorch's order.

    Ranks take turns, each running its next action if it can. What another rank needs is sent at once, and its receive
    is written where that rank stands: all messages have one order, in which every rank has its own, so no two can wait
    for each other. `rank_of_stage` and `num_stages` are those of the table where they are not given. Raises
    `InputError` where the table has a deadlock or lacks what it needs.

    >>> from meshwright.schedule import actions
    >>> for row in with_messages(actions("GPipe", 2, 1, 1)):
    ...     print(*row)
    0F0 0SEND_F0 0RECV_B0 0B0
    1RECV_F0 1F0 1B0 1SEND_B0
    """
    holder = {part.stage: rank for rank, row in enumerate(table) for action in row for part in compute_parts(action)}
    last = (max(holder, default=-1) + 1 if num_stages is None else num_stages) - 1
    if rank_of_stage is None and len(holder) != last + 1:
        raise InputError([Problem("schedule", f"{len(holder)} of {last + 1} stages", "each stage is on one rank")])
    rank_of = rank_of_stage or holder.__getitem__
    rows: list[list[Action]] = [[] for _ in table]
    known: list[set[tuple[bool, int, int | None]]] = [set() for _ in table]  # by rank: (is forward, stage, microbatch)
    queues = [deque(row) for row in table]

    def is_ready(part: Action, rank: int) -> bool:
        if part.kind is _F:
            return part.stage == 0 or (True, part.stage - 1, part.microbatch) in known[rank]
        if part.kind in _BACKWARD:
            return part.stage == last or (False, part.stage + 1, part.microbatch) in known[rank]
        return True

    def run(action: Action, rank: int) -> None:
        rows[rank].append(action)
        for part in compute_parts(action):
            is_forward = part.kind is _F
            if not is_forward and part.kind not in _BACKWARD:
                continue
            result = (is_forward, part.stage, part.microbatch)
            known[rank].add(result)
            target = part.stage + (1 if is_forward else -1)
            if 0 <= target <= last and (to := rank_of(target)) != rank:
                send, receive = ("SEND_F", "RECV_F") if is_forward else ("SEND_B", "RECV_B")
                rows[rank].append(Action(part.stage, ActionKind(send), part.microbatch))
                rows[to].append(Action(target, ActionKind(receive), part.microbatch))
                known[to].add(result)

    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            if queue and all(is_ready(part, rank) for part in compute_parts(queue[0])):
                run(queue.popleft(), rank)
                moved = True
        if not moved:
            raise _stuck(table, last + 1)
    return tuple(map(tuple, rows))


def _stuck(table: Table, num_stages: int) -> InputError:
    leaves = leaves_of(table)
    waits = find_waits(leaves, num_stages)
    circle = order_problem(leaves, waits) if not waits.missing else None
    found = [circle] if circle else [problem for _, problem in waits.problems(leaves)]
    return InputError(
        [replace(problem, where=", ".join(filter(None, ("schedule", problem.where)))) for problem in found]
    )


def with_state(table: Table, max_active_stages: int = 3, *, num_microbatches: int | None = None) -> Table:
    """The table with UNSHARD and RESHARD around the computations of each stage, and REDUCE_GRAD after the last.

    Whole weights of the next `max_active_stages` stages that a rank will compute are there in time; others are given
    back to make room. Gradients are reduced after the last of the microbatches. PyTorch's order, except that it gives
    several stages back in no particular order and this in that of their numbers.

    >>> from meshwright.schedule import actions
    >>> print(*with_state(actions("GPipe", 1, 1, 1))[0])
    0UNSHARD 0F0 0B0 0REDUCE_GRAD 0RESHARD
    """
    if num_microbatches is None:
        numbers = (part.microbatch for row in table for action in row for part in compute_parts(action))
        num_microbatches = 1 + max((number for number in numbers if number is not None), default=-1)
    return tuple(tuple(_reducing(_gathering(row, max_active_stages), num_microbatches)) for row in table)


def _gathering(row: Sequence[Action], max_active_stages: int) -> Iterator[Action]:
    active: set[int] = set()
    for action, coming in zip(row, _next_stages(row, max_active_stages), strict=True):
        yield from (Action(stage, ActionKind.RESHARD) for stage in sorted(active.difference(coming)))
        yield from (Action(stage, ActionKind.UNSHARD) for stage in coming if stage not in active)
        active = set(coming)
        yield action
    yield from (Action(stage, ActionKind.RESHARD) for stage in sorted(active))


def _next_stages(row: Sequence[Action], count: int) -> list[list[int]]:
    """For each position the `count` stages that are computed soonest from there on; those of one overlap together."""
    found = []
    soonest: dict[int, int] = {}  # stage -> where it is computed next, soonest first
    for position in range(len(row) - 1, -1, -1):
        here = dict.fromkeys((part.stage for part in compute_parts(row[position])), position)
        soonest = here | {stage: later for stage, later in soonest.items() if stage not in here}
        stages = list(soonest)
        stop = min(count, len(stages))
        while 0 < stop < len(stages) and soonest[stages[stop]] == soonest[stages[stop - 1]]:
            stop += 1
        found.append(stages[:stop])
    return found[::-1]


def _reducing(row: Iterator[Action], num_microbatches: int) -> Iterator[Action]:
    done: Counter[int] = Counter()
    for action in row:
        yield action
        for part in compute_parts(action):
            if part.kind in (ActionKind.W, ActionKind.B):
                done[part.stage] += 1
                if done[part.stage] == num_microbatches:
                    yield Action(part.stage, ActionKind.REDUCE_GRAD)
