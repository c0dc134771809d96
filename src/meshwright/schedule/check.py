"""What is wrong with a table that somebody wrote: everything at once, each fault with its rank, action and rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.schedule.action import COMPUTE, ActionKind, Table
from meshwright.schedule.waits import Leaves, doubled, find_waits, leaves_of, order_problem, rendezvous_problem
from meshwright.sweep import IndexArray

_F, _I, _W, _B = COMPUTE
Place = Callable[[int], str]  # of a rank


def check_table(
    table: Table,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    *,
    num_ranks: int | None = None,
    file: str | None = None,
) -> list[Problem]:
    """All that keeps a table from being run; empty where it is sound.

    Each stage is on one rank and runs each microbatch once forward and, where the table has backwards at all, once
    backward: B, or I and W. Messages have both ends. The order has no deadlock, and, where there are messages, none
    with messages that block until both sides are there. Numbers that are not given are one more than the largest in the
    table; `file` is where it was read from.

    >>> from meshwright.schedule import read_table
    >>> for problem in check_table(read_table("0F0,0F1,0B0,0B1\\n1F0,1B0,1F0", ""), num_microbatches=2, file="my.csv"):
    ...     print(problem)
    my.csv, line 2 (rank 1) = 1F0: a microbatch passes a stage once forward and once backward
    my.csv, line 2 (rank 1) = 1F0: a microbatch passes a stage once forward and once backward
    my.csv, line 2 (rank 1) = 1F1: is missing; each microbatch passes each stage once forward
    my.csv, line 2 (rank 1) = 1B1: is missing; each microbatch passes each stage once backward, by B or by I and W
    """
    leaves = leaves_of(table)
    whole = file or "schedule"

    def place(rank: int) -> str:
        return f"{file}, line {rank + 1} (rank {rank})" if file else f"schedule, rank {rank}"

    if num_stages is None:
        num_stages = int(leaves.stage_L.max(initial=-1)) + 1
    if num_microbatches is None:
        num_microbatches = int(leaves.microbatch_L.max(initial=-1)) + 1
    found = [
        *_rank_problems(leaves, len(table), num_ranks, whole, place),
        *_unknown(leaves, leaves.stage_L, num_stages, "stages", "stage", place),
        *_unknown(leaves, leaves.microbatch_L, num_microbatches, "microbatches", "microbatch", place),
        *_shared_stages(leaves, whole),
        *(replace(problem, where=place(_rank(leaves, leaf))) for leaf, problem in doubled(leaves)),
        *_missing(leaves, num_stages, num_microbatches, whole, place),
    ]
    return found or _waits_problems(leaves, num_stages, whole, place)


def checked(
    table: Table,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    *,
    num_ranks: int | None = None,
    file: str | None = None,
) -> Table:
    """The table itself where `check_table` finds nothing; raises `InputError` with what it finds."""
    if problems := check_table(table, num_stages, num_microbatches, num_ranks=num_ranks, file=file):
        raise InputError(problems)
    return table


def _rank(leaves: Leaves, leaf: int) -> int:
    return int(leaves.rank_N[leaves.task_L[leaf]])


def _rank_problems(leaves: Leaves, num_rows: int, num_ranks: int | None, whole: str, place: Place) -> Iterator[Problem]:
    if num_ranks is not None and num_rows != num_ranks:
        word = "too many" if num_rows > num_ranks else "too few"
        yield Problem(whole, f"{num_rows} ranks", f"{abs(num_rows - num_ranks)} {word}", f"{num_ranks} ranks")
    if not len(leaves.task_L):
        yield Problem(whole, "", "has no actions")
        return
    computing = set(leaves.rank_N[leaves.task_L[leaves.are(*COMPUTE)]].tolist())
    for rank in sorted(set(range(num_rows)) - computing):
        yield Problem(place(rank), "", "computes nothing: it has a rank too many, or its actions are missing")


def _unknown(leaves: Leaves, number_L: IndexArray, limit: int, noun: str, one: str, place: Place) -> Iterator[Problem]:
    """Each number that is too large, told once on each rank with its first action."""
    beyond = np.flatnonzero(number_L >= limit)
    rank = leaves.rank_N[leaves.task_L[beyond]]
    key = rank * (number_L.max(initial=0) + 1) + number_L[beyond]
    _, first, counts = np.unique(key, return_index=True, return_counts=True)
    for index, count in zip(first, counts, strict=True):
        action = str(leaves.leaf(beyond[index])) + (f" and {count - 1} more" if count > 1 else "")
        yield Problem(place(int(rank[index])), action, f"there are {limit} {noun}", f"{one} {limit - 1}")


def _shared_stages(leaves: Leaves, whole: str) -> Iterator[Problem]:
    """Stages with actions on several ranks."""
    rank_L = leaves.rank_N[leaves.task_L]
    num_ranks = len(leaves.starts_S)
    pairs, first = np.unique(leaves.stage_L * num_ranks + rank_L, return_index=True)
    stages, times = np.unique(pairs // num_ranks, return_counts=True)
    for stage in stages[times > 1]:
        there = first[pairs // num_ranks == stage].tolist()
        places = " and ".join(f"{leaves.leaf(leaf)} on rank {rank_L[leaf]}" for leaf in there)
        yield Problem(whole, places, f"stage {stage} is on one rank")


def _microbatches(leaves: Leaves) -> dict[tuple[int, ActionKind], set[int]]:
    """For which microbatches each stage does each kind of computation."""
    kinds = list(ActionKind)
    found: dict[tuple[int, ActionKind], set[int]] = defaultdict(set)
    columns = (leaves.stage_L.tolist(), leaves.kind_L.tolist(), leaves.microbatch_L.tolist())
    for stage, kind, microbatch in zip(*columns, strict=True):
        found[stage, kinds[kind]].add(microbatch)
    return found


def _missing(leaves: Leaves, num_stages: int, num_microbatches: int, whole: str, place: Place) -> Iterator[Problem]:
    computes = leaves.are(*COMPUTE) & (leaves.stage_L < num_stages)
    stages, first = np.unique(leaves.stage_L[computes], return_index=True)
    ranks = leaves.rank_N[leaves.task_L[computes][first]]
    for gap in _gaps(stages.tolist(), num_stages):
        yield Problem(whole, _span("stage ", gap), "is missing; no rank computes it")
    done = _microbatches(leaves)
    has_backward = bool(leaves.are(_I, _W, _B).any())
    for stage, rank in zip(stages.tolist(), ranks.tolist(), strict=True):
        forward, backward, inputs, weights = (done.get((stage, kind), set()) for kind in (_F, _B, _I, _W))
        rule = "is missing; each microbatch passes each stage once"
        told = [
            (_F, forward, num_microbatches, f"{rule} forward"),
            (_B, backward | inputs, num_microbatches * has_backward, f"{rule} backward, by B or by I and W"),
        ]
        for kind, numbers, stop, what in told:
            if gaps := _gaps(sorted(numbers), stop):
                yield Problem(place(rank), ", ".join(_span(f"{stage}{kind}", gap) for gap in gaps), what)
        for b in sorted(inputs - weights):
            yield Problem(
                place(rank), f"{stage}W{b}", f"is missing; {stage}I{b} leaves the gradient of the weights to it"
            )
        for b in sorted(weights - inputs):
            yield Problem(place(rank), f"{stage}W{b}", f"needs {stage}I{b}, which no rank runs")


def _gaps(numbers: list[int], stop: int) -> list[tuple[int, int]]:
    """Spans (first, last) of what is missing from 0 to stop - 1, `numbers` being sorted and without doubles.

    >>> _gaps([1, 4], 8)
    [(0, 0), (2, 3), (5, 7)]
    """
    edges = [-1, *(number for number in numbers if number < stop), stop]
    return [(low + 1, high - 1) for low, high in pairwise(edges) if high - low > 1]


def _span(prefix: str, gap: tuple[int, int]) -> str:
    low, high = gap
    return f"{prefix}{low}" if low == high else f"{prefix}{low} to {prefix}{high}"


def _waits_problems(leaves: Leaves, num_stages: int, whole: str, place: Place) -> list[Problem]:
    """What only the order shows, in a table that has everything: messages without another end, circles of waits."""
    waits = find_waits(leaves, num_stages)
    if waits.missing:
        return [replace(problem, where=place(_rank(leaves, leaf))) for leaf, problem in waits.problems(leaves)]
    circle = order_problem(leaves, waits)
    if circle is None and leaves.has_messages:
        circle = rendezvous_problem(leaves, waits)
    return [replace(circle, where=whole)] if circle else []
